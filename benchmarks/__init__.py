"""Programs that measure speed, quality, robustness and ablations, and print their figures."""
