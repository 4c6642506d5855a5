"""LightningDataModules over rendered avatars and fine-tuned LoRAs."""
