"""LoRAs from images over HTTP: one FastAPI app over an engine.

request ── security, limits ──▶ api ── Engine ──▶ LoRA bytes or PNG ── sync, or a job ──▶ response
"""
