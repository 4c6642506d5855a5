"""Inputs: images read safely, folders of subjects, before/after pairs, datasets of LoRAs."""
