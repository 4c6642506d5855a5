"""What a diffusion model over LoRAs hears of a photo: the face alone, the picture alone, both evenly, or gated.

    data-builder run runs/avatars/build; data-builder run runs/avatars/build-validation
    data-builder components runs/avatars/build -o runs/avatars/lora-components
    python benchmarks/mixtures.py runs/avatars/build runs/avatars/build-validation [--steps 2000] [--people 64]

Each is trained for as many steps with the settings of ``configs/draw_portraits/difflora.yaml``, on the same features: frozen
networks look at every photo once. I and P are of held-out people, one photo each; differences are person by person.
"""

import argparse
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader

from benchmarks.ablations.codec_heldout import make_held_out_evaluation
from data_builder.datamodules.lora_photos import LoraPhotoDataset
from hyperlora import pretrained
from hyperlora.cpu import disable_malloc_trim
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.evaluation.benchmark import load_benchmark
from hyperlora.evaluation.subject_evaluator import SubjectEvaluator
from hyperlora.models.image_feature_mixer import GATE_MODES
from hyperlora.pipelines.config import LoraSampling
from hyperlora.training.modules.lora_diffusion import LoraDiffusionTraining


def train_model(
    settings: dict[str, Any], mode: str, dataset: LoraPhotoDataset, steps: int, batch_size: int
) -> LoraDiffusionTraining:
    L.seed_everything(0, verbose=False)
    mixture = settings["mixture"] | {"mode": mode}
    module = LoraDiffusionTraining(
        **settings | {"mixture": mixture, "out": f"{settings['out']}-{mode}"}
    )
    average = EMAWeightAveraging(decay=0.998, update_starting_at_step=steps // 10)
    loader = DataLoader(dataset, batch_size, shuffle=True, drop_last=True)
    L.Trainer(
        max_steps=steps,
        gradient_clip_val=1.0,
        callbacks=[average],
        logger=False,
        enable_checkpointing=False,
    ).fit(module, loader)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--config", type=Path, default=Path("configs/avatars/difflora.yaml"))
    parser.add_argument("--face-pack", default=str(pretrained.FACE_PACK_DIR))
    parser.add_argument("--modes", nargs="+", default=list(GATE_MODES), choices=GATE_MODES)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--people", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--sampling-steps", type=int, default=4)
    arguments = parser.parse_args()
    disable_malloc_trim()
    config = yaml.safe_load(arguments.config.read_text())
    settings = config["model"]["init_args"] | {"face_pack": arguments.face_pack}
    views, batch_size = (config["data"]["init_args"][name] for name in ("views", "batch_size"))
    base = load_diffusion_base(pretrained.BASE_DIR)
    prompts = load_benchmark(pretrained.BENCHMARK_DIR, base.resolution, 1).prompts[
        : arguments.prompts
    ]
    reader = AttributeClassifier.from_pretrained(pretrained.EVALUATOR_DIR)
    evaluation = make_held_out_evaluation(
        arguments.dataset,
        arguments.held_out,
        lambda found: SubjectEvaluator(base, reader, found, 10),
        prompts,
        base.resolution,
        arguments.people,
    )
    dataset, rows = None, {}
    baseline = evaluation.evaluate_original()
    for mode in arguments.modes:
        if dataset is None:
            dataset = LoraPhotoDataset(
                str(arguments.dataset),
                "train",
                LoraDiffusionTraining(**settings).model,
                views,
                False,
            )
        model = train_model(settings, mode, dataset, arguments.steps, batch_size).model.eval()
        rows[mode] = evaluation.evaluate_sampler(
            mode, model, baseline, LoraSampling(0, arguments.sampling_steps), 1
        )
        print(
            f"{mode}: I {rows[mode].row.identity}, P {rows[mode].row.prompt}, cosine {rows[mode].cosine:.3f}"
        )
    best = max(
        (m for m in rows if m in ("face", "image")),
        key=lambda m: rows[m].row.identity.mean,
        default=None,
    )
    for mode in rows:
        if best is not None and mode != best:
            difference = rows[mode].row.identity.above(rows[best].row.identity)
            print(f"{mode} above {best}: {difference.mean:+.3f} ± {difference.error:.3f}")


if __name__ == "__main__":
    main()
