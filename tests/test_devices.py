"""Networks, LoRAs and bases on one device: the same results on a mock of a CUDA card as on the CPU.

The mock raises where tensors of the CPU and of the card meet (``tests/mock_cuda.py``).
"""

import pickle
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from hyperlora import pretrained
from hyperlora.compute import ComputeConfig
from hyperlora.diffusion.autolora_guidance import apply_autolora_guidance
from hyperlora.diffusion.diffusion_base import DiffusionBase, load_diffusion_base, make_unet_encoder
from hyperlora.diffusion.image_editing import edit_images
from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.diffusion.multi_lora import CompositionConfig, compose_loras
from hyperlora.diffusion.placement import place_pipeline
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.encoders.identity_embedder import IdentityEmbedder
from hyperlora.encoders.identity_similarity import IdentitySimilarity
from hyperlora.finetuning.config import FineTuneConfig, RefineConfig
from hyperlora.finetuning.examples import TrainingExamples, ValidationProbe
from hyperlora.finetuning.refine import make_photo_examples, refine_lora
from hyperlora.finetuning.refine_identity import refine_identity
from hyperlora.finetuning.trainer import fine_tune_loras
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.save import serialize_lora
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.merge import (
    MERGE_METHODS,
    compare_deltas,
    compute_relative_error,
    merge,
    pad_and_stack,
)
from hyperlora.lora.parametrizations import PARAMETRIZATIONS, make_parametrization
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.hypernetwork import Hypernetwork
from hyperlora.pipelines import generate_ray
from hyperlora.pipelines.auto import load_image_to_lora
from hyperlora.pipelines.config import GenerationConfig
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.instruction_search import InstructionSearch
from hyperlora.pipelines.pair_to_lora import PairToLora
from hyperlora.pipelines.prompt_lora import make_lora_from_prompts
from hyperlora.pipelines.rerank import IdentityReranker
from tests.conftest import Bundle
from tests.mock_cuda import mock_cuda
from tests.tiny_pipelines import FACTORIES, FAST, get_tiny_pipeline, mark_heavy
from tests.tiny_pipelines.base import make_image

Compute = Callable[[ComputeConfig], Any]
PROMPTS = ["a b", "c"]


def assert_same_on_card(compute_fn: Compute, tolerance: float = 1e-4) -> None:
    """Check that a function of a ``ComputeConfig`` computes the same on the CPU and on the card."""
    expected = list(flatten(compute_fn(ComputeConfig(device="cpu", dtype="float32"))))
    with mock_cuda():
        results = compute_fn(ComputeConfig(device="cuda", dtype="float32"))
        actual = [value.cpu() for value in flatten(results)]
    assert len(actual) == len(expected) > 0
    for value, expected_value in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, expected_value, atol=tolerance, rtol=tolerance)


def flatten(value: Any) -> Iterator[Tensor]:
    """The tensors of a result: of LoRAs their numbers, of images their pixels."""
    match value:
        case Tensor():
            yield value.detach()
        case LoraWeights():
            yield value.flatten().detach()
        case Image.Image():
            yield torch.from_numpy(np.array(value)).float() / 255
        case float():
            yield torch.tensor(value)
        case _:
            for item in value:
                yield from flatten(item)


def make_random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_lora(layout: LoraLayout, *batch_shape: int, seed: int = 0) -> LoraWeights:
    flat = make_random(*batch_shape, layout.numel, seed=seed, scale=0.2)
    return LoraWeights.unflatten(layout, flat)


def load_base(bundle: Bundle, compute: ComputeConfig) -> DiffusionBase:
    base = load_diffusion_base(bundle.base, compute)
    assert base.device.type == compute.torch_device.type
    return base


def make_photos(base: DiffusionBase, *shape: int) -> Tensor:
    photos = make_random(*shape, 3, base.resolution, base.resolution)
    return photos.sigmoid()  # on the CPU, where decoders leave them


# ---- networks ----


