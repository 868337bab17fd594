"""Command-line tools over finished runs: `python -m tools.NAME --help`."""
