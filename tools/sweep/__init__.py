"""Runs a config at many points: `python -m tools.sweep`."""