@pytest.mark.parametrize("kind", ["image-to-lora", "pair-to-lora", "lora-diffusion"])
def test_networks_generate_the_same_lora(
    bundle: Bundle, lora_diffusion_dir: Any, kind: str
) -> None:
    def generate(compute: ComputeConfig) -> Any:
        if kind == "pair-to-lora":
            model: Any = PairToLora.from_pretrained(bundle.pair_model, compute=compute)
            folder = bundle.edit_benchmark / "inverted"
            lora = model((folder / "shown-0_before.png", folder / "shown-0_after.png"))
        else:
            path = bundle.model if kind == "image-to-lora" else lora_diffusion_dir
            model = load_image_to_lora(path, compute=compute)
            lora = model(bundle.photo)
        assert lora.weights.device.type == model.device.type == compute.torch_device.type
        saved = load_lora(lora.serialize(), model.layout).weights
        return lora.weights, lora.weights.resize(1).get_delta_weights(), saved

    assert_same_on_card(generate)


def test_unet_encoder_and_network_are_on_devices_of_their_own(bundle: Bundle) -> None:
    def generate(compute: ComputeConfig, network_device: str = "cpu") -> Any:
        base = load_base(bundle, compute)
        encoder = make_unet_encoder(base)
        layout, network_options = base.make_layout("attention", 2), {"size": 4}
        torch.manual_seed(0)
        network = Hypernetwork(
            layout, encoder.width, width=16, depth=1, num_heads=2, head_options=network_options
        )
        nn.init.normal_(network.code_proj, std=0.1)
        model = ImageToLora(encoder, network).eval().requires_grad_(False)
        photos = make_photos(base, 1, 2)
        on_cpu = model.forward(photos)
        return on_cpu, model.to(compute.torch_device).forward(photos)

    assert_same_on_card(generate)


# ---- operations on LoRAs ----


def make_loras(device: torch.device) -> list[LoraWeights]:
    """Two LoRAs of different targets and ranks."""
    targets = [TargetModule(f"unet.{name}", 6, 5) for name in "abc"]
    layouts = [LoraLayout(tuple(targets[:2]), 2, "x"), LoraLayout(tuple(targets[1:]), 3, "x")]
    return [make_lora(layout, seed=i).to(device) for i, layout in enumerate(layouts)]


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_merge_gives_the_same_lora(method: str) -> None:
    def merge_loras(compute: ComputeConfig) -> Any:
        merged = merge(make_loras(compute.torch_device), [0.5, -2], method, rank=2)
        assert merged.device.type == compute.torch_device.type
        return merged.get_delta_weights()

    assert_same_on_card(merge_loras)


def test_operations_on_loras_stay_on_their_device() -> None:
    def compute_all(compute: ComputeConfig) -> Any:
        loras = make_loras(compute.torch_device)
        batch = pad_and_stack(loras)
        results = [
            batch.shuffle_batch().flatten(),
            batch.compute_delta_norms(),
            *compare_deltas(batch, batch * 0.5),
            *batch.mean().get_delta_weights(),
            *(loras[0] - 0.5 * loras[0]).canonicalize().get_delta_weights(),
        ]
        assert all(value.device.type == compute.torch_device.type for value in results)
        serialize_lora(loras[0])
        return [*results, compute_relative_error(loras[0] * 0.5, loras[0])]

    assert_same_on_card(compute_all)


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_parametrizations_expand_codes_on_their_device(kind: str) -> None:
    targets = (TargetModule("unet.a", 8, 12), TargetModule("unet.b", 12, 8))
    layout = LoraLayout(targets, 4, "tiny/base")

    def expand(compute: ComputeConfig) -> Any:
        parametrization: Any = make_parametrization(kind, layout, a=6, b=4)
        if kind == "lidb":
            parametrization.lidb.to(compute.torch_device)
        codes = parametrization.init_codes(torch.Generator().manual_seed(0))
        return parametrization((codes + 0.1).to(compute.torch_device)).get_delta_weights()

    assert_same_on_card(expand)


# ---- bases ----


