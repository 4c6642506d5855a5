"""Behaviour under malformed requests, crashes and images outside the training data."""
