"""A tiny i2L for Z-Image on disk with encoders and images; its sizes count as the released ones."""

from dataclasses import replace
from pathlib import Path

import pytest

from hyperlora.models.i2l import compute_shape_digest, make_z_image_config
from hyperlora.pipelines.released import i2l, recognize
from tests.pipelines.released.tiny_networks import (
    DINOV3_CONFIG,
    EMBEDDING_DIM,
    SIGLIP_CONFIG,
    make_photo,
    save_encoders,
    save_i2l,
)


def save_i2l_world(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write ``network``, ``encoders`` and the images ``0.png`` and ``1.png``."""
    config = replace(make_z_image_config(16, 32, 2, 1, 3), embedding_dim=EMBEDDING_DIM)
    save_i2l(config, folder / "network" / "model.safetensors")
    save_encoders(folder / "encoders")
    digest = compute_shape_digest(config.tensor_shapes)[:8]
    monkeypatch.setitem(recognize.I2L_DIGESTS, digest, "z-image")
    monkeypatch.setattr(i2l, "make_siglip2_config", lambda: SIGLIP_CONFIG)
    monkeypatch.setattr(i2l, "make_dinov3_config", lambda: DINOV3_CONFIG)
    for i in range(2):
        make_photo(i, 300, 260).save(folder / f"{i}.png")
    return folder
