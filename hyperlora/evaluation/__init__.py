"""How good generated LoRAs are: identity and prompt scores on unseen subjects, always with the controls."""
