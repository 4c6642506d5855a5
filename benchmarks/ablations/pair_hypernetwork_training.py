"""Parts of the training of a pair hypernetwork: variants trained for equally many steps, side by
side.

    python -m benchmarks.ablations.pair_hypernetwork_training runs/data/edits-validation-benchmark
        [--steps 200] [--batch-size 10] [--variants NAME ...]

All variants start from the encoder of the released network and an untrained decoder. Those with an
instruction head start from the released head. They are compared on validation identities, by their
edits and by the denoising loss: with a pair's own LoRA, with another pair's, and of the reversed
edit.
"""

import argparse
from pathlib import Path
from typing import Any, Final

import lightning as L
import torch
import yaml
from PIL import Image

from data_builder.datamodules.edits import PairDataModule
from hyperlora import pretrained
from hyperlora.cpu import disable_malloc_trim
from hyperlora.data.images import to_image
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.diffusion.image_editing import edit_images
from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.evaluation.edit_benchmark import EditBenchmark, load_edit_benchmark
from hyperlora.evaluation.edit_evaluator import EditEvaluator
from hyperlora.evaluation.edit_suite import evaluate_reversal, generate_pair_loras
from hyperlora.evaluation.report import draw_contact_sheet
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.pair_to_lora import PairToLora
from hyperlora.training.modules.pair_hypernetwork import PairHypernetworkTraining

