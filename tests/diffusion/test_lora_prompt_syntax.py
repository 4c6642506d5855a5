"""LoRA tags of prompts, in every spelling that users copy from elsewhere."""

from copy import deepcopy

import pytest

from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.image_editing import edit_images
from hyperlora.diffusion.lora_prompt_syntax import LoraTag, check_no_lora_tags, parse_lora_tags
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.errors import InvalidArgumentError
from tests.tiny_pipelines import get_tiny_pipeline
from tests.tiny_pipelines.base import make_image


@pytest.mark.parametrize(
    "tag",
    [
        "<lora:me v2:0.5>",
        "<LoRA:me v2:0.5>",
        "<LYCO:me v2:0.5>",
        "< lora : me v2 : 0.5 >",
        "<\u3000lora:\u200bme v2\ufeff:0.5>",
        r"\<lora:me v2:0.5>",
        r"\<lora:me v2:0.5\>",
        "＜lora：me v2：０．５＞",
        "＜ＬＯＲＡ:me v2:0.5>",
        "&lt;lora:me v2:0.5&gt;",
        "<lora:me v2: TE = 0.5>",
    ],
)
def test_every_spelling_of_a_tag_is_heard(tag: str) -> None:
    assert parse_lora_tags(f"a {tag}, b") == ("a, b", (LoraTag("me v2", 0.5, 0.5),))


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("<lora:Golden1.5-V1:1>", "Golden1.5-V1"),
        ("<lora:[SD]me (final):1>", "[SD]me (final)"),
        ("<lora:a:b:1>", "a:b"),
        ("<lora:1:2:c:1>", "1:2:c"),
        ("<lora:half=full:1>", "half=full"),
        ("<lora:a\\b.safetensors:1>", "a\\b.safetensors"),
        ("<lora:諡異服装:1>", "諡異服装"),
        ("<lora:name>", "name"),
    ],
)
def test_names_may_hold_any_sign(tag: str, name: str) -> None:
    assert parse_lora_tags(tag) == ("", (LoraTag(name),))


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("a <hypernet:x:1>", "<hypernet:x:1> is no LoRA"),
        ("a <Embedding:x>", "'Embedding' is not supported in prompts"),
        ("a <LORA:x:1", "not closed"),
        ("a ＜lora：x", "not closed"),
        ("a lora:x:1>", "not opened"),
        ("a <lyco x>", "not closed"),
        ("<lora:x:te=1:TE=2>", "gives a parameter twice"),
        ("<lora:x:step=9-3>", "stops at 3, but only starts at 9"),
        ("<lora:x:start=0.5:stop=0.5>", "stops at 0.5"),
        ("<lora:x:-inf>", "between -10 and 10"),
        ("<lora:x:0,8>", "a number was expected, got '0,8'"),
    ],
)
def test_what_cannot_be_heard_is_refused(prompt: str, sentence: str) -> None:
    with pytest.raises(InvalidArgumentError, match=sentence):
        parse_lora_tags(prompt)


@pytest.mark.parametrize("prompt", ["i <3 you", "a < b : c", ">_<", "color: <blue>", "flora: a"])
def test_other_text_stays(prompt: str) -> None:
    assert parse_lora_tags(prompt) == (prompt, ())
    check_no_lora_tags([prompt])


def test_samplers_read_no_tag_as_words() -> None:
    base = DiffusionBase("tiny/base", get_tiny_pipeline("stable_diffusion").pipe)
    with pytest.raises(InvalidArgumentError, match="the prompt names the LoRA 'x' by a tag"):
        generate_images(base, ["a", "b < LoRA:x >"], seeds=[0, 1])
    with pytest.raises(InvalidArgumentError, match="the negative prompt names the LoRA 'y'"):
        generate_images(base, ["a"], seeds=[0], negative_prompt="<lyco:y:1>")
    edit_base = DiffusionBase("tiny/edit", deepcopy(get_tiny_pipeline("instruct_pix2pix").pipe))
    with pytest.raises(InvalidArgumentError, match="the instruction names the LoRA 'z'"):
        edit_images(edit_base, make_image(), seeds=[0], instructions="hat <lora:z:1>")
