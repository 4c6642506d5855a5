"""LoRAs and images from a server. Start it first: ``hyperlora serve``.

Expected output:
    avatars/base, avatars/base, avatars/edit-base
    me.safetensors: 563 kB
    identity similarity: 0.9
"""

import sys
from pathlib import Path

from hyperlora import Client

PHOTO = "checkpoints/avatars/test/subjects/person-1100000/0.webp"

with Client(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000") as server:
    print(", ".join(model["base"] for model in server.list_models()))
    lora = server.create_lora([PHOTO], title="me")
    Path("me.safetensors").write_bytes(lora)
    print(f"me.safetensors: {len(lora) / 1000:.0f} kB")
    image = server.generate_image("a portrait of sks person, smiling", loras=[lora], seed=7)
    image.save("out.png")
    similarity = server.compute_identity_similarity([PHOTO], [image])[0]
    print(f"identity similarity: {similarity:.1f}")
