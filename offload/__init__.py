"""Routed experts in CPU memory: formats, store, Numba kernels, worker pool. Knows no models and no requests."""
