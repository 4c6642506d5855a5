"""``LoraLayout``: fingerprints, conversions, and errors for layouts that do not match."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hyperlora.errors import LayoutMismatchError
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.pretrained import AVATARS_DIR

LAYOUT = LoraLayout(
    (
        TargetModule("unet.a", 3, 5),
        TargetModule("unet.b.c", 18, 4, (3, 3)),
        TargetModule("text_encoder.d", 2, 2),
    ),
    4,
    "base/one",
)

TARGETS = st.builds(
    TargetModule,
    st.from_regex(r"[a-z]{1,4}(\.[a-z0-9_]{1,5}){1,3}", fullmatch=True),
    st.integers(1, 9),
    st.integers(1, 9),
    st.none() | st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
LAYOUTS = st.builds(
    LoraLayout,
    st.lists(TARGETS, min_size=1, max_size=5, unique_by=lambda target: target.name).map(tuple),
    st.integers(1, 8),
    st.text(),
)


@pytest.mark.parametrize(
    ("model", "fingerprint"),
    [
        ("image-to-lora", "f5c262f1abd5444c"),
        ("lora-diffusion", "f5c262f1abd5444c"),
        ("pair-to-lora", "b85566f0569b280a"),
    ],
)
def test_fingerprint_of_released_layouts_is_fixed(model: str, fingerprint: str) -> None:
    layout = json.loads((AVATARS_DIR / model / "layout.json").read_text())
    assert LoraLayout.from_dict(layout).fingerprint == fingerprint


def test_fingerprint_hashes_a_fixed_encoding() -> None:
    assert LAYOUT.fingerprint == "5205009e8d406217"


def test_init_std_is_the_root_of_the_mean_width() -> None:
    assert LAYOUT.init_std == pytest.approx(((3 + 18 + 2) / 3) ** -0.5)


@given(LAYOUTS)
def test_from_dict_inverts_to_dict_through_json(layout: LoraLayout) -> None:
    restored = LoraLayout.from_dict(json.loads(json.dumps(layout.to_dict())))
    assert restored == layout
    assert restored.fingerprint == layout.fingerprint


@pytest.mark.parametrize(
    "changed_layout",
    [
        replace(LAYOUT, rank=5),
        replace(LAYOUT, base="base/two"),
        replace(LAYOUT, targets=LAYOUT.targets[::-1]),
        replace(LAYOUT, targets=LAYOUT.targets[:-1]),
        replace(LAYOUT, targets=(replace(LAYOUT.targets[0], in_features=4), *LAYOUT.targets[1:])),
        replace(LAYOUT, targets=(replace(LAYOUT.targets[0], name="unet.z"), *LAYOUT.targets[1:])),
        replace(
            LAYOUT,
            targets=(
                LAYOUT.targets[0],
                replace(LAYOUT.targets[1], kernel_size=(1, 1)),
                LAYOUT.targets[2],
            ),
        ),
    ],
)
def test_fingerprint_and_check_compatible_detect_every_change(changed_layout: LoraLayout) -> None:
    assert changed_layout.fingerprint != LAYOUT.fingerprint
    with pytest.raises(LayoutMismatchError):
        LAYOUT.check_compatible(changed_layout)


def test_check_compatible_names_the_difference() -> None:
    LAYOUT.check_compatible(LoraLayout.from_dict(LAYOUT.to_dict()))
    LAYOUT.check_compatible(LAYOUT.with_rank(9), ignore_rank=True)
    with pytest.raises(LayoutMismatchError, match="base 'other', this base is 'base/one'"):
        LAYOUT.check_compatible(replace(LAYOUT, base="other"))
    with pytest.raises(
        LayoutMismatchError, match=r"has 2 targets, 3 expected; 1 differ, e\.g\. text_encoder\.d"
    ):
        LAYOUT.check_compatible(replace(LAYOUT, targets=LAYOUT.targets[:2]))
    with pytest.raises(
        LayoutMismatchError, match=r"target unet\.a is 7→5 in the LoRA, 3→5 expected"
    ):
        LAYOUT.check_compatible(
            replace(LAYOUT, targets=(TargetModule("unet.a", 7, 5), *LAYOUT.targets[1:]))
        )
    with pytest.raises(LayoutMismatchError, match="rank 9, rank 4 expected"):
        LAYOUT.check_compatible(LAYOUT.with_rank(9))


def test_from_module_finds_linear_and_conv_layers() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Conv2d(2, 7, (3, 1)), nn.Linear(4, 4))
    layout = LoraLayout.from_module(module, "net", lambda path: path != "3", rank=2, base="b")
    assert layout.targets == (TargetModule("net.0", 3, 5), TargetModule("net.2", 6, 7, (3, 1)))
    assert layout.numel == 2 * (3 + 5) + 2 * (6 + 7)
    with pytest.raises(LayoutMismatchError, match="Sequential"):
        LoraLayout.from_module(module, "net", lambda path: False, rank=2, base="b")


def test_from_module_works_on_the_meta_device() -> None:
    with torch.device("meta"):
        module = nn.Linear(10**6, 10**6)
    assert (
        LoraLayout.from_module(nn.ModuleDict({"x": module}), "net", lambda _: True, 1, "b").numel
        == 2 * 10**6
    )


def test_add_joins_components() -> None:
    unet, text = (
        replace(LAYOUT, targets=LAYOUT.targets[:2]),
        replace(LAYOUT, targets=LAYOUT.targets[2:]),
    )
    assert unet + text == LAYOUT
    assert LAYOUT.components == ("unet", "text_encoder")
    with pytest.raises(LayoutMismatchError):
        unet + text.with_rank(8)
