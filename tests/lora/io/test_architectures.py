"""Names of architectures in headers, and LoRAs of architectures that do not fit each other."""

import pytest

from hyperlora.diffusion.families.base import PipelineFamily
from hyperlora.diffusion.families.registry import FAMILIES, get_pipeline_family
from hyperlora.errors import LayoutMismatchError
from hyperlora.lora.io.architectures import (
    ARCHITECTURES,
    Architecture,
    check_same_architecture,
    find_architecture,
    get_network_module,
    parse_architecture,
)
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.layout import LoraLayout, TargetModule
from tests.tiny_pipelines import FACTORIES

UNET = LoraLayout((TargetModule("unet.mid_block.attentions.0.proj_in", 4, 4),), 2, "unknown")
DIT = LoraLayout((TargetModule("transformer.transformer_blocks.0.attn.to_q", 4, 4),), 2, "unknown")
TEXT = LoraLayout(
    (TargetModule("text_encoder.encoder.layers.0.self_attn.q_proj", 4, 4),), 2, "unknown"
)


def make_cross_attention(width: int) -> LoraLayout:
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    return LoraLayout((TargetModule(name, width, 640),), 2, "unknown")


@pytest.mark.parametrize(
    "family", [*dict.fromkeys(FAMILIES.values())], ids=lambda family: family.__name__
)
def test_every_family_has_its_names_in_the_table(family: type[PipelineFamily]) -> None:
    entry = ARCHITECTURES[family.modelspec_name]
    assert entry.base_version
    assert find_architecture(entry.name) is entry
    metadata = LoraMetadata(architecture=entry.name).to_safetensors_metadata(DIT)
    assert metadata["modelspec.architecture"] == f"{entry.name}/lora"
    assert metadata["ss_base_model_version"] == entry.base_version
    assert metadata.get("ss_network_module", "") == entry.network_module
    assert parse_architecture(metadata) == entry.name


@pytest.mark.parametrize("entry", ARCHITECTURES.values(), ids=lambda entry: entry.name)
def test_find_architecture_reads_both_names_of_each_entry(entry: Architecture) -> None:
    found = find_architecture(entry.base_version)
    assert (found.group, found.network_module) == (entry.group, entry.network_module)
    assert find_architecture(entry.name) is entry


@pytest.mark.parametrize(
    ("metadata", "architecture"),
    [
        ({"ss_base_model_version": "sd_1.5"}, "stable-diffusion-v1"),
        ({"ss_base_model_version": "sd_v2_v"}, "stable-diffusion-v2-768-v"),
        ({"ss_base_model_version": "sdxl_"}, "stable-diffusion-xl-v1-base"),
        ({"modelspec.architecture": "stable-diffusion-v1-lora"}, "stable-diffusion-v1"),
        (
            {"modelspec.architecture": "stable-diffusion-v3-medium/lora"},
            "stable-diffusion-3-3-medium",
        ),
        (
            {"modelspec.architecture": "stable-diffusion-v3.5-large/lora"},
            "stable-diffusion-3-3-5-large",
        ),
        ({"modelspec.architecture": "Flux.1-dev/lora"}, "flux-1-dev"),
        (
            {"modelspec.architecture": "unknown/lora", "ss_base_model_version": "flux1"},
            "flux-1-dev",
        ),
        ({"modelspec.architecture": "qwen-image/lora"}, "Qwen-Image"),
        ({"ss_base_model_version": "flux_2_klein_9b"}, "Flux.2-klein-9b"),
        ({"ss_network_module": "networks.lora_lumina"}, "lumina-2"),
        ({"ss_network_module": "networks.lora"}, ""),
        ({"ss_v2": "True"}, "stable-diffusion-v2-512"),
        ({"modelspec.architecture": "sana/lora"}, "sana"),
        ({"ss_sd_model_name": "sdxl.safetensors"}, ""),
    ],
)
def test_parse_architecture_reads_every_tools_spelling(
    metadata: dict[str, str], architecture: str
) -> None:
    assert parse_architecture(metadata) == architecture


def test_get_network_module_of_unknown_bases_is_kohyas_for_unets_alone() -> None:
    assert get_network_module("", UNET) == "networks.lora"
    assert get_network_module("", DIT) == ""
    assert get_network_module("hidream-i1", DIT) == ""


def test_check_same_architecture_goes_by_header_then_shapes_then_denoiser() -> None:
    check_same_architecture("a", "sd_v1", UNET, ("b", "stable-diffusion-v1", UNET))
    check_same_architecture("a", "", UNET, ("b", "sdxl_base_v1-0", UNET))
    check_same_architecture("a", "flux-1-dev", DIT, ("b", "flux-1-schnell", DIT))
    check_same_architecture("a", "sd_v1", UNET, ("b", "sana", UNET))
    check_same_architecture("a", "", TEXT, ("b", "", DIT))
    for first, second in (
        (("sd_v1", UNET), ("sdxl_base_v1-0", UNET)),
        (("", make_cross_attention(768)), ("", make_cross_attention(2048))),
        (("sd_v2", UNET), ("", make_cross_attention(768))),
        (("", UNET), ("", DIT)),
        (("flux-1-dev", DIT), ("chroma", DIT)),
    ):
        with pytest.raises(LayoutMismatchError, match=r"^a\.file .* b\.file .*one architecture$"):
            check_same_architecture("a.file", *first, ("b.file", *second))


@pytest.mark.parametrize(
    ("width", "prediction_type", "architecture"),
    [
        (768, "epsilon", "stable-diffusion-v1"),
        (1024, "epsilon", "stable-diffusion-v2-512"),
        (1024, "v_prediction", "stable-diffusion-v2-768-v"),
        (24, "epsilon", "custom-unet"),
    ],
)
def test_architecture_of_stable_diffusion_goes_by_text_width(
    width: int, prediction_type: str, architecture: str
) -> None:
    pipe = FACTORIES["stable_diffusion"]().pipe
    pipe.unet.register_to_config(cross_attention_dim=width)
    pipe.scheduler.register_to_config(prediction_type=prediction_type)
    assert get_pipeline_family(pipe).architecture == architecture


@pytest.mark.parametrize(
    ("qk_norm", "dual_layers", "architecture"),
    [
        (None, (), "stable-diffusion-3-3-medium"),
        ("rms_norm", (), "stable-diffusion-3-3-5-large"),
        ("rms_norm", (0, 1), "stable-diffusion-3-3-5-medium"),
    ],
)
def test_architecture_of_stable_diffusion_3_goes_by_its_blocks(
    qk_norm: str | None, dual_layers: tuple[int, ...], architecture: str
) -> None:
    pipe = FACTORIES["stable_diffusion_3"]().pipe
    pipe.transformer.register_to_config(qk_norm=qk_norm, dual_attention_layers=dual_layers)
    assert get_pipeline_family(pipe).architecture == architecture
