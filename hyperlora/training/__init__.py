"""LightningModules, DataModules, objectives and callbacks. What is released is never one of these."""
