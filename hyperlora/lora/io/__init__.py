"""LoRA files: written for every common tool, read as untrusted input.

Lora ── save ──▶ .safetensors (keys of a format, metadata) ── load_lora ──▶ LoraFile
"""
