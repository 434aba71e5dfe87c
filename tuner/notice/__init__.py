"""Noticing: rules, statistics and forecasts over what is sampled."""
