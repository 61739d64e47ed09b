"""Scripts of the measurements in RESULTS.md: `python -m benchmarks.NAME --help`."""
