"""LoRA files: written so that every tool loads them, read as untrusted input.

LoraWeights ── save ──▶ .safetensors (diffusers, kohya or sgm keys, metadata) ── load ──▶ LoraFile
"""
