"""i2L v1 from images to files, with tiny networks in the released layouts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from hyperlora.compute import ComputeConfig
from hyperlora.encoders.pixel_values import (
    crop_center_square,
    make_dinov3_pixels,
    make_siglip_pixels,
)
from hyperlora.errors import InvalidArgumentError, ModelLoadError
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.i2l import (
    I2lConfig,
    compute_shape_digest,
    decode_i2l,
    make_qwen_image_config,
    make_z_image_config,
)
from hyperlora.pipelines.released import i2l, recognize
from hyperlora.pipelines.released.cards import find_card
from hyperlora.pipelines.released.i2l import ImageToLoraV1
from hyperlora.pipelines.released.registry import open_released_model
from hyperlora.pipelines.released.released_model import ReleasedOptions
from tests.pipelines.released.tiny_networks import (
    DINOV3_CONFIG,
    EMBEDDING_DIM,
    SIGLIP_CONFIG,
    make_dinov3,
    make_photo,
    make_siglip,
    save_encoders,
    save_i2l,
)
from tests.tiny_pipelines import get_tiny_pipeline

PHOTOS = [make_photo(0), make_photo(1, 30, 64)]
COMPUTE = ComputeConfig(device="cpu", dtype="float32")


def resize_config(config: I2lConfig) -> I2lConfig:
    """The same for the embeddings of the tiny encoders."""
    return replace(config, embedding_dim=EMBEDDING_DIM)


Z_IMAGE = resize_config(make_z_image_config(32, 85, 2, 1, 3))  # of tests/tiny_pipelines
QWEN_IMAGE = resize_config(make_qwen_image_config(32, 2, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("i2l")
    save_encoders(folder / "encoders")
    save_i2l(Z_IMAGE, folder / "z-image" / "model.safetensors")
    save_i2l(QWEN_IMAGE, folder / "qwen" / "Qwen-Image-i2L-Style.safetensors")
    return folder


def open_model(
    folder: Path,
    variant: str = "z-image",
    network: str = "z-image/model.safetensors",
    siglip: str = "encoders/SigLIP2-G384/model.safetensors",
    dinov3: str = "encoders/DINOv3-7B/model.safetensors",
) -> ImageToLoraV1:
    return ImageToLoraV1(
        find_card("i2l-v1", variant),
        folder / network,
        folder / siglip,
        folder / dinov3,
        COMPUTE,
        SIGLIP_CONFIG,
        DINOV3_CONFIG,
    )


def encode_whole(photos: Any) -> torch.Tensor:
    """The embeddings by the encoders of transformers, not streamed."""
    squares = [crop_center_square(photo, 1024) for photo in photos]
    siglip = torch.stack([make_siglip_pixels(image, 32) for image in squares])
    dinov3 = torch.stack([make_dinov3_pixels(image, 32) for image in squares])
    with torch.no_grad():
        parts = [make_siglip()(siglip), make_dinov3()(dinov3)]
    return torch.cat([part.pooler_output for part in parts], -1)


@pytest.mark.parametrize("num_photos", [1, 2])
def test_lora_is_decoded_from_both_encoders(folder: Path, num_photos: int) -> None:
    photos = PHOTOS[:num_photos]
    lora = open_model(folder)(photos)
    tensors = load_file(folder / "z-image" / "model.safetensors")
    expected = decode_i2l(Z_IMAGE, tensors.__getitem__, encode_whole(photos), "base")
    assert lora.weights.layout.rank == 4 * num_photos
    torch.testing.assert_close(lora.weights.flatten(), expected.flatten(), rtol=1e-5, atol=1e-5)
    swapped = open_model(folder)([photos[0].transpose(0), *photos[1:]])
    assert (swapped.weights.flatten() - lora.weights.flatten()).abs().max() > 1e-3


def test_subjects_of_a_batch_equal_single_ones(folder: Path) -> None:
    model = open_model(folder)
    batch = model.generate_batch([[photo] for photo in PHOTOS])
    for weights, photo in zip(batch, PHOTOS, strict=True):
        single = model(photo).weights
        torch.testing.assert_close(weights.flatten(), single.flatten(), rtol=1e-5, atol=1e-5)
    with pytest.raises(InvalidArgumentError, match="at least one photo, and all of a batch"):
        model.generate_batch([PHOTOS, PHOTOS[:1]])
    with pytest.raises(InvalidArgumentError, match="at least one photo"):
        model.generate_batch([[]])


@pytest.mark.parametrize("format", ["diffusers", "comfyui"])
@pytest.mark.parametrize("variant", ["z-image", "style"])
def test_files_load_in_plain_diffusers_with_every_target(
    folder: Path, tmp_path: Path, variant: str, format: Any
) -> None:
    is_z_image = variant == "z-image"
    network = "z-image/model" if is_z_image else "qwen/Qwen-Image-i2L-Style"
    lora = open_model(folder, variant, f"{network}.safetensors")(PHOTOS)
    path = lora.save(tmp_path / "style.safetensors", format=format)
    with safe_open(path, "pt") as file:
        keys = list(file.keys())
    prefix = "diffusion_model." if format == "comfyui" else "transformer."
    assert len(keys) == 2 * len(lora.weights.layout.targets)
    assert all(key.startswith(prefix) for key in keys)
    tiny = get_tiny_pipeline("z_image" if is_z_image else "qwen_image")
    linears = {
        name: tuple(layer.weight.shape)
        for name, layer in tiny.denoiser.named_modules()
        if isinstance(layer, nn.Linear)
    }
    targets = lora.weights.layout.targets
    assert {t.path: (t.out_features, t.in_features) for t in targets}.items() <= linears.items()
    pipe = tiny.pipe
    pipe.load_lora_weights(path, adapter_name="style")
    try:
        for target, down, up in zip(
            lora.weights.layout.targets, lora.weights.down, lora.weights.up, strict=True
        ):
            layer = pipe.transformer.get_submodule(target.path)
            torch.testing.assert_close(layer.lora_A["style"].weight, down)
            torch.testing.assert_close(layer.lora_B["style"].weight, up)
            assert layer.scaling["style"] == 1
    finally:
        pipe.unload_lora_weights()


def test_header_names_licenses_and_use(folder: Path, tmp_path: Path) -> None:
    path = open_model(folder)(PHOTOS).save(tmp_path / "style.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.license"] == "Apache-2.0"
    assert "SigLIP2" in metadata["hyperlora.encoder"] and "DINOv3" in metadata["hyperlora.encoder"]
    assert "DINOv3 License" in metadata["hyperlora.encoder_license"]
    assert metadata["hyperlora.base"] == "Tongyi-MAI/Z-Image"
    assert metadata["hyperlora.negative_lora"] == "off"
    assert metadata["hyperlora.recommended_strength"] == "1.0"
    settings = ("num_inference_steps", "guidance_scale", "shift")
    assert [metadata[f"hyperlora.{name}"] for name in settings] == ["50", "4", "8"]
    assert "modelspec.trigger_phrase" not in metadata
    assert json.loads(metadata["hyperlora.reference_sha256"]) == []


def test_warnings_name_small_images(folder: Path) -> None:
    model = open_model(folder)
    features = model.encode_subjects(
        [i2l.SubjectPhotos(images=(photo,)) for photo in (make_photo(0, 600, 300), PHOTOS[0])]
    )
    assert [len(warnings) for warnings in model.list_warnings(features)] == [0, 1]
    assert "only 40 pixels" in model.list_warnings(features)[1][0]


def test_fingerprint_changes_with_network_and_encoders(folder: Path, tmp_path: Path) -> None:
    fingerprint = open_model(folder).compute_fingerprint()
    assert fingerprint == open_model(folder).compute_fingerprint()
    for part in ("z-image", "encoders/DINOv3-7B"):
        other = tmp_path / part.replace("/", "-")
        shutil.copytree(folder, other)
        path = other / part / "model.safetensors"
        data = bytearray(path.read_bytes())
        header_end = 8 + int.from_bytes(data[:8], "little")
        data[header_end + 1] ^= 1
        path.write_bytes(data)
        assert open_model(other).compute_fingerprint() != fingerprint


@pytest.fixture
def known_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny networks count as released ones, and so do the sizes of the tiny encoders."""
    for config, variant in ((Z_IMAGE, "z-image"), (QWEN_IMAGE, "style")):
        digest = compute_shape_digest(config.tensor_shapes)[:8]
        monkeypatch.setitem(recognize.I2L_DIGESTS, digest, variant)
    monkeypatch.setattr(i2l, "make_siglip2_config", lambda: SIGLIP_CONFIG)
    monkeypatch.setattr(i2l, "make_dinov3_config", lambda: DINOV3_CONFIG)


