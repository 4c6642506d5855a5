"""LiDB codes fitted to drawn portraits: the regression targets of HyperDreamBooth (2307.06949)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_builder.avatars.captions import build_prompt
from data_builder.avatars.portrait_dataset import PortraitDataset
from data_builder.datamodules.feature_cache import load_cached_latents
from hyperlora.compute import ComputeConfig
from hyperlora.diffusion.diffusion_base import DiffusionBase, load_diffusion_base
from hyperlora.finetuning.config import FineTuneConfig
from hyperlora.finetuning.examples import TrainingExamples
from hyperlora.finetuning.trainer import fine_tune_loras
from hyperlora.lora.heads import LiDB
from hyperlora.lora.weights import LoraWeights
from hyperlora.progress import track


@dataclass(frozen=True)
class LidbTargetConfig:
    """Settings of ``fit_lidb_targets``.

    Attributes:
        num_subjects: Number of identities, the first of the portraits.
        subjects_per_batch: Identities that are fitted together.
        finetune_steps: Optimizer steps.
        lr: Learning rate of Adam.
        preset: Adapted modules.
        rank: Rank of the LoRAs.
        a: Rows of the frozen basis of LiDB (2307.06949, §4.2).
        b: Columns of the frozen basis.
    """

    num_subjects: int = 256
    subjects_per_batch: int = 32
    finetune_steps: int = 150
    lr: float = 1e-2
    preset: str = "attention+mlp"
    rank: int = 1
    a: int = 100
    b: int = 50


def fit_lidb_targets(
    portraits: Path,
    base: str,
    vae: str,
    output_path: Path,
    config: LidbTargetConfig,
    compute: ComputeConfig | None = None,
) -> None:
    """Fit LiDB codes to drawn portraits and write them with their final losses.

    The file (.safetensors) holds ``codes`` [subjects, 2 * targets, code_size] and ``losses``
    [subjects]. It is written after every batch; a second call continues where the first stopped.

    Args:
        portraits: Folder of drawn portraits.
        base: Folder of the base model.
        vae: Folder of the VAE that encodes the portraits.
        output_path: File to write.
        config: Settings of the fit.
        compute: Device and precision of the base model.
    """
    diffusion_base = load_diffusion_base(base, compute)
    layout = diffusion_base.make_layout(config.preset, config.rank)
    lidb = LiDB(layout, config.a, config.b)
    init_codes = lidb.init_codes()  # [2 * targets, code_size]
    lidb.to(diffusion_base.device)
    fine_tune_config = FineTuneConfig(num_steps=config.finetune_steps, lr=config.lr)

    def decode_codes(codes: Tensor) -> LoraWeights:
        down, up = codes.unflatten(-1, init_codes.shape).chunk(2, -2)  # [K, targets, code_size]
        weights: LoraWeights = lidb(down, up)
        return weights

    results = (
        load_file(output_path)
        if output_path.exists()
        else {"codes": torch.zeros(0, *init_codes.shape), "losses": torch.zeros(0)}
    )
    batch_size = config.subjects_per_batch
    batch_starts = list(range(len(results["codes"]), config.num_subjects, batch_size))
    for start in track(batch_starts, "fitting", "subjects", units_per_item=batch_size):
        subjects = range(start, min(start + batch_size, config.num_subjects))
        result = fine_tune_loras(
            diffusion_base,
            _load_examples(diffusion_base, portraits, vae, subjects),
            init_codes.flatten().expand(len(subjects), -1),
            decode_codes,
            fine_tune_config,
        )
        codes = result.codes.cpu()
        results = {
            "codes": torch.cat([results["codes"], codes.unflatten(-1, init_codes.shape)]),
            "losses": torch.cat([results["losses"], result.losses[-20:].mean(0).cpu()]),
        }
        partial_path = output_path.with_suffix(".part")
        save_file(results, partial_path)
        partial_path.rename(output_path)


def _load_examples(
    base: DiffusionBase, folder: Path, vae: str, subjects: range
) -> TrainingExamples:
    """Load all portraits of these subjects with the prompts of their scenes."""
    portraits, cached_latents = PortraitDataset(folder), load_cached_latents(folder, vae)
    portraits_per_identity = portraits.config.portraits_per_identity
    indices = range(subjects.start * portraits_per_identity, subjects.stop * portraits_per_identity)
    prompts = [build_prompt(portraits.get_scene(i)) for i in indices]
    prompt_embeds = base.encode_prompts(prompts)["prompt_embeds"]
    latents = torch.from_numpy(np.array(cached_latents[indices.start : indices.stop])).float()
    shape = (len(subjects), portraits_per_identity)
    return TrainingExamples(
        latents.unflatten(0, shape),  # [subjects, portraits, c, h, w]
        {"prompt_embeds": prompt_embeds.unflatten(0, shape)},
    )
