"""``main_callback run_demo``."""

from pathlib import Path
from typing import Annotated

import typer


def run_demo(
    output: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")] = Path("demo"),
    method: Annotated[str, typer.Option(help="hyperdreambooth or difflora.")] = "hyperdreambooth",
    num_subjects: Annotated[
        int, typer.Option(min=1, help="How many people never seen in training.")
    ] = 6,
) -> None:
    """Portraits of people never seen in training, from one photo each: pictures, LoRA files, seconds and scores."""
    import time

    import torch

    from hyperlora import pretrained
    from hyperlora.cli.options import check_output_dir
    from hyperlora.cpu import disable_malloc_trim
    from hyperlora.data.images import to_image
    from hyperlora.diffusion.diffusion_base import load_diffusion_base
    from hyperlora.encoders.attribute_classifier import AttributeClassifier
    from hyperlora.evaluation.benchmark import load_benchmark
    from hyperlora.evaluation.report import draw_contact_sheet
    from hyperlora.evaluation.subject_evaluator import SubjectEvaluator
    from hyperlora.lora.io.load import load_lora
    from hyperlora.lora.io.metadata import LoraMetadata
    from hyperlora.lora.io.save import save_lora
    from hyperlora.lora.weights import LoraWeights
    from hyperlora.pipelines.auto import load_image_to_lora

    check_output_dir(output)
    disable_malloc_trim()
    base = load_diffusion_base(pretrained.BASE_DIR)
    model = load_image_to_lora(method=method, base=base)
    benchmark = load_benchmark(pretrained.BENCHMARK_DIR, base.resolution, num_subjects)
    evaluator = SubjectEvaluator(
        base, AttributeClassifier.from_pretrained(pretrained.EVALUATOR_DIR), benchmark
    )
    model.forward(benchmark.photos[:1, :1])  # warm up, so that the time told is a second photo's

    start_time = time.perf_counter()
    lora = LoraWeights.stack([model.forward(p[None, :1])[0] for p in benchmark.photos])
    seconds_per_lora = (time.perf_counter() - start_time) / len(lora)
    output.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(benchmark.names):
        metadata = LoraMetadata(
            title=name, architecture=base.architecture, trigger_phrase="sks person"
        )
        save_lora(lora[i], output / f"{name}.safetensors", metadata=metadata)
        save_lora(lora[i], output / f"{name}.kohya.safetensors", format="kohya", metadata=metadata)

    results = {
        "without LoRA": evaluator.evaluate("without LoRA", None, None),
        "LoRA from one photo": evaluator.evaluate("with LoRA", lora),
    }
    finetuned_paths = [
        pretrained.BENCHMARK_DIR / "fitted" / f"{name}.safetensors" for name in benchmark.names
    ]
    if all(file.is_file() for file in finetuned_paths):
        finetuned_loras = LoraWeights.stack(
            [load_lora(file, model.layout).weights for file in finetuned_paths]
        )
        results["LoRA fitted to it"] = evaluator.evaluate("fitted", finetuned_loras)
    baseline_result, lora_result, *finetuned_results = results.values()
    prompt_indices = range(min(5, len(benchmark.prompts)))
    titles = [
        "photo",
        "same prompt, no LoRA",
        *(_strip_subject(benchmark.prompts[p].prompt) for p in prompt_indices),
    ]
    grid = [
        [
            to_image(benchmark.photos[s, 0]),
            baseline_result.images[s][0],
            *(lora_result.images[s][p] for p in prompt_indices),
        ]
        + [result.images[s][0] for result in finetuned_results]
        for s in range(len(lora))
    ]
    draw_contact_sheet(
        [*titles, *(["LoRA fitted to the photo"] if finetuned_results else [])], grid, cell_size=160
    ).save(output / "demo.png")

    from rich.console import Console
    from rich.table import Table

    table = Table("", "identity I", "prompt P", title=f"{len(lora)} people never seen in training")
    for name, result in results.items():
        table.add_row(name, str(result.identity), str(result.prompt_accuracy or "–"))
    Console().print(table)
    typer.echo(
        f"{seconds_per_lora * 1000:.0f} ms from photo to LoRA on {torch.get_num_threads()} threads"
    )
    typer.echo(f"pictures: {output / 'demo.png'}; LoRA files (diffusers and kohya): {output}")
    _run_edit_demo(output)


