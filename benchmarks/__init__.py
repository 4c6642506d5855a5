"""Programs that measure speed, quality and robustness, and the ablations; each prints its figures.
"""
