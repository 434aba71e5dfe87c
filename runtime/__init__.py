"""A server for causal language models whose knobs change while it serves. Imports nothing of the tuner."""

__version__ = "0.1.0"
