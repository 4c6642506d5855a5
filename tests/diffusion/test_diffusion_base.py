"""Prompts encoded by a base: blends, the cache, one LoRA of the text encoder per sample."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperlora.compute import ComputeConfig
from hyperlora.diffusion.diffusion_base import DiffusionBase, PromptCache, load_diffusion_base
from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.errors import ModelLoadError
from hyperlora.lora.weights import LoraWeights


@pytest.fixture(scope="module")
def base(bundle: Any) -> DiffusionBase:
    return load_diffusion_base(bundle.edit_base)


def test_encode_prompts_sums_blends(base: DiffusionBase) -> None:
    blend = '("dark", "bright", "").blend(1.5, 0.25, -0.75)'
    embeds = base.encode_prompts([blend, "dark", "bright", ""])["prompt_embeds"]
    blended, dark, bright, empty = embeds
    torch.testing.assert_close(blended, 1.5 * dark + 0.25 * bright - 0.75 * empty)
    half = base.encode_prompts(['("dark", "bright").blend(0.5, 0.5)'])["prompt_embeds"]
    torch.testing.assert_close(half[0], (dark + bright) / 2)


def test_encode_prompts_does_not_depend_on_the_batch(base: DiffusionBase) -> None:
    (alone,) = base.encode_prompts(["dark"])["prompt_embeds"]
    batch = base.encode_prompts(["bright", "dark", "dark"])["prompt_embeds"]
    assert torch.equal(alone, batch[2])


def test_encode_prompts_reads_cached_prompts(base: DiffusionBase) -> None:
    prompts, cache = ["dark", '("dark", "bright", "").blend(1.5, 0.25, -0.75)', "dark"], {}
    embeds = base.encode_prompts(prompts, cache)["prompt_embeds"]
    torch.testing.assert_close(embeds, base.encode_prompts(prompts)["prompt_embeds"])
    assert set(cache) == {"dark", "bright", ""}
    cache["dark"] = {"prompt_embeds": torch.zeros_like(cache["dark"]["prompt_embeds"])}
    embeds = base.encode_prompts(["dark", "bright"], cache)["prompt_embeds"]
    assert embeds[0].abs().max() == 0 and torch.equal(embeds[1:], cache["bright"]["prompt_embeds"])


def test_encode_prompts_encodes_each_prompt_with_its_lora(base: DiffusionBase) -> None:
    text_encoder = base.modules["text_encoder"]
    layout = make_layout({"text_encoder": text_encoder}, "attention", 2, base.id)
    generator = torch.Generator().manual_seed(0)
    loras = LoraWeights.unflatten(layout, 0.3 * torch.randn(2, layout.numel, generator=generator))
    with inject_lora(text_encoder, loras):
        batch = base.encode_prompts(["dark", "dark"])["prompt_embeds"]
    for i in range(2):
        with inject_lora(text_encoder, loras[i]):
            (alone,) = base.encode_prompts(["dark"])["prompt_embeds"]
        torch.testing.assert_close(batch[i], alone)
    assert not torch.allclose(batch[0], batch[1], atol=1e-3)


def test_prompt_cache_does_not_depend_on_its_history(bundle: Any) -> None:
    """In half precision, so that a resumed training repeats what it would have computed."""
    base = load_diffusion_base(bundle.base, ComputeConfig(device="cpu", dtype="bfloat16"))
    prompts = ["a cat", "a dog on a hill", "rain"]
    together: PromptCache = {}
    base.encode_prompts(prompts, together)
    for prompt in prompts:
        alone = base.encode_prompts([prompt], {})
        assert torch.equal(alone["prompt_embeds"], together[prompt]["prompt_embeds"])


class Intruder:
    """An object whose pickle calls a function."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("intruder",))


@pytest.mark.parametrize("content", ["pickle", "zip", "short", "empty", "safetensors"])
@pytest.mark.parametrize("component", ["text_encoder", "unet"])
def test_load_diffusion_base_reports_damaged_weights(
    bundle: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], component: str, content: str
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(bundle.base, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index.pop("_shared_components", None)
    suffix = ".safetensors" if content == "safetensors" else ".bin"
    name = "pytorch_model" if component == "text_encoder" else "diffusion_pytorch_model"
    if suffix == ".safetensors":
        name = name.replace("pytorch_model", "model") if component == "text_encoder" else name
    for path in (folder / component).glob("*.safetensors"):
        path.unlink()
    target = folder / component / f"{name}{suffix}"
    if content == "zip":
        torch.save({"x": Intruder()}, target)
    else:
        data = {
            "pickle": pickle.dumps({"x": Intruder()}),
            "short": b"\x80\x04",
            "empty": b"",
            "safetensors": b"\x10\0\0\0\0\0\0\0{",
        }
        target.write_bytes(data[content])
    with pytest.raises(ModelLoadError, match="cannot be loaded") as error:
        load_diffusion_base(folder)
    assert len(str(error.value).splitlines()) == 1 and "trust" not in str(error.value)
    assert "intruder" not in capsys.readouterr().out
