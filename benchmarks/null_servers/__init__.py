"""Servers without a network, each a program of its own, for benchmarks.http: PORT is their only argument."""
