"""Modules of transformers' LoRA files as targets with their rows."""

import logging

import pytest
import torch

from hyperlora.lora.io.converters import (
    CONVERTERS,
    Converter,
    Piece,
    convert_module,
    has_expected_ratio,
    split_rows,
)

FLUX, FLUX_2, Z_IMAGE = (
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "ZImageTransformer2DModel",
)
QWEN_21 = "QwenImage21Transformer2DModel"
BLOCK, SINGLE_BLOCK = "transformer_blocks.3.attn", "single_transformer_blocks.12"


def convert(class_name: str, path: str, num_rows: int, num_columns: int) -> dict[str, list[int]]:
    """Rows by target; those of a whole layer as an empty list."""
    pieces = convert_module(CONVERTERS[class_name], path, num_rows, num_columns)
    return {p.name: [] if p.rows is None else p.rows.tolist() for p in pieces}


@pytest.mark.parametrize("path", ["double_blocks_3_img_attn_qkv", "double_blocks.3.img_attn.qkv"])
@pytest.mark.parametrize(
    ("num_rows", "num_columns", "widths"),
    [
        (6, 2, (2, 2, 2)),
        (10, 6, (6, 2, 2)),
        (9, 3, (3, 3, 3)),
        (7, 2, (3, 2, 2)),
        (8, 2, (2, 3, 3)),
        (3, 4, (3, 0, 0)),
    ],
)
def test_fused_attention_is_split_by_rows(
    path: str, num_rows: int, num_columns: int, widths: tuple[int, ...]
) -> None:
    """Equal thirds; where keys and values of grouped queries are fewer, half of the rest each."""
    rows = iter(range(num_rows))
    expected = {
        f"{BLOCK}.to_{part}": [next(rows) for _ in range(width)]
        for part, width in zip("qkv", widths, strict=True)
    }
    assert convert(FLUX, path, num_rows, num_columns) == expected


@pytest.mark.parametrize(("num_rows", "mlp_rows"), [(14, range(6, 14)), (5, [])])
def test_fused_mlp_has_the_rows_after_attention(num_rows: int, mlp_rows: range) -> None:
    pieces = convert_module(CONVERTERS[FLUX], "single_blocks.12.linear1", num_rows, 2)
    expected = {f"{SINGLE_BLOCK}.attn.to_{p}": [2 * i, 2 * i + 1] for i, p in enumerate("qkv")}
    expected[f"{SINGLE_BLOCK}.proj_mlp"] = list(mlp_rows)
    assert {p.name: p.rows.tolist() for p in pieces if p.rows is not None} == expected


def test_whole_layers_have_no_rows() -> None:
    pieces = convert_module(CONVERTERS[FLUX], "single_blocks.12.linear2", 5, 2)
    assert pieces == [Piece(f"{SINGLE_BLOCK}.proj_out")] and pieces[0].rows is None
    names = "transformer_blocks.0.img_mlp.gate_layer", "transformer_blocks.0.img_mlp.proj"
    halves = dict(zip(names, ([0, 1], [2, 3, 4]), strict=True))
    assert convert(QWEN_21, "transformer_blocks.0.img_mlp.gate_up", 5, 2) == halves


@pytest.mark.parametrize(
    ("class_name", "path", "expected"),
    [
        (FLUX, "img_in", {"x_embedder": range(6)}),
        (FLUX, "double_blocks.3.processor.proj_lora1", {f"{BLOCK}.to_out.0": range(6)}),
        (
            FLUX,
            "double_blocks.3.processor.qkv_lora1",
            {f"{BLOCK}.to_{p}": range(2 * i, 2 * i + 2) for i, p in enumerate("qkv")},
        ),
        (
            Z_IMAGE,
            "layers.0.attention.qkv",
            {f"layers.0.attention.to_{p}": range(2 * i, 2 * i + 2) for i, p in enumerate("qkv")},
        ),
        (Z_IMAGE, "layers_0_attention_to_q", {"layers.0.attention.to_q": range(6)}),
        ("Krea2Transformer2DModel", "first", {"img_in": range(6)}),
        (FLUX, "nonsense", {}),
        (FLUX, "transformer_blocks.0.attn.to_q", {}),
        ("ChromaTransformer2DModel", "distilled_guidance_layer.in_proj", {}),
    ],
)
def test_other_modules_are_converted_by_diffusers(
    class_name: str, path: str, expected: dict[str, range]
) -> None:
    rows = {name: list(row_range) for name, row_range in expected.items()}
    assert convert(class_name, path, 6, 2) == rows


