"""LoRAs from images over HTTP: one FastAPI app over an engine.

request ── security, limits ──▶ api ── Engine ──▶ LoRA bytes or PNG ── response, or a job's file
"""
