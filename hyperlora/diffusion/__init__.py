"""A base diffusion model with LoRAs on it: injection, losses, sampling, composition, guidance."""
