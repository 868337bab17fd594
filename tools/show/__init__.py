"""Looks at data and at models: python -m tools.show."""
