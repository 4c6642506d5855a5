"""A tiny HyperLoRA on disk with a face pack and an encoder that run, for drawn people."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from data_builder.avatars.identity import Scene, sample_identity
from data_builder.avatars.rendering import render_portrait
from hyperlora import pretrained
from hyperlora.pipelines.auto import load_photo_model
from hyperlora.pipelines.released.hyperlora_sdxl import HyperLoraSdxl
from hyperlora.pipelines.released.released_model import ReleasedOptions

GOLDEN = Path(__file__).parents[2] / "golden"
CLIP_CONFIG = CLIPVisionConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=224,
    patch_size=56,
)


def save_face_pack(folder: Path) -> Path:
    """Write a pack of the files of antelopev2, which finds drawn faces."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(pretrained.FACE_PACK_DIR / "det_avatars.onnx", folder / "scrfd_10g_bnkps.onnx")
    shutil.copyfile(pretrained.FACE_PACK_DIR / "rec_avatars.onnx", folder / "glintr100.onnx")
    onnx.save(_make_landmark_network(), folder / "2d106det.onnx")
    return folder


def _make_landmark_network() -> onnx.ModelProto:
    """Landmarks of a mean face, whatever the image shows."""
    path = GOLDEN / "hyperlora-crops" / "0-landmarks106.json"
    points = np.array(json.loads(path.read_text()), np.float32)
    low, high = points.min(0), points.max(0)
    shape = (points - (low + high) / 2) / (high - low).max() * 2 / 1.5  # the box is 2/3 of 192
    nodes = [
        helper.make_node("GlobalAveragePool", ["data"], ["mean"], "pool"),
        helper.make_node("Flatten", ["mean"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "weight", "bias"], ["landmarks"], "linear"),
    ]
    weights = {"weight": np.zeros((3, 212), np.float32), "bias": shape.reshape(-1)}
    graph = helper.make_graph(
        nodes,
        "landmarks",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, ["n", 3, 192, 192])],
        [helper.make_tensor_value_info("landmarks", TensorProto.FLOAT, ["n", 212])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def make_clip() -> CLIPVisionModel:
    torch.manual_seed(0)
    model = CLIPVisionModel(CLIP_CONFIG).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def save_clip(folder: Path) -> Path:
    """Write the encoder as a file of both halves, the way the hub has it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"vision_model.{k}": v.contiguous() for k, v in make_clip().state_dict().items()}
    text = {"text_model.embeddings.token_embedding.weight": torch.zeros(100, 8)}
    save_file(text | tensors | {"logit_scale": torch.zeros(())}, folder / "model.safetensors")
    config = {"model_type": "clip", "vision_config": CLIP_CONFIG.to_dict()}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_hyperlora(folder: Path) -> Path:
    """Write a repository of two variants of a tiny SDXL, as the hub has it."""
    for variant, source in (("fidelity", "1"), ("edit", "3")):
        target = folder / f"sdxl_hyper_id_lora_v1_{variant}"
        target.mkdir(parents=True)
        for path in sorted((GOLDEN / f"hyperlora-sdxl-tiny-{source}").iterdir()):
            if path.name.startswith(("hyper_lora", "id_projector", "resampler")):
                shutil.copyfile(path, target / path.name)
    return folder


def draw_portrait(seed: int, size: int = 256) -> Image.Image:
    """Draw a person, whose face the pack finds."""
    return render_portrait(sample_identity(seed), Scene()).resize(
        (size, size), Image.Resampling.BICUBIC
    )


def save_world(root: Path) -> Path:
    """Write network, encoder, face pack and a photo."""
    save_face_pack(root / "antelopev2")
    save_clip(root / "clip")
    save_hyperlora(root / "HyperLoRA")
    draw_portrait(3).save(root / "me.png")
    return root


def open_model(world: Path, variant: str = "") -> HyperLoraSdxl:
    """Open the network of ``save_world``."""
    options = ReleasedOptions(face_pack=str(world / "antelopev2"), encoder=str(world / "clip"))
    model = load_photo_model(f"{world / 'HyperLoRA'}{variant}", options=options)
    assert isinstance(model, HyperLoraSdxl)
    return model
