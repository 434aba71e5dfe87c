"""The loop beside the runtime: samples, notices, searches, proves on live traffic, applies, and takes back."""

__version__ = "0.1.0"
