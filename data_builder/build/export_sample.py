"""Small samples of a dataset for distribution: its recipe, its statistics and a few rows."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Final

import torch

from data_builder.build.plan import Plan, Recipe, read_plan
from hyperlora.data.lora_dataset import TABLE_NAME, LoraDataset, write_table
from hyperlora.data.lora_shards import serialize_shard
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.safetensors_file import serialize_tensors, write_bytes

RECIPE_FILE: Final = "recipe.json"
STATISTICS_FILE: Final = "statistics/rows.safetensors"
"""In a folder of its own, since all ``*.safetensors`` in a dataset's folder are shards."""


_TABLE_BYTES: Final = 20_000
"""Bytes reserved for the table of the rows."""


def export_dataset_sample(
    dataset: Path, output_dir: Path, max_bytes: int = 2_000_000, with_statistics: bool = True
) -> int:
    """Write ``recipe.json``, ``statistics/rows.safetensors`` and a dataset of evenly spread rows.

    Args:
        dataset: Folder of a build or pack, with its plan.
        output_dir: Folder to write.
        max_bytes: Limit of all files together.
        with_statistics: Whether to write mean and standard deviation of all rows (fp16). A codec of
            the dataset holds them too.

    Returns:
        Number of rows written.

    Raises:
        InvalidArgumentError: If not even one row fits.
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
    row_bytes = max_bytes - len(statistics) - len(recipe) - header_bytes - _TABLE_BYTES
    num_rows = min(len(data), row_bytes // data[0].nbytes)
    if num_rows < 1:
        raise InvalidArgumentError(
            f"one LoRA of {data[0].nbytes:,} bytes does not fit into {max_bytes:,} bytes: "
            "raise --max-bytes, or export a dataset of smaller rank"
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
    """Read the recipe of a ``recipe.json`` or ``plan.json``.

    Raises:
        InvalidArgumentError: If the file holds no recipe.
    """
    try:
        recipe_fields = json.loads(file.read_text(encoding="utf-8"))["recipe"]
        templates = tuple(recipe_fields["prompt_templates"])
        return Recipe(**{**recipe_fields, "prompt_templates": templates})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidArgumentError(
            f"{str(file)!r} holds no recipe: a recipe.json or plan.json was expected"
        ) from error


def _make_dataset_info(plan: Plan, data: LoraDataset) -> dict[str, object]:
    """Recipe, source, counts and mean losses of a dataset, as JSON."""
    best_losses = torch.tensor(
        [record.best_loss for record in data.records if record.best_loss is not None]
    )
    initial_losses = torch.tensor(
        [record.initial_loss for record in data.records if record.initial_loss is not None]
    )
    recipe = {**asdict(plan.recipe), "base": data.layout.base}
    source = {k: v for k, v in plan.source.items() if k != "path"}
    return {
        "recipe": recipe,
        "source": source,
        "subjects": len(data.subjects),
        "rows": len(data),
        "initial_loss": float(initial_losses.mean()) if len(initial_losses) else None,
        "best_loss": float(best_losses.mean()) if len(best_losses) else None,
    }
