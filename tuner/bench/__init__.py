"""Benchmarks of what the tuner decides by: the judge, the rules, the quality check."""
