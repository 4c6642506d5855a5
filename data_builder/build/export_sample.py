"""What is worth shipping of a dataset instead of itself: its recipe, its statistics and a few rows."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from data_builder.build.plan import Plan, Recipe, read_plan
from hyperlora.data.lora_dataset import TABLE_NAME, LoraDataset, write_table
from hyperlora.data.lora_shards import serialize_shard
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.safetensors_file import serialize_tensors, write_bytes

RECIPE_FILE = "recipe.json"
STATISTICS_FILE = "statistics/rows.safetensors"
"""In a folder of its own: all ``*.safetensors`` of a dataset's folder are shards."""


def export_dataset_sample(
    dataset: Path, output_dir: Path, max_bytes: int = 2_000_000, with_statistics: bool = True
) -> int:
    """Write ``output_dir/recipe.json`` (recipe, source, counts), ``statistics/rows.safetensors`` (mean and std of all rows,
    fp16; codecs of the dataset hold them too), and a dataset of evenly spread rows, together under ``max_bytes`` bytes; how
    many rows.

    Raises ``InvalidArgumentError`` if not even one row fits.
    """
    data, plan = LoraDataset(dataset), read_plan(dataset)
    normalizer = data.fit_normalizer()
    tensors = (
        {"mean": normalizer.mean.half(), "std": normalizer.std.half()} if with_statistics else {}
    )
    statistics = serialize_tensors(tensors, {"rows": str(len(data))}) if tensors else b""
    recipe = json.dumps(_make_dataset_info(plan, data), indent=1).encode()
    single_shard = serialize_shard(data[[0]], data.layout, data.records[:1])
    header_bytes = len(single_shard) - data[0].nbytes
    num_rows = min(
        len(data),
        (max_bytes - len(statistics) - len(recipe) - header_bytes - 20_000) // data[0].nbytes,
    )
    if num_rows < 1:
        raise InvalidArgumentError(
            f"one LoRA of {data[0].nbytes:,} bytes does not fit into {max_bytes:,}: ship a smaller rank"
        )
    indices = [i * len(data) // num_rows for i in range(num_rows)]
    write_bytes(
        serialize_shard(data[indices], data.layout, ()), output_dir / "loras-00000.safetensors"
    )
    write_table([data.records[i] for i in indices], output_dir / TABLE_NAME)
    if statistics:
        write_bytes(statistics, output_dir / STATISTICS_FILE)
    write_bytes(recipe, output_dir / RECIPE_FILE)
    return num_rows


def read_recipe(file: Path) -> Recipe:
    """The recipe of ``recipe.json`` (or of a ``plan.json``). Raises ``InvalidArgumentError`` if it holds none."""
    try:
        recipe_fields = json.loads(file.read_text(encoding="utf-8"))["recipe"]
        return Recipe(**{**recipe_fields, "templates": tuple(recipe_fields["templates"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidArgumentError(
            f"{str(file)!r} holds no recipe: a recipe.json or plan.json was expected"
        ) from error


def _make_dataset_info(plan: Plan, data: LoraDataset) -> dict[str, object]:
    best_losses = torch.tensor([r.best_loss for r in data.records if r.best_loss is not None])
    initial_losses = torch.tensor(
        [r.initial_loss for r in data.records if r.initial_loss is not None]
    )
    recipe = {**asdict(plan.recipe), "base": data.layout.base}
    source = {k: v for k, v in plan.source.items() if k != "where"}
    return {
        "recipe": recipe,
        "source": source,
        "subjects": len(data.subjects),
        "rows": len(data),
        "loss_before": float(initial_losses.mean()) if len(initial_losses) else None,
        "loss_after": float(best_losses.mean()) if len(best_losses) else None,
    }
