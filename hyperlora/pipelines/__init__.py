"""What users call: images to LoRAs. Importing one pipeline loads that pipeline only."""
