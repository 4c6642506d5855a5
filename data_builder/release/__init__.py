"""Tools that prepare released models: calibration, pruning, shared weights."""
