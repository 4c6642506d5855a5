"""HyperLoRA against its authors' output, and on photos from the first byte to the file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

pytest.importorskip("insightface")

import diffusers

from hyperlora.encoders.clip_vision import ClipVisionEncoder, make_clip_pixels
from hyperlora.encoders.face_finder import FaceFinder
from hyperlora.errors import InvalidImageError, LayoutMismatchError, ModelLoadError
from hyperlora.lora.io.lora import Lora
from hyperlora.models.hyperlora_resampler import join_photos
from hyperlora.pipelines.released.cards import find_card
from hyperlora.pipelines.released.hyperlora_files import HyperLoraFiles
from hyperlora.pipelines.released.hyperlora_sdxl import HyperLoraFeatures, HyperLoraSdxl
from tests.pipelines.released.tiny_hyperlora import (
    CLIP_CONFIG,
    GOLDEN,
    draw_portrait,
    make_clip,
    open_model,
    save_world,
)

STABILITY_BLOCKS = {
    "down_blocks_1_attentions_0": "input_blocks_4_1",
    "down_blocks_1_attentions_1": "input_blocks_5_1",
    "down_blocks_2_attentions_0": "input_blocks_7_1",
    "down_blocks_2_attentions_1": "input_blocks_8_1",
    "mid_block_attentions_0": "middle_block_1",
    "up_blocks_0_attentions_0": "output_blocks_0_1",
    "up_blocks_0_attentions_1": "output_blocks_1_1",
    "up_blocks_0_attentions_2": "output_blocks_2_1",
    "up_blocks_1_attentions_0": "output_blocks_3_1",
    "up_blocks_1_attentions_1": "output_blocks_4_1",
    "up_blocks_1_attentions_2": "output_blocks_5_1",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("hyperlora"))


def make_golden_model(world: Path, folder: Path, index: dict[str, Any]) -> HyperLoraSdxl:
    files = HyperLoraFiles(
        index,
        folder / "hyper_lora_modules.safetensors",
        folder / "resampler.safetensors",
        folder / "id_projector.safetensors",
    )
    encoder = ClipVisionEncoder(world / "clip/config.json", world / "clip/model.safetensors")
    finder = FaceFinder(str(world / "antelopev2"))
    return HyperLoraSdxl(files, encoder, finder, find_card("hyperlora-sdxl"))


def spell_as_stability(key: str) -> str:
    for diffusers_name, stability_name in STABILITY_BLOCKS.items():
        key = key.replace(f"lora_unet_{diffusers_name}", f"lora_unet_{stability_name}")
    return key


@pytest.mark.parametrize("num_photos", [1, 3])
@pytest.mark.parametrize("spell", [str, spell_as_stability])
def test_lora_equals_that_of_the_authors(
    world: Path, tmp_path: Path, num_photos: int, spell: Callable[[str], str]
) -> None:
    folder = GOLDEN / f"hyperlora-sdxl-tiny-{num_photos}"
    index = json.loads((folder / "hyper_lora_modules.json").read_text())
    index = {spell(key): sizes for key, sizes in index.items()}
    model = make_golden_model(world, folder, index)
    inputs = load_file(folder / "inputs.safetensors")
    coefficients = model.compute_coefficients(inputs["arcface"], inputs["clip_hidden_states"])
    assert len(coefficients) == num_photos
    weights = model.generate_from_features(
        HyperLoraFeatures(join_photos(coefficients)[None], ((),))
    )
    Lora(weights[0], model.make_metadata("x", [])).save(tmp_path / "x.safetensors", format="kohya")
    written = load_file(tmp_path / "x.safetensors")
    expected = load_file(folder / "expected-lora.safetensors")
    assert written.keys() == expected.keys() and len(written) == 264
    for key, tensor in expected.items():
        if key.endswith(".lora_down.weight"):
            torch.testing.assert_close(written[key], tensor, atol=1e-5, rtol=0)
            stem = key.removesuffix(".lora_down.weight")
            delta, scale = tensor.mT @ expected[f"{stem}.lora_up.weight"].mT, len(tensor)
            delta = delta * expected[f"{stem}.alpha"] / scale
            written_delta = written[key].mT @ written[f"{stem}.lora_up.weight"].mT
            written_delta = written_delta * written[f"{stem}.alpha"] / scale
            torch.testing.assert_close(written_delta, delta, atol=1e-5, rtol=0)


def test_layout_has_the_560_attention_sites_of_sdxl(tmp_path: Path) -> None:
    """On the meta device, from an index in either spelling."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
        )
    linears = {n: m for n, m in unet.named_modules() if isinstance(m, torch.nn.Linear)}
    attentions = [name.removesuffix(".processor") for name in unet.attn_processors]
    assert len(attentions) == 140
    index, tensors = {}, {}
    for i, name in enumerate(attentions):
        hidden, context = linears[f"{name}.to_q"].in_features, linears[f"{name}.to_k"].in_features
        key = spell_as_stability("lora_unet_" + name.replace(".", "_"))
        index[key] = {"hidden_size": hidden, "cross_attention_dim": context}
        for projection, width in (
            ("to_q", hidden),
            ("to_k", context),
            ("to_v", context),
            ("to_out", hidden),
        ):
            tensors[f"{i}.{projection}.id_down_basis"] = torch.zeros(1, width, 8).half()
            tensors[f"{i}.{projection}.id_up_basis"] = torch.zeros(1, 8, hidden).half()
    save_file(tensors, tmp_path / "modules.safetensors")
    layout = HyperLoraFiles(
        index, tmp_path / "modules.safetensors", tmp_path, tmp_path
    ).make_layout("base")
    assert len(layout.targets) == 560 and layout.rank == 8 and layout.numel == 11_612_160
    for target in layout.targets:
        linear = linears[target.path]
        assert (linear.in_features, linear.out_features) == (
            target.in_features,
            target.out_features,
        )
    assert len({target.name for target in layout.targets}) == 560