def _run_edit_demo(output_dir: Path) -> None:
    """``edits.png``: one edit of every kind shown by a pair, on three people never seen in training, and undone."""
    from hyperlora import pretrained
    from hyperlora.data.images import stack_images, to_image
    from hyperlora.diffusion.diffusion_base import load_diffusion_base
    from hyperlora.diffusion.image_editing import blend_edit_region, edit_images
    from hyperlora.encoders.attribute_classifier import AttributeClassifier
    from hyperlora.evaluation.edit_benchmark import load_edit_benchmark
    from hyperlora.evaluation.edit_evaluator import EditEvaluator
    from hyperlora.evaluation.edit_suite import generate_pair_loras
    from hyperlora.evaluation.report import draw_contact_sheet
    from hyperlora.lora.io.metadata import LoraMetadata
    from hyperlora.lora.io.save import save_lora
    from hyperlora.pipelines.pair_to_lora import PairToLora

    edit_base = load_diffusion_base(pretrained.EDIT_BASE_DIR)
    pair_to_lora = PairToLora.from_pretrained(pretrained.PAIR_TO_LORA_DIR, base=edit_base)
    benchmark = load_edit_benchmark(pretrained.EDIT_BENCHMARK_DIR, edit_base.resolution)
    edit_evaluator = EditEvaluator(
        edit_base,
        AttributeClassifier.from_pretrained(pretrained.EVALUATOR_DIR),
        benchmark,
        num_inference_steps=pair_to_lora.num_inference_steps,
    )
    generate_pair_loras(pair_to_lora, benchmark, 1)  # warm up
    _, seconds_per_lora = generate_pair_loras(pair_to_lora, benchmark, 1)
    lora, seconds_with_search = generate_pair_loras(pair_to_lora, benchmark, 1, base=edit_base)
    edited_images = edit_evaluator.render_edits("edits", lora, edit_evaluator.inputs)
    reconstructed_images = edit_evaluator.render_edits(
        "asked for nothing", None, edit_evaluator.inputs
    )
    result = edit_evaluator.score_images(
        "edits", blend_edit_region(edit_evaluator.inputs, edited_images, reconstructed_images)
    )
    first_indices = [
        sum(len(e.test_pairs) for e in benchmark.edits[:i]) for i in range(len(benchmark.edits))
    ]
    reverse_loras, _ = generate_pair_loras(
        pair_to_lora, benchmark, 1, swap_sides=True, base=edit_base
    )
    first_edited_images, seeds = result.images[first_indices], [0] * len(first_indices)
    restored_images = stack_images(
        edit_images(
            edit_base,
            first_edited_images,
            reverse_loras,
            seeds=seeds,
            num_inference_steps=edit_evaluator.num_inference_steps,
            preserve_unedited=True,
        )
    )
    grid = []
    for i, (edit, first_index) in enumerate(zip(benchmark.edits, first_indices, strict=True)):
        metadata = LoraMetadata(title=edit.name, architecture=edit_base.architecture)
        save_lora(lora[i], output_dir / "edits" / f"{edit.name}.safetensors", metadata=metadata)
        row_images = [edit.example_pairs[0, 0], edit.example_pairs[0, 1]]
        for j, image_pair in enumerate(edit.test_pairs[:3]):
            row_images += [image_pair[0], result.images[first_index + j]]
        grid.append([to_image(x) for x in (*row_images, restored_images[i])])
    subject_titles = [title for n in range(3) for title in (f"person {n + 1}", "edited alike")]
    draw_contact_sheet(["before", "after", *subject_titles, "undone again"], grid).save(
        output_dir / "edits.png"
    )
    for group in benchmark.groups:
        accuracy, preservation = (
            result.compute_score("accuracy", group),
            result.compute_score("preservation", group),
        )
        typer.echo(f"edits, {group}: right {accuracy}, the rest kept {preservation}")
    typer.echo(
        f"{seconds_per_lora * 1000:.0f} ms from a pair to a LoRA, {seconds_with_search * 1000:.0f} with further words tried"
    )
    typer.echo(f"pictures: {output_dir / 'edits.png'}; LoRA files: {output_dir / 'edits'}")


def _strip_subject(prompt: str) -> str:
    """The part of a prompt after who it is about."""
    return prompt.split(", ", 1)[-1]
