"""Pairs to LoRAs and edits with them: as plain diffusers does it, each picture by its own LoRA."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image

from hyperlora.data.images import to_image
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.diffusion.image_editing import blend_edit_region, edit_images
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.errors import InvalidArgumentError, ModelLoadError
from hyperlora.evaluation.edit_benchmark import load_edit_benchmark
from hyperlora.evaluation.edit_evaluator import EditEvaluator
from hyperlora.evaluation.edit_suite import evaluate_edit_suite
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.pair_hypernetwork import PairHypernetwork
from hyperlora.pipelines.input_checks import check_pair
from hyperlora.pipelines.model_card import ModelCard
from hyperlora.pipelines.pair_to_lora import PairToLora
from hyperlora.pipelines.prompt_lora import (
    encode_text,
    make_lora_from_prompts,
    set_instruction_texts,
)


@pytest.fixture(scope="module")
def base(bundle: Any) -> Any:
    return load_diffusion_base(bundle.edit_base)


@pytest.fixture(scope="module")
def model(bundle: Any, base: Any) -> PairToLora:
    return PairToLora.from_pretrained(bundle.pair_model, base=base)


def shown(bundle: Any, number: int = 0, edit: str = "inverted") -> tuple[Path, Path]:
    folder = bundle.edit_benchmark / edit
    return folder / f"shown-{number}_before.png", folder / f"shown-{number}_after.png"


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(i).astype(int) for i in images])


def test_a_blend_is_told_as_the_sum_of_its_embeddings(bundle: Any, base: Any) -> None:
    blend = '("dark", "bright", "").blend(1.5, 0.25, -0.75)'
    blended, dark, bright, empty = encode_text(base, [blend, "dark", "bright", ""])
    torch.testing.assert_close(blended, 1.5 * dark + 0.25 * bright - 0.75 * empty)
    assert torch.equal(
        encode_text(base, ["dark"])[0], encode_text(base, ["bright", "dark", "dark"])[2]
    )
    picture = Image.open(shown(bundle)[0]).convert("RGB").resize((16, 16))
    apply = partial(
        edit_images, base, [picture], seeds=[5], num_inference_steps=2, guidance_scale=3.0
    )
    assert (
        pixels(apply(instructions='("dark").blend(1)')) == pixels(apply(instructions="dark"))
    ).all()
    assert (
        pixels(apply(instructions='("dark").blend(3)')) != pixels(apply(instructions="dark"))
    ).any()
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        apply(instructions='("dark", "bright").blend(1)')


def test_texts_that_are_known_are_not_read_again(base: Any) -> None:
    prompts, known = ["dark", '("dark", "bright", "").blend(1.5, 0.25, -0.75)', "dark"], {}
    first = base.encode_prompts(prompts, known)["encoder_hidden_states"]
    torch.testing.assert_close(first, base.encode_prompts(prompts)["encoder_hidden_states"])
    assert set(known) == {"dark", "bright", ""}
    known["dark"] = (torch.zeros_like(known["dark"][0]), None)
    again = base.encode_prompts(["dark", "bright"], known)["encoder_hidden_states"]
    assert again[0].abs().max() == 0 and torch.equal(again[1], known["bright"][0])


def test_each_picture_is_told_its_words_by_its_own_text_encoder(base: Any) -> None:
    layout = make_layout(
        {name: base.modules[name] for name in ("unet", "text_encoder")}, "attention", 2, base.id
    )
    loras = LoraWeights.unflatten(layout, 0.3 * torch.randn(2, layout.numel))
    apply = partial(edit_images, base, instructions="dark", num_inference_steps=2)
    pictures = torch.rand(2, 3, 16, 16)
    together = apply(pictures, loras, seeds=[5, 6])
    alone = [apply(pictures[i : i + 1], loras[i], seeds=[5 + i])[0] for i in range(2)]
    assert abs(pixels(together) - pixels(alone)).max() <= 2
    blended, dark, bright = encode_text(
        base, ['("dark", "bright").blend(0.5, 0.5)', "dark", "bright"]
    )
    torch.testing.assert_close(blended, (dark + bright) / 2)


def test_the_saved_change_in_plain_diffusers_draws_the_same(
    bundle: Any, base: Any, model: Any, tmp_path: Path
) -> None:
    change = model(shown(bundle)) * 8  # untrained: else too little to see
    change.save(tmp_path / "change.safetensors")
    picture = Image.open(shown(bundle, 1)[0]).convert("RGB").resize((16, 16))
    ours = edit_images(
        base,
        [picture],
        change,
        seeds=[5],
        instructions="dark",
        num_inference_steps=3,
        guidance_scale=2.0,
    )
    without = edit_images(
        base,
        [picture],
        None,
        seeds=[5],
        instructions="dark",
        num_inference_steps=3,
        guidance_scale=2.0,
    )
    plain = StableDiffusionInstructPix2PixPipeline.from_pretrained(bundle.edit_base)
    plain.set_progress_bar_config(disable=True)
    plain.load_lora_weights(tmp_path / "change.safetensors")
    theirs = plain(
        "dark",
        image=picture,
        num_inference_steps=3,
        guidance_scale=2.0,
        image_guidance_scale=1.0,
        generator=torch.Generator().manual_seed(5),
    ).images
    assert abs(pixels(ours) - pixels(theirs)).max() <= 2
    assert abs(pixels(ours) - pixels(without)).max() > 5


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_each_picture_by_its_own_lora_as_if_alone(
    bundle: Any, base: Any, model: Any, guidance: float
) -> None:
    from hyperlora.lora.weights import LoraWeights

    loras = LoraWeights.stack([model(shown(bundle, 0, e)) * 5 for e in ("inverted", "darker")])
    pictures = [Image.open(shown(bundle, i)[0]) for i in (0, 1)]
    together = edit_images(
        base,
        pictures,
        loras,
        seeds=[1, 2],
        instructions=["a", "b"],
        num_inference_steps=2,
        guidance_scale=guidance,
    )
    for i, words in enumerate("ab"):
        (alone,) = edit_images(
            base,
            [pictures[i]],
            loras[i],
            seeds=[i + 1],
            instructions=words,
            num_inference_steps=2,
            guidance_scale=guidance,
        )
        assert abs(pixels([alone]) - pixels([together[i]])).max() <= 2


def test_the_network_says_minus_for_the_way_back(bundle: Any, model: Any) -> None:
    before, after = shown(bundle)
    there, back = model((before, after)), model([(after, before)])
    torch.testing.assert_close(
        torch.cat([d.flatten() for d in there.delta()]),
        -torch.cat([d.flatten() for d in back.delta()]),
        atol=1e-5,
        rtol=1e-3,
    )
    assert there.norms().max() > 100 * model((before, before)).norms().max()
    torch.testing.assert_close(model((before, after), strength=0.5).norms(), there.norms() * 0.5)


def test_several_pairs_and_a_batch(bundle: Any, model: Any) -> None:
    pairs = [shown(bundle, 0), shown(bundle, 1)]
    both = model(pairs)
    assert both.batch == () and not torch.equal(both.flatten(), model(pairs[0]).flatten())
    torch.testing.assert_close(model(pairs[::-1]).flatten(), both.flatten(), atol=1e-5, rtol=1e-4)


def test_pairs_that_are_none_are_refused(model: Any) -> None:
    wide, tall = Image.new("RGB", (20, 10)), Image.new("RGB", (10, 20))
    with pytest.raises(
        InvalidArgumentError, match="20×10, the one after 10×20: the same size is expected"
    ):
        model((wide, tall))
    with pytest.raises(InvalidArgumentError, match="no pair given"):
        model([])


def test_a_base_that_edits_nothing_is_refused(bundle: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="one that edits pictures was expected"):
        edit_images(load_diffusion_base(bundle.base), [Image.new("RGB", (16, 16))], seeds=[0])
    with pytest.raises(ModelLoadError, match=r"ImageToLora|PairToLora"):
        PairToLora.from_pretrained(bundle.model)


def test_numbers_that_do_not_fit_are_refused(base: Any, bundle: Any, model: Any) -> None:
    picture = Image.new("RGB", (16, 16))
    with pytest.raises(InvalidArgumentError, match="need as many seeds"):
        edit_images(base, [picture], seeds=[])
    with pytest.raises(InvalidArgumentError, match="one for each picture"):
        edit_images(base, [picture], model.forward(torch.rand(2, 1, 2, 3, 16, 16)), seeds=[0])
    with pytest.raises(InvalidArgumentError, match="guidance between 0 and 100"):
        edit_images(base, [picture], seeds=[0], guidance_scale=float("nan"))


def noise(seed: int, side: int = 12) -> Image.Image:
    blocks = torch.rand(3, side, side, generator=torch.Generator().manual_seed(seed))
    return to_image(blocks.repeat_interleave(120 // side, 1).repeat_interleave(120 // side, 2))


def test_what_is_said_of_a_pair() -> None:
    picture = noise(0)
    inverted = picture.point(lambda x: 255 - x)
    assert check_pair(picture, inverted) == []
    assert "no change found" in check_pair(picture, picture.copy())[0]
    assert "unrelated" in check_pair(picture, noise(1, 5))[0]


def test_saving_again_as_jpeg_is_no_change(tmp_path: Path) -> None:
    smooth = noise(0).resize((30, 30)).resize((120, 120), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "a.jpg", quality=85)
    again = Image.open(tmp_path / "a.jpg")
    again.save(tmp_path / "b.jpg", quality=80)
    assert (
        "no change found"
        in check_pair(again.convert("RGB"), Image.open(tmp_path / "b.jpg").convert("RGB"))[0]
    )


def test_words_as_a_lora_draw_what_the_words_do(bundle: Any, base: Any, tmp_path: Path) -> None:
    texts = ["dark", "a photo"]
    told = make_lora_from_prompts(base, texts, rank=16)
    assert told.layout.rank == 16 and len(told) == 2
    pictures = [Image.open(shown(bundle, i)[0]) for i in (0, 1)]
    kwargs = {"seeds": [3, 4], "steps": 2}
    ours = pixels(edit_images(base, pictures, told, **kwargs))
    theirs = pixels(edit_images(base, pictures, None, instructions=texts, **kwargs))
    without = pixels(edit_images(base, pictures, None, **kwargs))
    assert abs(ours - theirs).max() <= max(2, abs(without - theirs).max() / 5)
    assert abs(without - theirs).mean() > 4 * abs(ours - theirs).mean()


@pytest.fixture
def speaking(base: Any, model: PairToLora) -> PairToLora:
    """A network that says words, as after some training."""
    tokens, width = encode_text(base, [""]).shape[1:]
    options = {"width": 16, "depth": 1, "heads": 2, "head_options": {"size": 4}}
    vocabulary = {
        "choices": {"light": ["dark", "bright"]},
        "mixtures": {"sky": ["black", "red"]},
        "further": ["red"],
    }
    words = {"tokens": tokens, "width": width, "hidden": 24, "vocabulary": vocabulary}
    network = PairHypernetwork(
        model.layout, model.encoder.width, antisymmetric=True, instruction_head=words, **options
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    set_instruction_texts(network, base)
    return PairToLora(model.encoder, network, ModelCard(resolution=16, num_inference_steps=2)).eval()


def test_a_network_that_says_words_is_saved_whole(
    bundle: Any, base: Any, speaking: Any, tmp_path: Path
) -> None:
    speaking.save_pretrained(tmp_path / "model")
    again = PairToLora.from_pretrained(tmp_path / "model", base=base)
    change, loaded = speaking(shown(bundle)), again(shown(bundle))
    assert change.layout == loaded.layout == speaking.layout
    for one, other in zip(change.delta(), loaded.get_delta_weights(), strict=True):
        torch.testing.assert_close(
            one, other, rtol=0.02, atol=0.02 * float(one.abs().max())
        )  # kept in half precision
    still = Image.open(shown(bundle)[0])
    assert (
        again((still, still)).compute_delta_norms().max()
        < 1e-4 * loaded.compute_delta_norms().max()
    )
    assert list(again.zero_shot_prompts) == ["red"]


def test_a_negative_strength_is_the_pair_turned_round(bundle: Any, speaking: PairToLora) -> None:
    before, after = shown(bundle)
    undoing, turned = speaking((before, after), -0.5), speaking((after, before), 0.5)
    torch.testing.assert_close(undoing.flatten(), turned.flatten())
    assert not torch.allclose(
        undoing.flatten(), -speaking((before, after), 0.5).flatten(), atol=1e-4
    )


def test_what_words_could_say_is_among_the_controls(bundle: Any, base: Any, speaking: Any) -> None:
    benchmark = load_edit_benchmark(bundle.edit_benchmark, 16, 1)
    judge = EditEvaluator(base, AttributeClassifier.from_pretrained(bundle.evaluator), benchmark, 1)
    names = [row.name for row in evaluate_edit_suite(judge, speaking)]
    assert {
        "words, as a LoRA",
        "one pair",
        "one pair, words tried",
        "one pair, words tried, the rest kept",
    } < set(names)


def test_what_an_edit_does_not_touch_is_kept() -> None:
    picture, edited = torch.rand(3, 8, 8), torch.rand(3, 8, 8)
    untouched = edited.clone()
    untouched[:, :, :4] = (edited[:, :, :4] + 0.5) % 1  # all but equal on the right
    untouched[:, :, 4:] += 0.02 * torch.rand(3, 8, 4)
    made = blend_edit_region(picture, edited, untouched)
    torch.testing.assert_close(made[:, :, :4], edited[:, :, :4])
    torch.testing.assert_close(made[:, :, 4:], picture[:, :, 4:])


def test_asked_for_nothing_the_picture_stays(bundle: Any, base: Any) -> None:
    picture = Image.open(shown(bundle)[0])
    ask = partial(edit_images, base, [picture], seeds=[5], num_inference_steps=2)
    whole, rest_kept = pixels(ask()), pixels(ask(keep_rest=True))
    expected = (
        pixels([picture.convert("RGB").resize((16, 16))])
        if picture.size != (16, 16)
        else pixels([picture])
    )
    assert abs(rest_kept - expected).max() <= 1
    assert abs(whole - expected).max() > 2
