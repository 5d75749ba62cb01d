"""Tests; `python -m tests.bench.…` and `python -m tests.gpu` run from here."""

import os

# As the engine process does, and before anything here loads torch: OpenMP threads that spin between operations take
# the cores from the expert workers (decode at batch 4: 5.7 s a step against 0.6 s on two busy cores, 2026-11-22).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