Options = dict[str, Any]
OUTPUT_DIR: Final = Path("runs/pair-hypernetwork-variants")
GROUP: Final = "seen kinds"
NO_INSTRUCTION_HEAD: Final[Options] = {
    "instruction_loss_weight": 0.0,
    "network": {"instruction_head": None},
}
PAPER: Final[Options] = {
    "instruction_loss_weight": 0.0,
    "reverse_weight": 1.0,
    "swap_prob": 0.5,
    "network": {"instruction_head": None, "antisymmetric": False},
}
VARIANTS: Final[dict[str, Options]] = {
    "released": {},
    "no reverse loss": {"reverse_weight": 0.0},
    "no swap": {"swap_prob": 0.0},
    "no instruction head": NO_INSTRUCTION_HEAD,
    "mirrored target": {"target_pair": "mirrored"},
    "no instruction head, difference fusion": {
        **NO_INSTRUCTION_HEAD,
        "network": {"instruction_head": None, "fusion": "difference"},
    },
    "LoRA of Change": PAPER,
    "LoRA of Change, no reverse loss": {**PAPER, "reverse_weight": 0.0},
    "LoRA of Change, no swap": {**PAPER, "swap_prob": 0.0},
    "LoRA of Change, softmax basis": {
        **PAPER,
        "network": {**PAPER["network"], "head": "softmax", "head_options": {"size": 12}},
    },
}
"""Options of ``PairHypernetworkTraining`` that differ from the config, and ``target_pair`` of the
data.

"LoRA of Change" is the training of the paper (2411.19156).
"""
COLUMNS: Final = (
    "variant",
    "loss (own pair)",
    "loss (shuffled pair)",
    "loss (reverse)",
    "accuracy",
    "edit progress",
    "leakage",
    "reversal error",
)


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", help="Edit benchmark of validation identities.")
    parser.add_argument("--config", default="configs/avatars/16_pair_hypernetwork.yaml")
    parser.add_argument(
        "--network-config",
        default="configs/avatars/15_pair_instructions.yaml",
        help="Config whose network options are used.",
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument(
        "--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME"
    )
    arguments = parser.parse_args()
    disable_malloc_trim()
    config = yaml.safe_load(Path(arguments.config).read_text())
    config["data"]["init_args"]["batch_size"] = arguments.batch_size
    network_config = yaml.safe_load(Path(arguments.network_config).read_text())
    network = network_config["model"]["init_args"]["network"]
    released = PairToLora.from_pretrained(pretrained.PAIR_TO_LORA_DIR)
    network["instruction_head"] = released.network.config["instruction_head"]
    config["model"]["init_args"] |= {"network": network, "start_from": None}
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|")
    reversed_images: dict[str, list[Image.Image]] = {}
    for name in arguments.variants:
        cells, reversed_images[name] = train_variant(
            config, name, arguments.steps, arguments.folder
        )
        print(f"| {' | '.join([name, *cells])} |", flush=True)
    base = load_diffusion_base(pretrained.EDIT_BASE_DIR)
    benchmark = load_edit_benchmark(arguments.folder, base.resolution)
    sheet_path = OUTPUT_DIR / "reversal.png"
    _make_contact_sheet(benchmark, reversed_images).save(sheet_path)
    print(f"targets after the negated LoRAs: {sheet_path}")


def train_variant(
    config: Options, name: str, num_steps: int, folder: str
) -> tuple[list[str], list[Image.Image]]:
    """Train one variant and evaluate it.

    Args:
        config: Training config of the released network.
        name: One of ``VARIANTS``.
        num_steps: Optimizer steps.
        folder: Edit benchmark.

    Returns:
        Cells of its row, and the first target of each edit after the negated LoRA.
    """
    L.seed_everything(0, verbose=False)
    released = PairToLora.from_pretrained(pretrained.PAIR_TO_LORA_DIR)
    model_options, data_options = _make_options(config, name, released)
    module = PairHypernetworkTraining(**model_options)
    module.model.encoder.load_state_dict(released.encoder.state_dict())
    instruction_head = module.model.network.instruction_head
    released_head = released.network.instruction_head
    if instruction_head is not None and released_head is not None:
        instruction_head.load_state_dict(released_head.state_dict())
    trainer = L.Trainer(
        max_steps=num_steps,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=PairDataModule(**data_options))
    losses = _compute_losses(module, data_options)
    evaluator = EditEvaluator(
        module.base,
        AttributeClassifier.from_pretrained(pretrained.EVALUATOR_DIR),
        load_edit_benchmark(folder, module.base.resolution),
        released.num_inference_steps,
    )
    loras, _ = generate_pair_loras(module.model.eval(), evaluator.benchmark, 1)
    result = evaluator.evaluate("one pair", loras)
    scores = [
        str(result.compute_score(metric, GROUP))
        for metric in ("accuracy", "edit_progress", "leakage")
    ]
    reversal = evaluate_reversal(evaluator, module.model)
    cells = [*losses, *scores, str(reversal.negated_lora)]
    return cells, generate_reversals(evaluator, loras)


def generate_reversals(evaluator: EditEvaluator, loras: LoraWeights) -> list[Image.Image]:
    """Apply the negated LoRA of each edit to its first target.

    Args:
        evaluator: Benchmark and edit base.
        loras: One LoRA per edit.

    Returns:
        One image per edit.
    """
    targets = torch.stack([edit.test_pairs[0, 1] for edit in evaluator.benchmark.edits])
    return edit_images(
        evaluator.base,
        targets,
        -loras,
        seeds=[0] * len(targets),
        num_inference_steps=evaluator.num_inference_steps,
    )


def _make_options(config: Options, name: str, released: PairToLora) -> tuple[Options, Options]:
    """Options of the module and of the data module for a variant."""
    base_options, data_options = config["model"]["init_args"], dict(config["data"]["init_args"])
    overrides = dict(VARIANTS[name])
    data_options["target_pair"] = overrides.pop("target_pair", "other_identity")
    network = {**base_options["network"], **overrides.pop("network", {})}
    encoder_config = released.encoder.config
    model_options = {
        **base_options,
        **overrides,
        "network": network,
        "encoder": encoder_config["name"],
        "encoder_options": {
            key: value for key, value in encoder_config.items() if key not in ("name", "license")
        },
        "output_dir": str(OUTPUT_DIR / "-".join(name.replace(",", "").split())),
    }
    if data_options["target_pair"] == "mirrored":
        # mirrored images have no labels, and their features are not cached
        model_options |= {"attribute_classifier": None, "attribute_loss_weight": 0.0}
        data_options |= {"encoder": None, "encoder_options": None}
    return model_options, data_options


def _make_contact_sheet(
    benchmark: EditBenchmark, reversed_images: dict[str, list[Image.Image]], num_rows: int = 8
) -> Image.Image:
    """Draw input, target and reversals of the first edits of different kinds."""
    kinds = [edit.kind for edit in benchmark.edits]
    selected = [kinds.index(kind) for kind in dict.fromkeys(kinds)][:num_rows]
    grid = [
        [
            *(to_image(image) for image in benchmark.edits[i].test_pairs[0]),
            *(images[i] for images in reversed_images.values()),
        ]
        for i in selected
    ]
    titles = ["input", "target", *(f"reversal: {name}" for name in reversed_images)]
    return draw_contact_sheet(titles, grid, row_labels=[kinds[i] for i in selected])


def _compute_losses(module: PairHypernetworkTraining, data_options: Options) -> list[str]:
    """Denoising losses on validation identities: own pair, shuffled pair, reversed edit."""
    trainer = L.Trainer(
        logger=False, enable_checkpointing=False, precision="bf16-mixed", enable_model_summary=False
    )
    datamodule = PairDataModule(**{**data_options, "target_pair": "other_identity"})
    (metrics,) = trainer.validate(module, datamodule=datamodule, verbose=False)
    return [f"{metrics[f'val/loss_{case}']:.3f}" for case in ("own", "shuffled", "reverse")]


if __name__ == "__main__":
    main()
