"""Training data that models make: AI feedback by a constitution, and instructions from nothing."""