@pytest.mark.usefixtures("known_networks")
@pytest.mark.parametrize(("part", "variant"), [("z-image", "z-image"), ("qwen", "style")])
def test_folders_are_recognized(folder: Path, part: str, variant: str) -> None:
    options = ReleasedOptions(encoder=str(folder / "encoders"))
    model = open_released_model(str(folder / part), options, COMPUTE)
    assert isinstance(model, ImageToLoraV1) and model.facts.variant == variant
    assert isinstance(model.generate_batch([PHOTOS]), LoraWeights)


def cut_file(folder: Path, part: str) -> None:
    path = folder / part
    path.write_bytes(path.read_bytes()[:-100])


def swap_encoders(folder: Path) -> None:
    one, two = (
        folder / f"encoders/{name}/model.safetensors" for name in ("SigLIP2-G384", "DINOv3-7B")
    )
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)


@pytest.mark.usefixtures("known_networks")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: cut_file(f, "z-image/model.safetensors"), r"cut off.*fetch it again"),
        (
            lambda f: cut_file(f, "encoders/DINOv3-7B/model.safetensors"),
            r"model.safetensors is not whole.*fetch it again",
        ),
        (
            lambda f: (f / "encoders/SigLIP2-G384/model.safetensors").unlink(),
            r"lacks SigLIP2-G384/model.safetensors: fetch it again",
        ),
        (swap_encoders, r"is no SiglipVisionModel of this size: it lacks .*own file"),
        (
            lambda f: save_i2l(
                make_z_image_config(32, 85, 1, 1, 3), f / "z-image/model.safetensors"
            ),
            r"none of its released networks: .* digest [0-9a-f]{8}, known are .*; give one",
        ),
    ],
    ids=["half network", "half encoder", "no encoder", "swapped encoders", "unknown digest"],
)
def test_bad_files_are_one_sentence(
    folder: Path, tmp_path: Path, damage: Any, message: str
) -> None:
    shutil.copytree(folder, tmp_path / "i2l")
    damage(tmp_path / "i2l")
    options = ReleasedOptions(encoder=str(tmp_path / "i2l" / "encoders"))
    with pytest.raises(ModelLoadError, match=message) as info:
        open_released_model(str(tmp_path / "i2l" / "z-image"), options, COMPUTE)
    assert ". " not in str(info.value).replace(".safetensors", "")


def test_variants_with_tokens_are_refused_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resize_config(make_qwen_image_config(8, 1, 2, 3, 2))
    monkeypatch.setitem(
        recognize.I2L_DIGESTS, compute_shape_digest(config.tensor_shapes)[:8], "coarse"
    )
    save_i2l(config, tmp_path / "Qwen-Image-i2L-Coarse.safetensors")
    with pytest.raises(InvalidArgumentError, match=r"'coarse' also reads images by Qwen2\.5-VL"):
        open_released_model(str(tmp_path))


def test_encoders_of_other_widths_are_refused(folder: Path, tmp_path: Path) -> None:
    save_i2l(make_z_image_config(32, 85, 2, 1, 3), tmp_path / "model.safetensors")
    shutil.copytree(folder / "encoders", tmp_path / "encoders")
    with pytest.raises(ModelLoadError, match="embeddings of 5632 numbers, the encoders make 40"):
        open_model(tmp_path, network="model.safetensors")
