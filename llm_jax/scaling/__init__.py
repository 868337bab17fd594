"""Before a run: what it takes of chips, memory, time and money, and how to lay it out."""
