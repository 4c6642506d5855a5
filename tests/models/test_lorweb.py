"""LoRWeB's mixer against its formula, and its layers against FLUX.1."""

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from hyperlora.errors import ModelLoadError
from hyperlora.models.lorweb import list_lorweb_targets, mix_lorweb

NUM_BASIS, RANK, KEY_DIM, EMBEDDING_DIM = 6, 2, 5, 7
WIDTHS = {
    "transformer_blocks.0.attn.to_q": (12, 12),
    "single_transformer_blocks.1.proj_out": (20, 9),
}
TAILS = {
    "plain": ("lora_A", "lora_B", "lora_keys", "lora_to_q.weight"),
    "renamed": ("att_lora_A", "att_lora_B", "att_lora_keys", "att_lora_to_q.weight"),
    "weights": ("lora_A.weight", "lora_B.weight", "lora_keys.weight", "lora_to_q.weight"),
}


def make_tensors(tails: tuple[str, ...], **widths: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for path, (in_features, out_features) in (widths or WIDTHS).items():
        shapes = (
            (NUM_BASIS, in_features, RANK),
            (NUM_BASIS, RANK, out_features),
            (NUM_BASIS, KEY_DIM),
            (KEY_DIM, 3 * EMBEDDING_DIM),
        )
        for tail, shape in zip(tails, shapes, strict=True):
            tensors[f"transformer.{path}.{tail}"] = torch.randn(shape, generator=generator)
    return tensors


def get_shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def compute_delta(tensors: dict[str, Tensor], path: str, images: Tensor) -> Tensor:
    """ΔW [out, in] by the sum of the formula."""
    a, b, keys, to_q = (tensors[f"transformer.{path}.{tail}"] for tail in TAILS["plain"])
    weights = torch.softmax(to_q @ images.flatten() @ keys.T / KEY_DIM**0.5, 0)
    return sum(w * (a_n @ b_n).T for w, a_n, b_n in zip(weights, a, b, strict=True))


@pytest.mark.parametrize("tails", TAILS)
def test_mix_lorweb_equals_the_sum_over_the_basis(tails: str) -> None:
    tensors, images = make_tensors(TAILS[tails]), torch.randn(3, EMBEDDING_DIM)
    targets = list_lorweb_targets(get_shapes(tensors), "file")
    lora = mix_lorweb(targets, tensors.__getitem__, images, "base")
    assert lora.layout.rank == NUM_BASIS * RANK
    assert [target.path for target in lora.layout.targets] == list(WIDTHS)
    plain = make_tensors(TAILS["plain"])
    for path, delta in zip(WIDTHS, lora.get_delta_weights(), strict=True):
        expected = compute_delta(plain, path, images)
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-5)


def test_images_change_the_lora_and_their_order_matters() -> None:
    tensors, images = make_tensors(TAILS["plain"]), torch.randn(3, EMBEDDING_DIM)
    targets = list_lorweb_targets(get_shapes(tensors), "file")
    deltas = [
        mix_lorweb(targets, tensors.__getitem__, query, "base").get_delta_weights()[0]
        for query in (images, images.flip(0))
    ]
    assert (deltas[0] - deltas[1]).abs().max() > 0.01


def test_rank_is_reduced_by_the_best_approximation() -> None:
    tensors, images = make_tensors(TAILS["plain"]), torch.randn(3, EMBEDDING_DIM)
    targets = list_lorweb_targets(get_shapes(tensors), "file")
    exact = mix_lorweb(targets, tensors.__getitem__, images, "base")
    small = mix_lorweb(targets, tensors.__getitem__, images, "base", rank=3)
    assert small.layout.rank == 3
    for delta, expected in zip(
        small.get_delta_weights(), exact.resize(3).get_delta_weights(), strict=True
    ):
        torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-5)
        singular_values = torch.linalg.svdvals(expected)
        assert (singular_values > 1e-4).sum() == 3


def test_alpha_scales_by_the_rank_of_one_basis_lora() -> None:
    tensors, images = make_tensors(TAILS["plain"]), torch.randn(3, EMBEDDING_DIM)
    scaled = tensors | {f"transformer.{path}.alpha": torch.tensor(1.0) for path in WIDTHS}
    plain, halved = (
        mix_lorweb(list_lorweb_targets(get_shapes(t), "file"), t.__getitem__, images, "base")
        for t in (tensors, scaled)
    )
    torch.testing.assert_close((plain * (1 / RANK)).up[0], halved.up[0])


def test_layers_are_those_of_flux() -> None:
    with torch.device("meta"):
        transformer = diffusers.FluxTransformer2DModel(guidance_embeds=True)
    linears = {
        path: (layer.in_features, layer.out_features)
        for path, layer in transformer.named_modules()
        if isinstance(layer, nn.Linear) and "transformer_blocks." in path
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(linears):
        in_features, out_features = linears[path]
        for tail, shape in zip(
            TAILS["plain"],
            ((32, in_features, 4), (32, 4, out_features), (32, 128), (128, 2304)),
            strict=True,
        ):
            shapes[f"transformer.{path}.{tail}"] = shape
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 835_051_520
    targets = list_lorweb_targets(shapes, "file")
    assert len(targets) == 494 and {(t.rank, t.embedding_dim) for t in targets} == {(128, 768)}
    found = {t.target.path: (t.target.in_features, t.target.out_features) for t in targets}
    assert list(found.items()) == list(linears.items())  # also in the order of the modules


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "empty", "other rank"])
def test_other_tensors_are_refused(change: str) -> None:
    shapes = get_shapes(make_tensors(TAILS["plain"]))
    prefix = "transformer.single_transformer_blocks.1.proj_out"
    if change == "missing":
        del shapes[f"{prefix}.lora_keys"]
    elif change == "unknown":
        shapes["model.weight"] = (3,)
    elif change == "shape":
        shapes[f"{prefix}.lora_to_q.weight"] = (KEY_DIM, 20)
    elif change == "other rank":
        shapes[f"{prefix}.lora_A"], shapes[f"{prefix}.lora_B"] = (6, 20, 3), (6, 3, 9)
    else:
        shapes = {}
    with pytest.raises(ModelLoadError, match=r"^file is no LoRWeB network.*give the network's own"):
        list_lorweb_targets(shapes, "file")
