"""``LoraMetadata`` for galleries, kohya's tools and hyperlora, and back."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperlora.errors import InvalidArgumentError, InvalidLoraFileError
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.save import save_lora
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.weights import LoraWeights

LAYOUT = LoraLayout((TargetModule("unet.mid_block.attentions.0.proj_in", 3, 4),), 2, "org/base")
FULL = LoraMetadata(
    title="Ada",
    base_model="org/base",
    architecture="stable-diffusion-v1",
    resolution=(512, 768),
    trigger_phrase="sks person",
    license="CC0-1.0",
    date="2026-01-02",
    generator="hyperlora image-to-lora",
    generator_version="9.9",
    layout_fingerprint=LAYOUT.fingerprint,
    encoder="org/encoder",
    encoder_license="MIT",
    reference_sha256=("aa", "bb"),
    recommended_strength=0.8,
    extra={"modelspec.author": "Ada", "note": "hello"},
)
TEXTS = st.text(max_size=20)


def test_save_lora_keeps_metadata_and_sets_base_and_fingerprint(tmp_path: Path) -> None:
    path = save_lora(LoraWeights.zeros(LAYOUT), tmp_path / "x.safetensors", metadata=FULL)
    assert load_lora(path).metadata == replace(FULL, output_name="x")
    bare = load_lora(save_lora(LoraWeights.zeros(LAYOUT), tmp_path / "y.safetensors")).metadata
    assert (bare.base_model, bare.layout_fingerprint) == ("org/base", LAYOUT.fingerprint)
    assert bare.title
    assert bare.date
    assert bare.generator_version


def test_to_safetensors_metadata_has_keys_of_every_tool() -> None:
    metadata = FULL.to_safetensors_metadata(LAYOUT)
    assert all(isinstance(value, str) for value in metadata.values())
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["modelspec.implementation"] == "diffusers"
    assert metadata["modelspec.title"] == "Ada"
    assert metadata["modelspec.resolution"] == "512x768"
    assert metadata["modelspec.date"] == "2026-01-02"
    assert metadata["modelspec.trigger_phrase"] == "sks person"
    assert metadata["modelspec.license"] == "CC0-1.0"
    assert metadata["ss_v2"] == "False"
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["ss_network_module"] == "networks.lora"
    assert (metadata["ss_network_dim"], float(metadata["ss_network_alpha"])) == ("2", 2.0)
    assert json.loads(metadata["ss_network_args"]) == {}
    assert metadata["hyperlora.base"] == "org/base"
    assert metadata["hyperlora.layout_fingerprint"] == LAYOUT.fingerprint
    assert metadata["note"] == "hello"
    conv = LoraLayout((TargetModule("unet.conv_in", 9, 4, (3, 3)),), 2, "b")
    assert json.loads(FULL.to_safetensors_metadata(conv)["ss_network_args"]) == {
        "conv_dim": 2,
        "conv_alpha": 2.0,
    }


@given(
    st.builds(
        LoraMetadata,
        title=TEXTS,
        base_model=TEXTS.filter(bool),
        architecture=st.sampled_from(
            ["", "stable-diffusion-v1", "stable-diffusion-xl-v1-base", "sana"]
        ),
        resolution=st.none() | st.tuples(st.integers(1, 9999), st.integers(1, 9999)),
        trigger_phrase=TEXTS,
        license=TEXTS,
        date=TEXTS,
        generator=TEXTS,
        generator_version=TEXTS,
        layout_fingerprint=TEXTS,
        encoder=TEXTS,
        encoder_license=TEXTS,
        reference_sha256=st.lists(TEXTS).map(tuple),
        recommended_strength=st.floats(-2, 2),
        extra=st.dictionaries(st.text("abc.", min_size=1), TEXTS),
    )
)
def test_from_safetensors_metadata_inverts_to_safetensors_metadata(
    metadata: LoraMetadata,
) -> None:
    strings = metadata.to_safetensors_metadata(LAYOUT)
    assert LoraMetadata.from_safetensors_metadata(strings) == metadata


def test_from_safetensors_metadata_reads_other_tools() -> None:
    foreign = LoraMetadata.from_safetensors_metadata(
        {
            "ss_base_model_version": "sdxl_base_v1-0",
            "ss_sd_model_name": "sdxl.safetensors",
            "modelspec.resolution": "big",
        }
    )
    assert foreign.architecture == "stable-diffusion-xl-v1-base"
    assert (foreign.base_model, foreign.extra["ss_sd_model_name"]) == ("", "sdxl.safetensors")
    assert foreign.resolution is None
    assert LoraMetadata.from_safetensors_metadata({}).title == ""


def test_metadata_refuses_reserved_and_malformed_keys() -> None:
    with pytest.raises(InvalidArgumentError, match=r"'modelspec\.title' is reserved"):
        LoraMetadata(extra={"modelspec.title": "x"}).to_safetensors_metadata(LAYOUT)
    for key, value in {
        "hyperlora.recommended_strength": "nan",
        "hyperlora.reference_sha256": "[1]",
    }.items():
        with pytest.raises(InvalidLoraFileError, match="malformed"):
            LoraMetadata.from_safetensors_metadata({key: value})
    with pytest.raises(InvalidLoraFileError, match="malformed"):
        LoraMetadata.from_safetensors_metadata({"hyperlora.recommended_strength": "strong"})
