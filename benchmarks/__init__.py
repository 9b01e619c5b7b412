"""Benchmarks: each compares this project with its peers, and with the raw limit, in one run on one machine."""
