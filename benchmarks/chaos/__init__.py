"""Faults on a real cluster under clients that log every byte: `python -m benchmarks.chaos`."""
