"""Contestants of `python -m tests.bench.kernels`, each in a process of its own, some in interpreters of their own."""
