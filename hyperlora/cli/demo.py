"""``hyperlora demo``."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from hyperlora.cli.compute_options import ComputeOptions, add_compute_options

if TYPE_CHECKING:
    from hyperlora.compute import ComputeConfig
    from hyperlora.evaluation.benchmark import Benchmark
    from hyperlora.evaluation.edit_evaluator import EditEvaluator, EditResult
    from hyperlora.evaluation.subject_evaluator import SubjectResult
    from hyperlora.lora.weights import LoraWeights

_MAX_SHEET_PROMPTS: Final = 5
"""Prompts with a column of their own in ``demo.png``."""
_IMAGES_PER_EDIT: Final = 3
"""Edited images of each edit in ``edits.png``."""


@add_compute_options("--device cpu")
def run_demo(
    *,
    compute_options: ComputeOptions,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")] = Path("demo"),
    method: Annotated[str, typer.Option(help="hypernetwork or lora-diffusion.")] = "hypernetwork",
    num_subjects: Annotated[
        int, typer.Option(min=1, help="Test subjects, never seen in training.")
    ] = 6,
) -> None:
    """Generate LoRAs of test subjects and edits with the bundled models; show images and scores."""
    import torch

    from hyperlora import pretrained
    from hyperlora.cli.options import check_output_dir
    from hyperlora.cpu import disable_malloc_trim
    from hyperlora.diffusion.diffusion_base import load_diffusion_base
    from hyperlora.encoders.attribute_classifier import AttributeClassifier
    from hyperlora.evaluation.benchmark import load_benchmark
    from hyperlora.evaluation.subject_evaluator import SubjectEvaluator
    from hyperlora.evaluation.subject_suite import BASELINE_NAME
    from hyperlora.lora.io.save import save_lora
    from hyperlora.lora.weights import LoraWeights
    from hyperlora.pipelines.auto import load_image_to_lora

    check_output_dir(output)
    disable_malloc_trim()
    compute = compute_options.make_config()
    base = load_diffusion_base(pretrained.BASE_DIR, compute)
    model = load_image_to_lora(method=method, base=base, compute=compute)
    benchmark = load_benchmark(pretrained.BENCHMARK_DIR, base.resolution, num_subjects)
    classifier = AttributeClassifier.from_pretrained(pretrained.EVALUATOR_DIR)
    evaluator = SubjectEvaluator(base, classifier.to(compute.torch_device), benchmark)
    model.forward(benchmark.photos[:1, :1])  # warm-up, which the time below leaves out

    start_time = time.perf_counter()
    loras = LoraWeights.stack([model.forward(photos[None, :1])[0] for photos in benchmark.photos])
    loras = loras.to("cpu")  # which waits for an accelerator
    seconds_per_lora = (time.perf_counter() - start_time) / len(loras)
    output.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(benchmark.names):
        metadata = model.make_metadata(name, [])
        save_lora(loras[i], output / f"{name}.safetensors", metadata=metadata)

    base_result = evaluator.evaluate(BASELINE_NAME, None)
    lora_result = evaluator.evaluate("one photo", loras)
    _draw_subject_sheet(benchmark, base_result, lora_result, output / "demo.png")
    _print_scores([base_result, lora_result], f"{len(loras)} test subjects")
    is_cpu = compute.torch_device.type == "cpu"
    processor = f"{torch.get_num_threads()} threads" if is_cpu else str(compute.torch_device)
    typer.echo(f"{seconds_per_lora * 1000:.0f} ms from photo to LoRA on {processor}")
    typer.echo(f"images: {output / 'demo.png'}; LoRA files: {output}")
    _run_edit_demo(output, compute)


def _draw_subject_sheet(
    benchmark: "Benchmark",
    base_result: "SubjectResult",
    lora_result: "SubjectResult",
    output_path: Path,
) -> None:
    """Write a row per subject: photo, base, and LoRA by prompt."""
    from hyperlora.data.contact_sheet import draw_contact_sheet
    from hyperlora.data.images import to_image

    prompts = [_strip_subject(prompt.prompt) for prompt in benchmark.prompts[:_MAX_SHEET_PROMPTS]]
    titles = ["photo", "same prompt, no LoRA", *prompts]
    grid = [
        [
            to_image(benchmark.photos[subject, 0]),
            base_result.images[subject][0],
            *lora_result.images[subject][: len(prompts)],
        ]
        for subject in range(len(benchmark.names))
    ]
    draw_contact_sheet(titles, grid, cell_size=160).save(output_path)


def _print_scores(results: "list[SubjectResult]", title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("LoRA", "identity", "prompt accuracy", title=title)
    for result in results:
        table.add_row(result.name, str(result.identity), str(result.prompt_accuracy or "–"))
    Console().print(table)


def _run_edit_demo(output_dir: Path, compute: "ComputeConfig") -> None:
    """Write ``edits.png`` and LoRA files: one edit of every kind and its reversal."""
    from hyperlora import pretrained
    from hyperlora.diffusion.diffusion_base import load_diffusion_base
    from hyperlora.diffusion.image_editing import blend_edit_region
    from hyperlora.encoders.attribute_classifier import AttributeClassifier
    from hyperlora.evaluation.edit_benchmark import load_edit_benchmark
    from hyperlora.evaluation.edit_evaluator import EditEvaluator
    from hyperlora.evaluation.edit_suite import generate_pair_loras
    from hyperlora.lora.io.save import save_lora
    from hyperlora.pipelines.pair_to_lora import PairToLora

    base = load_diffusion_base(pretrained.EDIT_BASE_DIR, compute)
    model = PairToLora.from_pretrained(pretrained.PAIR_TO_LORA_DIR, base=base, compute=compute)
    benchmark = load_edit_benchmark(pretrained.EDIT_BENCHMARK_DIR, base.resolution)
    evaluator = EditEvaluator(
        base,
        AttributeClassifier.from_pretrained(pretrained.EVALUATOR_DIR).to(compute.torch_device),
        benchmark,
        num_inference_steps=model.num_inference_steps,
    )
    generate_pair_loras(model, benchmark, 1)  # warm-up
    _, seconds_per_lora = generate_pair_loras(model, benchmark, 1)
    loras, seconds_with_search = generate_pair_loras(model, benchmark, 1, base=base)
    reverse_loras, _ = generate_pair_loras(model, benchmark, 1, swap_sides=True, base=base)
    edited_images = evaluator.render_edits("edits", loras, evaluator.inputs)
    unedited_images = evaluator.render_edits("no LoRA", None, evaluator.inputs)
    blended_images = blend_edit_region(evaluator.inputs, edited_images, unedited_images)
    result = evaluator.score_images("edits", blended_images)
    _draw_edit_sheet(evaluator, result, reverse_loras, output_dir / "edits.png")
    for i, edit in enumerate(benchmark.edits):
        metadata = model.make_metadata(edit.name, [])
        save_lora(loras[i], output_dir / "edits" / f"{edit.name}.safetensors", metadata=metadata)
    for group in benchmark.groups:
        accuracy = result.compute_score("accuracy", group)
        preservation = result.compute_score("preservation", group)
        typer.echo(f"edits, {group}: accuracy {accuracy}, preservation {preservation}")
    typer.echo(
        f"{seconds_per_lora * 1000:.0f} ms from a pair to a LoRA, "
        f"{seconds_with_search * 1000:.0f} with instruction search"
    )
    typer.echo(f"images: {output_dir / 'edits.png'}; LoRA files: {output_dir / 'edits'}")


def _draw_edit_sheet(
    evaluator: "EditEvaluator",
    result: "EditResult",
    reverse_loras: "LoraWeights",
    output_path: Path,
) -> None:
    """Write a row per edit: the pair, three inputs with their edits, and the first edit undone."""
    from hyperlora.data.contact_sheet import draw_contact_sheet
    from hyperlora.data.images import stack_images, to_image
    from hyperlora.diffusion.image_editing import edit_images

    edits = evaluator.benchmark.edits
    first_indices = [sum(len(e.test_pairs) for e in edits[:i]) for i in range(len(edits))]
    restored_images = stack_images(
        edit_images(
            evaluator.base,
            result.images[first_indices],
            reverse_loras,
            seeds=[0] * len(edits),
            num_inference_steps=evaluator.num_inference_steps,
            preserve_unedited=True,
        )
    )
    grid = []
    for i, (edit, first_index) in enumerate(zip(edits, first_indices, strict=True)):
        row_images = [edit.example_pairs[0, 0], edit.example_pairs[0, 1]]
        for j, image_pair in enumerate(edit.test_pairs[:_IMAGES_PER_EDIT]):
            row_images += [image_pair[0], result.images[first_index + j]]
        grid.append([to_image(pixels) for pixels in (*row_images, restored_images[i])])
    titles = ["before", "after"]
    for number in range(1, _IMAGES_PER_EDIT + 1):
        titles += [f"subject {number}", "edited"]
    draw_contact_sheet([*titles, "edit undone"], grid).save(output_path)


def _strip_subject(prompt: str) -> str:
    """Return what follows the subject in a prompt."""
    return prompt.split(", ", 1)[-1]
