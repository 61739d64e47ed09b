"""Measurements that stand in RESULTS.md, each a script: `python -m benchmarks.NAME --help`."""
