"""Measurements against peers and limits; run with `python -m benchmarks.NAME --help`."""
