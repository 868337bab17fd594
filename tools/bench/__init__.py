"""Speed, measured: the bare train step, what the loop adds to it, and the gaps between steps."""
