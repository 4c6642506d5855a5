"""Fit LiDB codes to people of the avatar world, K at a time: the regression targets of the faithful hypernetwork."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_builder.avatars.captions import prompt
from data_builder.avatars.portrait_dataset import Portraits
from data_builder.datamodules.feature_cache import latents_of
from hyperlora.diffusion.diffusion_base import Base, load_base
from hyperlora.diffusion.target_modules import layout_of
from hyperlora.finetuning.examples import Examples
from hyperlora.finetuning.trainer import fit
from hyperlora.lora.heads import LiDB
from hyperlora.lora.weights import LoraWeights
from hyperlora.progress import track


def fit_codes(
    portraits: Path, base: str, vae: str, out: Path, *, people: int, at_once: int, steps: int, lr: float, preset: str,
    rank: int, a: int, b: int,
) -> None:  # fmt: skip
    """``out`` (.safetensors): ``codes`` [people, 2 * sites, code_size] and the last ``losses`` [people]. Written after
    every chunk of ``at_once`` people; a second call goes on where the first stopped."""
    model = load_base(base)
    lidb = LiDB(layout_of({"unet": model.denoiser}, preset, rank, model.id), a, b)
    start = lidb.start()

    def expand(codes: Tensor) -> LoraWeights:
        down, up = codes.unflatten(-1, start.shape).chunk(2, -2)
        return lidb(down, up)

    found = load_file(out) if out.exists() else {"codes": torch.zeros(0, *start.shape), "losses": torch.zeros(0)}
    for first in track(list(range(len(found["codes"]), people, at_once)), "fitting", "people", size=at_once):
        k = min(at_once, people - first)
        examples = _examples(model, portraits, vae, range(first, first + k))
        fitted = fit(
            model.denoiser, model.noise_schedule, examples, start.flatten().expand(k, -1), expand, steps=steps, lr=lr
        )
        found = {
            "codes": torch.cat([found["codes"], fitted.codes.unflatten(-1, start.shape)]),
            "losses": torch.cat([found["losses"], fitted.losses[-20:].mean(0)]),
        }
        partial = out.with_suffix(".part")
        save_file(found, partial)
        partial.rename(out)


def _examples(model: Base, folder: Path, vae: str, people: range) -> Examples:
    """All portraits of these people with the prompts of their scenes."""
    portraits, latents = Portraits(folder), latents_of(folder, vae)
    each = portraits.plan.each
    rows = range(people.start * each, people.stop * each)
    text = model.encode_prompts([prompt(portraits.scene(i)) for i in rows])["encoder_hidden_states"]
    clean = torch.from_numpy(np.array(latents[rows.start : rows.stop])).float()
    shape = (len(people), each)
    return Examples(clean.unflatten(0, shape), {"encoder_hidden_states": text.unflatten(0, shape)})
