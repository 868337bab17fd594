"""Looks at what a run is: its record, its checkpoints and its parameters."""