def test_encoder_returns_the_hidden_states_before_the_last_layer(world: Path) -> None:
    encoder = ClipVisionEncoder(world / "clip/config.json", world / "clip/model.safetensors")
    images = [draw_portrait(seed, 300) for seed in (1, 2)]
    pixels = torch.stack([make_clip_pixels(image) for image in images])
    with torch.no_grad():
        expected = make_clip()(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(encoder.encode_images(images), expected, atol=1e-5, rtol=1e-5)
    assert encoder.width == CLIP_CONFIG.hidden_size


def test_clip_pixels_are_those_of_the_processor_in_pil() -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = draw_portrait(5, 300).resize((301, 260))
    expected = CLIPImageProcessorPil()(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(make_clip_pixels(image), expected, atol=1e-5, rtol=0)


def test_variants_and_persons_give_different_loras(world: Path) -> None:
    fidelity, edit = open_model(world), open_model(world, ":edit")
    assert fidelity.facts.variant == "fidelity" and edit.facts.variant == "edit"
    photos = [draw_portrait(seed) for seed in (3, 20)]
    loras = [model([photo]).weights.flatten() for model in (fidelity, edit) for photo in photos]
    for i, lora in enumerate(loras):
        assert all((lora - other).abs().max() > 1e-3 for other in loras[:i])
    assert fidelity.compute_fingerprint() != edit.compute_fingerprint()


def test_photos_without_face_are_left_out(world: Path) -> None:
    model = open_model(world)
    face, empty = draw_portrait(3), Image.new("RGB", (200, 200), "white")
    lora = model([face, empty]).weights.flatten()
    torch.testing.assert_close(lora, model([face]).weights.flatten())
    (_,), warnings = model.prepare_faces([empty, face])
    assert len(warnings) == 1 and warnings[0].startswith("photo 1: no face")
    several = model([face, draw_portrait(3).rotate(4)]).weights.flatten()
    assert (several - lora).abs().max() > 1e-4


def test_batch_equals_single_subjects(world: Path) -> None:
    model = open_model(world)
    photos = [[draw_portrait(3)], [draw_portrait(9)]]
    batch = model.generate_batch(photos)
    for i, subject in enumerate(photos):
        torch.testing.assert_close(
            batch[i].flatten(), model(subject).weights.flatten(), atol=1e-5, rtol=1e-4
        )


def test_face_that_fills_the_photo_is_found_in_a_gray_border(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A detector that misses close-ups, as SCRFD does, finds the face once there is a border."""
    finder = FaceFinder(str(world / "antelopev2"))
    photo, detect = draw_portrait(3, 200), finder._detector.detect
    calls = []

    def miss_close_ups(pixels: np.ndarray, input_size: tuple[int, int]) -> Any:
        calls.append((pixels.shape[0], input_size[0]))
        is_close_up = pixels.shape[0] == photo.height
        return detect(np.zeros_like(pixels) if is_close_up else pixels, input_size=input_size)

    monkeypatch.setattr(finder._detector, "detect", miss_close_ups)
    found = finder.find_face(photo)
    assert calls[:4] == [(200, 640), (200, 512), (200, 384), (200, 256)]
    assert found.photo.size == (400, 400) and found.photo.getpixel((5, 5)) == (127, 127, 127)
    assert np.abs(found.landmarks.mean(0) - 200).max() < 60


def test_unusable_faces_are_refused(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finder = FaceFinder(str(world / "antelopev2"))
    small = Image.new("RGB", (640, 640), "white")
    small.paste(draw_portrait(3, 80), (280, 280))
    with pytest.raises(InvalidImageError, match=r"the face is \d+ pixels high, at least 80"):
        finder.find_face(small)
    detect = finder._detector.detect

    def turn_aside(pixels: np.ndarray, input_size: tuple[int, int]) -> Any:
        boxes, keypoints = detect(pixels, input_size=input_size)
        keypoints[:, 2, 0] = keypoints[:, :2, 0].max(1) + 10  # the nose beyond an eye
        return boxes, keypoints

    monkeypatch.setattr(finder._detector, "detect", turn_aside)
    with pytest.raises(InvalidImageError, match="in profile"):
        finder.find_face(draw_portrait(3))


def test_check_base_accepts_other_checkpoints_of_the_same_shape(world: Path) -> None:
    model = open_model(world)
    unet_config: dict[str, Any] = {
        "block_out_channels": (32, 64, 128),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
        "cross_attention_dim": 48,
    }

    class Base:
        def __init__(self, **changes: Any) -> None:
            self.id = "someone/realistic-xl"
            unet = diffusers.UNet2DConditionModel(**(unet_config | changes))
            self.modules = {"unet": unet}

    model.check_base(Base())
    with pytest.raises(LayoutMismatchError, match="is no base of this network"):
        model.check_base(Base(cross_attention_dim=32))


def test_wrong_networks_under_the_names_of_the_pack(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "antelopev2", tmp_path / "pack" / "pack")  # as the archive unpacks
    FaceFinder(str(tmp_path / "pack"))
    inner = tmp_path / "pack" / "pack"
    shutil.copyfile(inner / "glintr100.onnx", inner / "2d106det.onnx")
    with pytest.raises(ModelLoadError, match="has other networks under the names"):
        FaceFinder(str(tmp_path / "pack"))
    (inner / "2d106det.onnx").write_bytes(b"no onnx")
    with pytest.raises(ModelLoadError, match="is damaged"):
        FaceFinder(str(tmp_path / "pack"))
