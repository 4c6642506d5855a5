"""Gates between face and image features of a diffusion model over LoRAs (DiffLoRA's MIF).

    data-builder run runs/avatars/build; data-builder run runs/avatars/build-validation
    data-builder fit-pca runs/avatars/build -o runs/avatars/lora-components
    python -m benchmarks.ablations.image_feature_mixing runs/avatars/build
        runs/avatars/build-validation [--steps 2000] [--num-subjects 64]

Each gate is trained for equally many steps with the settings of ``--config``, on the same features,
which frozen networks compute once per photo. Scores are of held-out subjects, one photo each, and
are compared subject by subject.
"""

import argparse
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader

from benchmarks.ablations.codec_heldout import CodecResult, make_held_out_evaluation
from data_builder.datamodules.lora_photos import LoraPhotoDataset
from hyperlora import pretrained
from hyperlora.cpu import disable_malloc_trim
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.evaluation.benchmark import load_benchmark
from hyperlora.evaluation.subject_evaluator import SubjectEvaluator
from hyperlora.models.image_feature_mixer import GATE_MODES
from hyperlora.pipelines.config import LoraSampling
from hyperlora.training.batches import LoraPhotoBatch
from hyperlora.training.modules.lora_diffusion import LoraDiffusionTraining

CONFIG_PATH = Path("configs/avatars/12_lora_diffusion.yaml")


def train_model(
    options: dict[str, Any], gate: str, dataset: LoraPhotoDataset, num_steps: int, batch_size: int
) -> LoraDiffusionTraining:
    """Train a diffusion model with one gate.

    Args:
        options: Options of ``LoraDiffusionTraining``.
        gate: One of ``GATE_MODES``.
        dataset: LoRA latents with image features.
        num_steps: Optimizer steps.
        batch_size: LoRAs per step.

    Returns:
        The trained module.
    """
    L.seed_everything(0, verbose=False)
    output_dir = f"{options['output_dir']}-{gate}"
    mixture = options["mixture"] | {"mode": gate}
    module = LoraDiffusionTraining(**options | {"mixture": mixture, "output_dir": output_dir})
    average = EMAWeightAveraging(decay=0.998, update_starting_at_step=num_steps // 10)
    loader = DataLoader(
        dataset, batch_size, shuffle=True, drop_last=True, collate_fn=LoraPhotoBatch.collate
    )
    trainer = L.Trainer(
        max_steps=num_steps,
        gradient_clip_val=1.0,
        callbacks=[average],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, loader)
    return module


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--config", type=Path, default=CONFIG_PATH)
    parser.add_argument("--face-pack", default=str(pretrained.FACE_PACK_DIR))
    parser.add_argument("--gates", nargs="+", default=list(GATE_MODES), choices=GATE_MODES)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--num-subjects", type=int, default=64)
    parser.add_argument("--num-prompts", type=int, default=4)
    parser.add_argument("--sampling-steps", type=int, default=4)
    arguments = parser.parse_args()
    disable_malloc_trim()
    config = yaml.safe_load(arguments.config.read_text())
    options = config["model"]["init_args"] | {"face_pack": arguments.face_pack}
    data_options = config["data"]["init_args"]
    num_views, batch_size = data_options["num_views"], data_options["batch_size"]
    base = load_diffusion_base(pretrained.BASE_DIR)
    benchmark = load_benchmark(pretrained.BENCHMARK_DIR, base.resolution, 1)
    classifier = AttributeClassifier.from_pretrained(pretrained.EVALUATOR_DIR)
    evaluation = make_held_out_evaluation(
        arguments.dataset,
        arguments.held_out,
        lambda held_out: SubjectEvaluator(base, classifier, held_out, 10),
        benchmark.prompts[: arguments.num_prompts],
        base.resolution,
        arguments.num_subjects,
    )
    original = evaluation.evaluate_original()
    encoder_model = LoraDiffusionTraining(**options).model
    dataset = LoraPhotoDataset(str(arguments.dataset), "train", encoder_model, num_views, False)
    sampling = LoraSampling(0, arguments.sampling_steps)
    results: dict[str, CodecResult] = {}
    for gate in arguments.gates:
        module = train_model(options, gate, dataset, arguments.steps, batch_size)
        results[gate] = evaluation.evaluate_sampler(
            gate, module.model.eval(), original, sampling, 1
        )
        scores = results[gate].scores
        print(
            f"{gate}: identity {scores.identity}, prompt accuracy {scores.prompt_accuracy}, "
            f"cosine {results[gate].delta_cosine:.3f}"
        )
    ungated = [gate for gate in results if gate in ("face", "image")]
    if not ungated:
        return
    best = max(ungated, key=lambda gate: results[gate].scores.identity.mean)
    for gate, result in results.items():
        if gate != best:
            difference = result.scores.identity.compute_paired_difference(
                results[best].scores.identity
            )
            print(f"{gate} above {best}: {difference.mean:+.3f} ± {difference.standard_error:.3f}")


if __name__ == "__main__":
    main()
