"""What one choice of training or inference contributes, and the shared code of these comparisons.
"""
