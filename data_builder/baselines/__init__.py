"""Per-subject baselines and regression targets."""
