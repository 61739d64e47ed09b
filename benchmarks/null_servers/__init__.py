"""Servers without a network, each a separate program, for benchmarks.http: PORT is their only argument."""
