"""Builds the datasets that training reads, and prepares released models."""
