"""Invented people: reference, several images that keep the identity, and those that agree."""