def test_modules_that_diffusers_does_not_know_are_not_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("diffusers.loaders.lora_conversion_utils")
    logger.addHandler(caplog.handler)
    for was_disabled in (True, False):
        monkeypatch.setattr(logger, "disabled", was_disabled)
        for name in CONVERTERS:
            assert convert(name, "nonsense", 6, 2) in ({}, {"nonsense": list(range(6))})
        assert logger.disabled is was_disabled and not caplog.records
    logger.removeHandler(caplog.handler)


def test_split_rows_gives_consecutive_rows() -> None:
    pieces = split_rows(["a", "b", "c"], [2, 0, 3])
    assert [piece.name for piece in pieces] == ["a", "b", "c"]
    rows = [piece.rows for piece in pieces]
    assert all(map(torch.equal, rows, torch.arange(5).split([2, 0, 3])))
    assert split_rows(["a"], [4]) == [Piece("a", None)]
    with pytest.raises(ValueError, match="zip"):
        split_rows(["a", "b", "c"], [1, 1])


@pytest.mark.parametrize(
    ("family", "path", "ratios"),
    [
        *((f, "single_blocks.1.linear1", ((7, 1),)) for f in ("FLUX.1", "Chroma")),
        *((f, "single_blocks_1_linear2", ((1, 5),)) for f in ("FLUX.1", "Chroma")),
        ("FLUX.1", "double_blocks.1.img_mlp.0", ((4, 1),)),
        ("FLUX.1", "double_blocks.1.img_mlp.2", ((1, 4),)),
        ("FLUX.2", "single_blocks.1.linear1", ((9, 1),)),
        ("FLUX.2", "double_blocks.1.txt_mlp.0", ((6, 1),)),
        ("FLUX.2", "double_blocks.1.txt_mlp.2", ((1, 3),)),
        ("Z-Image", "layers.0.attention.qkv", ((3, 1),)),
        ("Lumina 2", "layers.0.attention.qkv", ((5, 3),)),
        ("Lumina 2", "linear1.attention.out", ((5, 3), (3, 1), (1, 7))),
        ("SD3", "single_blocks.1.linear1", ((9, 1), (7, 1), (2, 3))),
    ],
)
def test_expected_ratio_tells_families_apart(
    family: str, path: str, ratios: tuple[tuple[int, int], ...]
) -> None:
    """Rows by columns of the weight, at any width."""
    is_known = len(ratios) == 1
    for rows, columns in ratios:
        for width in (1, 8):
            assert has_expected_ratio(family, path, rows * width, columns * width)
            other_shapes = (rows * width + 1, columns * width), (rows * width, columns * width + 1)
            for shape in (*other_shapes, (columns * width, rows * width)):
                assert has_expected_ratio(family, path, *shape) is not is_known


KEY = "transformer.blocks.0.{}.lora_{}.weight"


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ({"q": ([0, 2], True), "k": ([3, 1], True)}, {"blocks.0.q": [0, 2], "blocks.0.k": [3, 1]}),
        ({"q": ([0, 2], True), "k": ([3, 1], False)}, {}),
        ({"q": ([0, 2], True), "k": ([3], True)}, {}),
        ({"q": ([0, 2], True), "k": ([3, 2, 1], True)}, {}),
        ({}, {}),
    ],
    ids=["all rows", "no down", "a row less", "a row twice", "nothing"],
)
def test_converters_must_return_every_row_once_in_whole_loras(
    factors: dict[str, tuple[list[int], bool]],
    expected: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from diffusers.loaders import lora_pipeline

    class Mixin:
        @staticmethod
        def lora_state_dict(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            """Split the rows of a LoRA of rank 1 and one column."""
            down, up = state_dict.values()
            if (up @ down.to(up)).shape != (4, 1):
                raise ValueError(down.shape)
            converted = {}
            for name, (rows, has_down) in factors.items():
                converted |= {KEY.format(name, "A"): down} if has_down else {}
                converted[KEY.format(name, "B")] = up[rows] + 1e-9
            return converted

    monkeypatch.setattr(lora_pipeline, "TinyMixin", Mixin, raising=False)
    pieces = convert_module(Converter("TinyMixin", "tiny"), "blocks.0.qk", 4, 2)
    assert {p.name: p.rows.tolist() for p in pieces if p.rows is not None} == expected
