"""Scores of the released models on subjects that no training saw."""
