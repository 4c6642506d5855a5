"""LoRA files: written for every common tool, read as untrusted input.

Lora ── save ──▶ .safetensors (diffusers, kohya or sgm keys, metadata) ── load_lora ──▶ LoraFile
"""
