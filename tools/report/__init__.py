"""The report of a chain of stages, a sweep or a single run, as one page."""
