"""LightningDataModules over drawn avatars and fitted LoRAs."""
