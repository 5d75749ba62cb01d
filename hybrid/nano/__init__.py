"""Nano, the embedded default model: a small Kimi-K2.5-shaped checkpoint and everything that made it."""