@pytest.mark.parametrize("offload", ["none", "sequential"])
# Krea 2, Qwen-Image 2.1 and FLUX.2 make positions, pixels and guidance of their own
@pytest.mark.parametrize("name", mark_heavy(FACTORIES, (*FAST, "krea_2", "qwen_image_21", "flux2")))
def test_families_predict_the_same(name: str, offload: Any) -> None:
    tiny = get_tiny_pipeline(name)

    def predict(compute: ComputeConfig) -> Any:
        base = DiffusionBase("tiny", deepcopy(tiny.pipe))
        if compute.torch_device.type != "cpu":
            place_pipeline(base.family, replace(compute, offload=offload))
        images = None if tiny.images is None else tiny.images[: len(tiny.prompts)]
        conditions = base.encode_prompts(list(tiny.prompts), images=images)
        pixels = make_image(count=len(tiny.prompts)) if images is None else images
        latents = base.encode_images(pixels)
        if base.family.edits_images:
            conditions["image_latents"] = latents
        lora = make_lora(base.make_layout("attention", 2), len(tiny.prompts))
        with torch.no_grad(), base.inject_lora(lora):
            prediction = base.predict(latents.cpu(), torch.tensor([500] * len(latents)), conditions)
            return prediction, base.decode_latents(latents.cpu())

    assert_same_on_card(predict, tolerance=1e-3)


def test_generate_and_edit_images_are_the_same(bundle: Bundle) -> None:
    def sample(compute: ComputeConfig) -> Any:
        base = load_base(bundle, compute)
        lora = make_lora(base.make_layout("attention+mlp", 2), 2)
        blended = ["a b", "(a b)-0.5*(c)"]
        images = generate_images(base, PROMPTS, lora, seeds=[0, 1], num_inference_steps=2)
        edit_base = load_diffusion_base(bundle.edit_base, compute)
        edited = edit_images(
            edit_base,
            images,
            lora[0],
            seeds=[0, 1],
            instructions=blended,
            num_inference_steps=2,
            preserve_unedited=True,
        )
        return images, edited

    assert_same_on_card(sample, tolerance=2 / 255)


@pytest.mark.parametrize("strategy", ["merge", "switch", "composite", "spatial", "autolora"])
def test_composed_loras_give_the_same_image(bundle: Bundle, strategy: Any) -> None:
    def sample(compute: ComputeConfig) -> Any:
        base = load_base(bundle, compute)
        layout = base.make_layout("attention", 2)
        loras = [make_lora(layout), make_lora(base.make_layout("attention+mlp", 3), seed=1)]
        if strategy == "autolora":
            context = apply_autolora_guidance(base.pipeline, merge(loras), 1.5)
        else:
            regions = [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 0.5)]
            config = CompositionConfig(switch_every=1, regions=regions)
            schedule = None if strategy == "switch" else lambda step, num_steps: [1.0, step / 2]
            context = compose_loras(
                base.pipeline, loras, strategy, [1, 0.5], schedule=schedule, config=config
            )
        with context:
            return generate_images(base, PROMPTS[:1], seeds=[0], num_inference_steps=2)

    assert_same_on_card(sample, tolerance=2 / 255)


@pytest.mark.parametrize("offload", ["none", "model", "sequential"])
def test_prompts_become_the_same_lora(bundle: Bundle, offload: Any) -> None:
    """Also where the weights that are read are elsewhere, or nowhere, between two calls."""

    def make(compute: ComputeConfig) -> Any:
        if compute.torch_device.type != "cpu":
            compute = replace(compute, offload=offload)
        base = load_diffusion_base(bundle.base, compute)
        assert base.device.type == compute.torch_device.type
        lora = make_lora_from_prompts(base, PROMPTS, 2)
        with torch.no_grad(), base.inject_lora(lora):
            images = base.decode_latents(base.encode_images(make_photos(base, 2)))
            return images, lora.get_delta_weights()

    assert_same_on_card(make, tolerance=1e-3)


