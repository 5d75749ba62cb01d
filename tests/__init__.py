"""Tests; `python -m tests.bench.…` and `python -m tests.gpu` run from here."""
