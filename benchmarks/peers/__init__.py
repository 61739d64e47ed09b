"""Servers that benchmarks/serving.py compares with iddpm: small programs with the same network and backend."""
