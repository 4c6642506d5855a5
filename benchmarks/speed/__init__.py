"""Seconds, rates and memory, against a reference in the same run."""
