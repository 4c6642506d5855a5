"""Contributions of single choices of training and inference, and their shared code."""
