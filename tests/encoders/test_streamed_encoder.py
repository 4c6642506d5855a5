"""Streamed encoders against the same classes run whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from hyperlora.encoders.streamed_encoder import (
    TensorFiles,
    build_streamed_module,
    choose_encoder_dtype,
)
from hyperlora.errors import ModelLoadError

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "image_size": 64}
MODELS: dict[str, Callable[[], Any]] = {
    "siglip": lambda: SiglipVisionModel(
        SiglipVisionConfig(**SIZES, num_hidden_layers=3, patch_size=16)
    ),
    "dinov3": lambda: DINOv3ViTModel(
        DINOv3ViTConfig(
            **SIZES,
            num_hidden_layers=2,
            num_register_tokens=4,
            use_gated_mlp=True,
            hidden_act="silu",
            query_bias=False,
            value_bias=False,
        )
    ),
    "clip": lambda: CLIPVisionModelWithProjection(
        CLIPVisionConfig(**SIZES, num_hidden_layers=2, patch_size=16, projection_dim=24)
    ),
}


def make_model(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval().requires_grad_(False)
    for parameter in model.parameters():  # also those that begin at zero or one
        nn.init.normal_(parameter, std=0.1)
    return model


def save_in_two_files(model: nn.Module, folder: Path, dtype: torch.dtype) -> list[Path]:
    items = [(name, tensor.to(dtype)) for name, tensor in model.state_dict().items()]
    paths = [folder / "a.safetensors", folder / "b.safetensors"]
    for path, part in zip(paths, (items[::2], items[1::2]), strict=True):
        save_file(dict(part), path)
    return paths


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_module_equals_the_whole_model(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    model = make_model(name)
    paths = save_in_two_files(model, tmp_path, dtype)
    pixels = torch.randn(2, 3, 64, 64)
    if dtype == torch.bfloat16:
        # weights rounded, computation in float32
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype).float()
    with TensorFiles(paths) as files, torch.no_grad():
        streamed = build_streamed_module(lambda: type(model)(model.config), files)
        for _ in range(2):
            output, expected = streamed(pixels)[1 - (name == "clip")], model(pixels)
            expected = expected[1 - (name == "clip")]
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    assert all(parameter.is_meta for parameter in streamed.parameters())
    assert expected.std() > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_of_the_files_is_read_once(tmp_path: Path, name: str) -> None:
    model = make_model(name)
    pixels = torch.randn(1, 3, 64, 64)
    read_names: list[str] = []
    with TensorFiles(save_in_two_files(model, tmp_path, torch.float32)) as files, torch.no_grad():
        read = files.read
        files.read = lambda name: read_names.append(name) or read(name)  # type: ignore[method-assign]
        build_streamed_module(lambda: type(model)(model.config), files)(pixels)
    assert sorted(read_names) == sorted(model.state_dict())


def test_a_failure_leaves_no_weights_behind(tmp_path: Path) -> None:
    model = make_model("siglip")
    with TensorFiles(save_in_two_files(model, tmp_path, torch.float32)) as files:
        streamed = build_streamed_module(lambda: type(model)(model.config), files)
        with pytest.raises(RuntimeError), torch.no_grad():
            streamed(torch.randn(1, 4, 64, 64))  # fails inside of a layer
    assert all(parameter.is_meta for parameter in streamed.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"lacks post_layernorm.bias; give the encoder's own file"),
        ("unknown", r"has unknown tensors text.weight; give"),
        ("shape", r"post_layernorm.bias is \[63\], \[64\] expected; give"),
        ("all", r"lacks .*, .*, .* and \d+ more; give"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, change: str, message: str) -> None:
    model = make_model("siglip")
    tensors = dict(model.state_dict())
    if change == "missing":
        del tensors["post_layernorm.bias"]
    elif change == "unknown":
        tensors["text.weight"] = torch.zeros(1)
    elif change == "shape":
        tensors["post_layernorm.bias"] = torch.zeros(63)
    else:
        tensors = {"a": torch.zeros(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    with (
        TensorFiles([tmp_path / "model.safetensors"]) as files,
        pytest.raises(ModelLoadError, match=message),
    ):
        build_streamed_module(lambda: type(model)(model.config), files)


def test_tensors_of_other_parts_are_skipped(tmp_path: Path) -> None:
    model = make_model("clip")
    tensors = model.state_dict() | {"text_model.weight": torch.zeros(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    pixels = torch.randn(1, 3, 64, 64)
    with TensorFiles([tmp_path / "model.safetensors"]) as files, torch.no_grad():
        streamed = build_streamed_module(
            lambda: type(model)(model.config),
            files,
            rename_fn=lambda name: None if name.startswith("text_model.") else name,
        )
        torch.testing.assert_close(streamed(pixels)[0], model(pixels)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0{", None])
def test_files_that_are_not_whole_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.safetensors"
    if content is None:
        save_file({"a": torch.zeros(1000)}, path)
        content = path.read_bytes()[:-4]
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"model.safetensors is not whole .*: fetch it again"):
        TensorFiles([path])
    with pytest.raises(ModelLoadError, match="there is no file"):
        TensorFiles([tmp_path / "absent.safetensors"])


def test_choose_encoder_dtype_follows_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, dtype in (
        ({}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capabilities: c)
        assert choose_encoder_dtype(torch.device("cpu")) == dtype
