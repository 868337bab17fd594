"""Whether the difference between runs is real, and how sure that is."""
