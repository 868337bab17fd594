"""What a model is measured by: functions from parameters to a dict of floats."""
