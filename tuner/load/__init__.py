"""Requests of our own making, for demos and benchmarks, and what became of them."""
