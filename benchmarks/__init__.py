"""Measured numbers, each beside a ceiling of the same run: `python -m benchmarks.NAME`, or `benchmarks.all`."""
