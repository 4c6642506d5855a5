"""Fit LiDB codes to people of the avatar world, K at a time: the regression targets of the faithful hypernetwork."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_builder.avatars.captions import build_prompt
from data_builder.avatars.portrait_dataset import PortraitDataset
from data_builder.datamodules.feature_cache import load_cached_latents
from hyperlora.diffusion.diffusion_base import DiffusionBase, load_diffusion_base
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.finetuning.examples import TrainingExamples
from hyperlora.finetuning.trainer import fine_tune_loras
from hyperlora.lora.heads import LiDB
from hyperlora.lora.weights import LoraWeights
from hyperlora.progress import track


def fit_lidb_targets(
    portraits: Path,
    base: str,
    vae: str,
    output_path: Path,
    *,
    num_subjects: int,
    subjects_per_batch: int,
    steps: int,
    lr: float,
    preset: str,
    rank: int,
    a: int,
    b: int,
) -> None:
    """``output_path`` (.safetensors): ``fit_lidb_targets`` [people, 2 * sites, code_size] and the last ``losses`` [people]. Written after
    every chunk of ``subjects_per_batch`` people; a second call goes on where the first stopped."""
    model = load_diffusion_base(base)
    lidb = LiDB(make_layout({"unet": model.denoiser}, preset, rank, model.id), a, b)
    init_codes = lidb.init_codes()

    def decode_codes(codes: Tensor) -> LoraWeights:
        down, up = codes.unflatten(-1, init_codes.shape).chunk(2, -2)
        return lidb(down, up)

    results = (
        load_file(output_path)
        if output_path.exists()
        else {"codes": torch.zeros(0, *init_codes.shape), "losses": torch.zeros(0)}
    )
    for first_subject in track(
        list(range(len(results["codes"]), num_subjects, subjects_per_batch)),
        "fitting",
        "people",
        units_per_item=subjects_per_batch,
    ):
        k = min(subjects_per_batch, num_subjects - first_subject)
        examples = _load_examples(model, portraits, vae, range(first_subject, first_subject + k))
        result = fine_tune_loras(
            model.denoiser,
            model.noise_scheduler,
            examples,
            init_codes.flatten().expand(k, -1),
            decode_codes,
            num_steps=steps,
            lr=lr,
        )
        results = {
            "codes": torch.cat([results["codes"], result.codes.unflatten(-1, init_codes.shape)]),
            "losses": torch.cat([results["losses"], result.losses[-20:].mean(0)]),
        }
        partial_path = output_path.with_suffix(".part")
        save_file(results, partial_path)
        partial_path.rename(output_path)


def _load_examples(
    model: DiffusionBase, folder: Path, vae: str, subjects: range
) -> TrainingExamples:
    """All portraits of these people with the prompts of their scenes."""
    portraits, latents = PortraitDataset(folder), load_cached_latents(folder, vae)
    portraits_per_identity = portraits.config.portraits_per_identity
    indices = range(subjects.start * portraits_per_identity, subjects.stop * portraits_per_identity)
    prompt_embeds = model.encode_prompts([build_prompt(portraits.get_scene(i)) for i in indices])[
        "encoder_hidden_states"
    ]
    clean_latents = torch.from_numpy(np.array(latents[indices.start : indices.stop])).float()
    shape = (len(subjects), portraits_per_identity)
    return TrainingExamples(
        clean_latents.unflatten(0, shape),
        {"encoder_hidden_states": prompt_embeds.unflatten(0, shape)},
    )
