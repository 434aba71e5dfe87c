"""Benchmarks of the engine, in one process and without HTTP."""
