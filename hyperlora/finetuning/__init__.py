"""LoRAs by gradient descent: many at once, or a few steps from a predicted one."""
