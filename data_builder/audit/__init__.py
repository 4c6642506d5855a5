"""Checks of a finished dataset of LoRAs: outliers, duplicates, identities."""