def test_instruction_search_finds_the_same_lora() -> None:
    folder = next(path for path in sorted(pretrained.EDIT_BENCHMARK_DIR.iterdir()) if path.is_dir())
    pair = [next(folder.glob(f"shown-0_{side}.*")) for side in ("before", "after")]

    def search(compute: ComputeConfig) -> Any:
        base = load_diffusion_base(pretrained.EDIT_BASE_DIR, compute)
        model = PairToLora.from_pretrained(pretrained.PAIR_TO_LORA_DIR, base=base, compute=compute)
        search_fn = InstructionSearch(base, ["a red hat", "dark skin"])
        return model((pair[0], pair[1]), search=search_fn).weights.get_delta_weights()

    assert_same_on_card(search, tolerance=1e-2)


# ---- fine-tuning ----


@pytest.mark.parametrize("seeds", [(1, 2), None])
def test_fine_tune_loras_takes_the_same_steps(bundle: Bundle, seeds: Any) -> None:
    def fine_tune(compute: ComputeConfig) -> Any:
        base = load_base(bundle, compute)
        examples = make_photo_examples(base, make_photos(base, 2, 3), "a b")
        examples = TrainingExamples(examples.latents.cpu(), examples.conditions, [3, 2])
        layout = base.make_layout("attention", 2)
        torch.manual_seed(0)
        result = fine_tune_loras(
            base,
            examples,
            make_lora(layout, 2).flatten(),
            partial(LoraWeights.unflatten, layout),
            FineTuneConfig(num_steps=4, lr=1e-3, seeds=seeds, snapshot_steps=[2]),
            prior_examples=examples,
            base_loras=make_lora(layout, 2, seed=3),
            x0_offsets=make_random(*examples.latents.shape),
            probe=ValidationProbe.from_examples(examples, [1, 2], eval_every=1, patience=1),
        )
        assert result.weights.device.type == compute.torch_device.type
        return result.weights, result.losses.nan_to_num(), result.val_losses.nan_to_num()

    assert_same_on_card(fine_tune)


def test_refined_loras_are_the_same(bundle: Bundle) -> None:
    def refine(compute: ComputeConfig) -> Any:
        base = load_base(bundle, compute)
        encoder = load_image_to_lora(bundle.model, compute=compute).encoder
        embedder = IdentityEmbedder(encoder, make_random(8, encoder.width), torch.zeros(8))
        layout, photos = base.make_layout("attention", 2), make_photos(base, 2, 2)
        predicted, config = make_lora(layout, 2), RefineConfig(num_steps=2, batch_size=2)
        by_photos = refine_lora(base, predicted, photos, config)
        by_identity = refine_identity(base, predicted, photos, embedder, PROMPTS, config)
        return by_photos.get_delta_weights(), by_identity.get_delta_weights()

    assert_same_on_card(refine, tolerance=1e-3)


def test_reranker_scores_the_same(bundle: Bundle) -> None:
    def score(compute: ComputeConfig) -> Any:
        base = load_base(bundle, compute)
        similarity = IdentitySimilarity.from_pretrained(bundle.evaluator)
        reranker = IdentityReranker(base, similarity.to(compute.torch_device), PROMPTS, 2)
        lora = make_lora(base.make_layout("attention", 2), 2).to(compute.torch_device)
        return reranker(lora, make_photos(base, 2))

    assert_same_on_card(score, tolerance=1e-2)


def test_injected_loras_may_come_from_the_cpu(bundle: Bundle) -> None:
    def predict(compute: ComputeConfig) -> Any:
        base = load_base(bundle, compute)
        latents = base.encode_images(make_photos(base, 2))
        conditions = base.encode_prompts(PROMPTS, {})
        with inject_lora(base.denoiser, make_lora(base.make_layout("attention+conv", 2), 2)):
            return base.predict(latents, torch.tensor([10, 900]), conditions)

    assert_same_on_card(predict)


def test_ray_workers_return_errors_for_the_user(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_worker(**options: Any) -> Any:
        worker = generate_ray._Worker(str(bundle.model), None, GenerationConfig(), options)
        return pickle.loads(worker({"subjects": [pickle.dumps([])]})["error"][0])

    assert run_worker(device="cpu") is None
    assert "unknown device 'gpu'" in str(run_worker(device="gpu"))

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(generate_ray, "generate_batch", fail)
    assert "out of memory: try a smaller --batch-size" in str(run_worker(device="cpu"))
