"""What each part of the pair network's training brings: variants trained for equally many steps, side by side.

    python benchmarks/edit_variants.py runs/data/edits-validation-benchmark [--steps 200] [--batch 10] [--only NAME...]

All begin with the encoder of the bundle's pair network, those that say words with its words, and an untrained decoder;
they are compared on validation people: the denoising loss with a pair's own LoRA, with another pair's and of undoing,
and the edits that are made.
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

OUTPUT_DIR: Final = Path("runs/edit-variants")
NO_INSTRUCTION_HEAD: Final[dict[str, Any]] = {"telling": 0.0, "network": {"words": None}}
PAPER: Final[dict[str, Any]] = {
    "telling": 0.0,
    "reverse": 1.0,
    "exchange": 0.5,
    "network": {"words": None, "antisymmetric": False},
}
VARIANTS: Final[dict[str, dict[str, Any]]] = {
    "as in the bundle": {},
    "no reverse": {"reverse": 0.0},
    "no exchange": {"exchange": 0.0},
    "no words": NO_INSTRUCTION_HEAD,
    "the pair itself, mirrored": {"target": "mirrored"},
    "no words, difference of tokens": {
        **NO_INSTRUCTION_HEAD,
        "network": {"words": None, "join": "difference"},
    },
    "as published": PAPER,
    "as published, no reverse": {**PAPER, "reverse": 0.0},
    "as published, no exchange": {**PAPER, "exchange": 0.0},
    "as published, softmax basis": {
        **PAPER,
        "network": {**PAPER["network"], "head": "softmax", "head_options": {"size": 12}},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="Edits of validation people to make.")
    parser.add_argument("--config", default="configs/avatars/pair_to_lora.yaml")
    parser.add_argument(
        "--network",
        default="configs/avatars/pair_to_lora_words.yaml",
        help="Config of its network.",
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument(
        "--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME"
    )
    arguments = parser.parse_args()
    disable_malloc_trim()
    config = yaml.safe_load(Path(arguments.config).read_text())
    config["data"]["init_args"]["batch_size"] = arguments.batch
    network = yaml.safe_load(Path(arguments.network).read_text())["model"]["init_args"]["network"]
    network["words"] = PairToLora.from_pretrained(pretrained.PAIR_TO_LORA_DIR).network.config[
        "words"
    ]
    config["model"]["init_args"] |= {"network": network, "start_from": None}
    print("| variant | own | another's | undoing | accuracy | made | leakage | undone to |")
    print("|---" * 8 + "|")
    reversed_images: dict[str, list[Image.Image]] = {}
    for name in arguments.only:
        cells, reversed_images[name] = _train_variant(
            config, name, arguments.steps, arguments.folder
        )
        print(f"| {name} |", *cells, sep=" ", flush=True)
    base = load_diffusion_base(pretrained.EDIT_BASE_DIR)
    sheet = _make_contact_sheet(
        load_edit_benchmark(arguments.folder, base.resolution), reversed_images
    )
    sheet.save(OUTPUT_DIR / "undone.png")
    print(f"what the negatives make of the answers: {OUTPUT_DIR / 'undone.png'}")


def _train_variant(
    config: dict[str, Any], name: str, steps: int, folder: str
) -> tuple[list[str], list[Image.Image]]:
    """The cells of one variant's line, and what the negatives of its LoRAs make of the answers."""
    L.seed_everything(0, verbose=False)
    base_options, data = config["model"]["init_args"], dict(config["data"]["init_args"])
    overrides = dict(VARIANTS[name])
    data["target"] = overrides.pop("target", "other")
    network = {**base_options["network"], **overrides.pop("network", {})}
    out = OUTPUT_DIR / "-".join(name.replace(",", "").split())
    released = PairToLora.from_pretrained(pretrained.PAIR_TO_LORA_DIR)
    vision = released.encoder.config
    options = {
        **base_options,
        **overrides,
        "network": network,
        "encoder": vision["name"],
        "out": str(out),
    }
    if (
        data["target"] == "mirrored"
    ):  # nothing is known of what these show, and they are mirrored anew each time
        options |= {"reader": None, "reading_weight": 0.0}
        data |= {"encoder": None, "encoder_options": None}
    options["encoder_options"] = {k: v for k, v in vision.items() if k not in ("name", "licence")}
    model = PairHypernetworkTraining(**options)
    model.model.encoder.load_state_dict(released.encoder.state_dict())
    if (
        wording := model.model.network.instruction_head
    ) is not None and released.network.instruction_head is not None:
        wording.load_state_dict(released.network.instruction_head.state_dict())
    trainer = L.Trainer(
        max_steps=steps,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=PairDataModule(**data))
    losses = _compute_losses(model, data)
    base = model.base
    benchmark = load_edit_benchmark(folder, base.resolution)
    judge = EditEvaluator(
        base,
        AttributeClassifier.from_pretrained(pretrained.EVALUATOR_DIR),
        benchmark,
        released.num_inference_steps,
    )
    loras = generate_pair_loras(model.model.eval(), benchmark, 1)[0]
    row = judge.evaluate("one pair", loras)
    scores = [
        f"{row.compute_score(metric, 'seen kinds')}" for metric in ("accuracy", "made", "leakage")
    ]
    reversal = evaluate_reversal(judge, model.model)
    return [f"{cell} |" for cell in (*losses, *scores, reversal.negated_lora)], generate_reversals(
        judge, loras
    )


def generate_reversals(judge: EditEvaluator, loras: LoraWeights) -> list[Image.Image]:
    """What the negative of each edit's LoRA makes of its first answer."""
    answers = torch.stack([edit.test_pairs[0, 1] for edit in judge.benchmark.edits])
    return edit_images(
        judge.base,
        answers,
        -loras,
        seeds=[0] * len(answers),
        num_inference_steps=judge.num_inference_steps,
    )


def _make_contact_sheet(
    benchmark: EditBenchmark, reversed_images: dict[str, list[Image.Image]], rows: int = 8
) -> Image.Image:
    """The first edits of different kinds: the picture before, the answer, and what each variant undoes it to."""
    kinds = [edit.kind for edit in benchmark.edits]
    chosen = [kinds.index(kind) for kind in dict.fromkeys(kinds)][:rows]
    pairs = [[to_image(benchmark.edits[i].test_pairs[0, side]) for side in (0, 1)] for i in chosen]
    grid = [
        [*pair, *(made[i] for made in reversed_images.values())]
        for pair, i in zip(pairs, chosen, strict=True)
    ]
    titles = ["before", "the answer", *(f"undone: {name}" for name in reversed_images)]
    return draw_contact_sheet(titles, grid, row_labels=[kinds[i] for i in chosen])


def _compute_losses(model: PairHypernetworkTraining, data: dict[str, Any]) -> list[str]:
    """Denoising losses of validation people: with the own pair's LoRA, another's, and of undoing."""
    trainer = L.Trainer(
        logger=False, enable_checkpointing=False, precision="bf16-mixed", enable_model_summary=False
    )
    (logged,) = trainer.validate(
        model, datamodule=PairDataModule(**{**data, "target": "other"}), verbose=False
    )
    return [f"{logged[f'val/{case}']:.3f}" for case in ("own", "shuffled", "reverse")]


if __name__ == "__main__":
    main()
