"""Servers that benchmarks/serving.py measures beside ours: small programs with the same network and backend."""
