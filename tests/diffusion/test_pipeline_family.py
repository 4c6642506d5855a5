"""One adapter per pipeline class: names, branches of guidance, prompts of SD 3 and FLUX."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hyperlora.diffusion.denoiser_calls import DenoiserCall, intercept_denoiser
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.pipeline_family import get_pipeline_family

ARCHITECTURES = {
    "sd": "stable-diffusion-v1",
    "ip2p": "stable-diffusion-v1",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sd3": "stable-diffusion-v3-medium",
    "flux": "flux-1-dev",
}
NUM_BRANCHES = {"sd": 2, "ip2p": 3, "sdxl": 2, "sd3": 2, "flux": 1}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_get_pipeline_family_knows_each_pipeline_class(make_tiny_pipeline: Any, kind: str) -> None:
    tiny = make_tiny_pipeline(kind)
    family = get_pipeline_family(tiny.pipe)
    assert family.architecture == ARCHITECTURES[kind]
    assert family.edits_images == (kind == "ip2p")
    assert DiffusionBase("tiny", tiny.pipe).architecture == ARCHITECTURES[kind]


@pytest.mark.parametrize("kind", NUM_BRANCHES)
def test_count_branches_is_the_batch_size_of_one_image(make_tiny_pipeline: Any, kind: str) -> None:
    tiny = make_tiny_pipeline(kind)
    family = get_pipeline_family(tiny.pipe)
    counts: list[tuple[int, int]] = []

    def record_counts(call: DenoiserCall) -> Tensor:
        counts.append((len(call.sample), family.count_branches(len(call.sample))))
        return call()

    with intercept_denoiser(tiny.pipe, record_counts):
        tiny.sample_latents(num_inference_steps=1)
        tiny.sample_latents(num_inference_steps=1, guidance_scale=1.0)
    assert counts == [(NUM_BRANCHES[kind],) * 2, (1, 1)]


@pytest.mark.parametrize("kind", ["sd", "ip2p", "sdxl", "sd3"])
def test_combine_branches_equals_pipeline_guidance(make_tiny_pipeline: Any, kind: str) -> None:
    tiny = make_tiny_pipeline(kind)
    family = get_pipeline_family(tiny.pipe)
    guided: list[Tensor] = []
    scheduler_inputs: list[Tensor] = []

    def record_guidance(call: DenoiserCall) -> Tensor:
        model_output = call()
        guided.append(family.combine_branches(model_output))
        return model_output

    step = tiny.pipe.scheduler.step

    def record_step(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        scheduler_inputs.append(model_output)
        return step(model_output, *args, **kwargs)

    tiny.pipe.scheduler.step = record_step
    with intercept_denoiser(tiny.pipe, record_guidance):
        tiny.sample_latents()
    assert len(guided) == len(scheduler_inputs) == 4
    torch.testing.assert_close(torch.stack(guided), torch.stack(scheduler_inputs))


def test_get_pipeline_family_takes_class_name_of_other_pipelines(pipe: Any) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    other = StableDiffusionImg2ImgPipeline(
        **{k: v for k, v in pipe.components.items() if k != "image_encoder"},
        requires_safety_checker=False,
    )
    family = get_pipeline_family(other)
    assert family.architecture == "StableDiffusionImg2ImgPipeline"
    assert family.count_branches(1) == 1 and not family.edits_images


def test_make_conditions_are_arguments_of_the_denoiser(make_tiny_pipeline: Any) -> None:
    for kind in ("sd", "sdxl", "sd3"):
        tiny = make_tiny_pipeline(kind)
        text, pooled = tiny.arguments["prompt_embeds"], tiny.arguments.get("pooled_prompt_embeds")
        conditions = get_pipeline_family(tiny.pipe).make_conditions(text, pooled)
        sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        model_output = tiny.denoiser(sample, timestep=torch.tensor([3]), **conditions).sample
        assert model_output.shape == sample.shape and conditions["encoder_hidden_states"] is text


def make_projection_encoder(tokenizer: Any, width: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        projection_dim=4,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=48,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModelWithProjection(config).eval()


def test_encode_prompts_of_sd3_equals_its_pipeline(bundle: Any, make_tiny_pipeline: Any) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(bundle.base / "tokenizer")
    pipe = make_tiny_pipeline("sd3").pipe
    encoder = make_projection_encoder(tokenizer, 8)
    pipe.register_modules(
        text_encoder=encoder, text_encoder_2=encoder, tokenizer=tokenizer, tokenizer_2=tokenizer
    )
    pipe.tokenizer_max_length = 48
    base = DiffusionBase("tiny", pipe)
    conditions = base.encode_prompts(["a b", "c"])
    expected = pipe.encode_prompt(["a b", "c"], None, None, do_classifier_free_guidance=False)
    torch.testing.assert_close(conditions["encoder_hidden_states"], expected[0])
    torch.testing.assert_close(conditions["pooled_projections"], expected[2])
    assert conditions["pooled_projections"].shape == (2, 8)
    blended = base.encode_prompts(['("a b", "c").blend(0.5, 0.5)'])
    torch.testing.assert_close(
        blended["pooled_projections"][0], conditions["pooled_projections"].mean(0)
    )


def test_encode_prompts_of_flux_equals_its_pipeline(bundle: Any, make_tiny_pipeline: Any) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

    tokenizer = CLIPTokenizer.from_pretrained(bundle.base / "tokenizer")
    pipe = make_tiny_pipeline("flux").pipe
    torch.manual_seed(0)
    t5 = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ).eval()
    clip = CLIPTextModel.from_pretrained(bundle.base / "text_encoder")
    pipe.register_modules(
        text_encoder=clip, tokenizer=tokenizer, text_encoder_2=t5, tokenizer_2=tokenizer
    )
    pipe.tokenizer_max_length = 48
    conditions = DiffusionBase("tiny", pipe).encode_prompts(["a b", "c"])
    prompt_embeds, pooled_prompt_embeds, _ = pipe.encode_prompt(["a b", "c"])
    torch.testing.assert_close(
        conditions["encoder_hidden_states"], prompt_embeds, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(conditions["pooled_projections"], pooled_prompt_embeds)
