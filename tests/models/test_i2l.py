"""The i2L decoder against its authors' output, and against the bases it is for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hyperlora.errors import InvalidArgumentError, ModelLoadError
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.i2l import (
    I2lConfig,
    compute_shape_digest,
    decode_i2l,
    infer_i2l_config,
    make_qwen_image_config,
    make_z_image_config,
)

GOLDEN = Path(__file__).parents[1] / "golden"
RELEASED = {
    "z-image": (make_z_image_config(3840, 10240, 30, 2, 128), 952, "9510cb8c"),
    "style": (make_qwen_image_config(3072, 60, 64), 2880, "0aad5146"),
    "coarse": (make_qwen_image_config(3072, 60, 128, 71, 1024), 3360, "a166c334"),
    "fine": (make_qwen_image_config(3072, 60, 128, 1376, 64), 3360, "a5476e69"),
}


def get_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def name_factors(lora: LoraWeights) -> dict[str, Tensor]:
    """Factors by the keys of the authors' files."""
    factors = {}
    for target, down, up in zip(lora.layout.targets, lora.down, lora.up, strict=True):
        factors[f"{target.path}.lora_A.default.weight"] = down
        factors[f"{target.path}.lora_B.default.weight"] = up
    return factors


def make_random_tensors(config: I2lConfig, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        for name, shape in config.tensor_shapes.items()
    }


@pytest.mark.parametrize("num_images", [1, 3])
def test_decode_i2l_equals_the_authors_network(num_images: int) -> None:
    folder = GOLDEN / f"z-image-i2l-tiny-{num_images}"
    tensors = load_file(folder / "model.safetensors")
    embeddings = load_file(folder / "inputs.safetensors")["embeddings"]
    expected = load_file(folder / "expected-lora.safetensors")
    sizes = json.loads((folder / "sizes.json").read_text())
    config = infer_i2l_config(get_shapes(tensors), "model.safetensors")
    assert config.bottleneck_dim == sizes["compress"]
    assert config.num_blocks == (sizes["refiner_layers"], sizes["refiner_layers"], sizes["layers"])
    factors = name_factors(decode_i2l(config, tensors.__getitem__, embeddings, "tiny"))
    assert factors.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(factors[key], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", RELEASED)
def test_names_and_shapes_are_those_of_the_released_files(name: str) -> None:
    config, num_tensors, digest = RELEASED[name]
    assert len(config.tensor_shapes) == num_tensors
    assert compute_shape_digest(config.tensor_shapes).startswith(digest)
    assert infer_i2l_config(config.tensor_shapes, "model.safetensors") == config


@pytest.mark.parametrize(
    ("name", "class_name", "num_targets"),
    [("z-image", "ZImageTransformer2DModel", 238), ("style", "QwenImageTransformer2DModel", 720)],
)
def test_every_target_exists_in_the_base(name: str, class_name: str, num_targets: int) -> None:
    with torch.device("meta"):
        transformer = getattr(diffusers, class_name)()
    layout = RELEASED[name][0].make_layout(2, "base")
    assert len(layout.targets) == num_targets and layout.rank == 8
    linears = {
        path: (layer.in_features, layer.out_features)
        for path, layer in transformer.named_modules()
        if isinstance(layer, nn.Linear)
    }
    shapes = {target.path: (target.in_features, target.out_features) for target in layout.targets}
    assert shapes.items() <= linears.items()
    # in the order of the base's modules, as in layouts of presets
    assert list(shapes) == [path for path in linears if path in shapes]


@pytest.mark.parametrize("num_images", [1, 2])
def test_tokens_add_one_bias_per_group(num_images: int) -> None:
    config = make_qwen_image_config(8, 2, 3, num_tokens=5, token_bottleneck_dim=2)
    tensors = make_random_tensors(config)
    embeddings, tokens = torch.randn(num_images, 5632), torch.randn(num_images, 5, 3584)
    lora = decode_i2l(config, tensors.__getitem__, embeddings, "tiny", tokens)
    factors = name_factors(lora)
    # the second of two blocks of the second of four groups is block 1 * 2 + 1
    block = "blocks.3"
    features = (0.05 * tokens @ tensors[f"{block}.proj_residual.proj_in.weight"].T).flatten(1)
    bias = features @ tensors[f"{block}.proj_residual.proj_out.weight"].T
    for j, (target, sizes) in enumerate({"img_mlp.net.2": (32, 8), "img_mod.1": (8, 48)}.items()):
        outputs = []
        for name in "ab":
            layer = f"{block}.layers.{j}.proj_{name}"
            hidden = embeddings @ tensors[f"{layer}.proj_in.weight"].T + bias
            outputs.append(hidden @ tensors[f"{layer}.proj_out.weight"].T)
        key = f"transformer_blocks.1.{target}"
        expected_delta = sum(
            b.view(sizes[1], 4) @ a.view(4, sizes[0]) for a, b in zip(*outputs, strict=True)
        )
        delta = factors[f"{key}.lora_B.default.weight"] @ factors[f"{key}.lora_A.default.weight"]
        torch.testing.assert_close(delta, expected_delta / num_images, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("num_tokens", "given"), [(5, None), (0, torch.zeros(1, 5, 3584))], ids=["needed", "unknown"]
)
def test_tokens_are_needed_or_refused(num_tokens: int, given: Any) -> None:
    config = make_qwen_image_config(8, 1, 3, num_tokens, 2 if num_tokens else 0)
    tensors = make_random_tensors(config)
    with pytest.raises(InvalidArgumentError, match="tokens per image"):
        decode_i2l(config, tensors.__getitem__, torch.randn(1, 5632), "tiny", given)


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "no blocks"])
def test_other_tensors_are_refused(change: str) -> None:
    shapes = dict(make_z_image_config(16, 32, 3, 1, 2).tensor_shapes)
    name = "layers_lora.blocks.4.layers.1.proj_b.proj_out.weight"
    if change == "missing":
        del shapes[name]
    elif change == "extra":
        shapes["layers_lora.norm.weight"] = (16,)
    elif change == "shape":
        shapes[name] = (63, 2)
    else:
        shapes = {"blocks.0.weight": (3, 3)}
    with pytest.raises(ModelLoadError, match=r"^file is no i2L network.*give the network's own"):
        infer_i2l_config(shapes, "file")
