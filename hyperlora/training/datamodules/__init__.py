"""LightningDataModules over folders on disk."""
