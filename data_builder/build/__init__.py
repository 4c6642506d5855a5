"""Builds of LoRA datasets: plan, run, status, pack."""
