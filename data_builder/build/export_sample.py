"""What is worth shipping of a dataset instead of itself: its recipe, its statistics and a few rows."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from data_builder.build.plan import Plan, Recipe, read_plan
from hyperlora.data.lora_dataset import TABLE, LoraDataset, write_table
from hyperlora.data.lora_shards import shard_bytes
from hyperlora.errors import BadRequest
from hyperlora.lora.io.safetensors_file import encoded, write_bytes

RECIPE = "recipe.json"
STATISTICS = "statistics/rows.safetensors"
"""In a folder of its own: all ``*.safetensors`` of a dataset's folder are shards."""


def ship(dataset: Path, out: Path, most: int = 2_000_000, with_statistics: bool = True) -> int:
    """Write ``out/recipe.json`` (recipe, source, counts), ``statistics/rows.safetensors`` (mean and std of all rows,
    fp16; codecs of the dataset hold them too), and a dataset of evenly spread rows, together under ``most`` bytes; how
    many rows.

    Raises ``BadRequest`` if not even one row fits.
    """
    data, plan = LoraDataset(dataset), read_plan(dataset)
    scale = data.scale()
    tensors = {"mean": scale.mean.half(), "std": scale.std.half()} if with_statistics else {}
    statistics = encoded(tensors, {"rows": str(len(data))}) if tensors else b""
    recipe = json.dumps(_facts(plan, data), indent=1).encode()
    one = shard_bytes(data[[0]], data.layout, data.records[:1])
    header = len(one) - data[0].nbytes
    n = min(len(data), (most - len(statistics) - len(recipe) - header - 20_000) // data[0].nbytes)
    if n < 1:
        raise BadRequest(f"one LoRA of {data[0].nbytes:,} bytes does not fit into {most:,}: ship a smaller rank")
    chosen = [i * len(data) // n for i in range(n)]
    write_bytes(shard_bytes(data[chosen], data.layout, ()), out / "loras-00000.safetensors")
    write_table([data.records[i] for i in chosen], out / TABLE)
    if statistics:
        write_bytes(statistics, out / STATISTICS)
    write_bytes(recipe, out / RECIPE)
    return n


def read_recipe(file: Path) -> Recipe:
    """The recipe of ``recipe.json`` (or of a ``plan.json``). Raises ``BadRequest`` if it holds none."""
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))["recipe"]
        return Recipe(**{**facts, "templates": tuple(facts["templates"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadRequest(f"{str(file)!r} holds no recipe: a recipe.json or plan.json was expected") from error


def _facts(plan: Plan, data: LoraDataset) -> dict[str, object]:
    after = torch.tensor([r.after for r in data.records if r.after is not None])
    before = torch.tensor([r.before for r in data.records if r.before is not None])
    recipe = {**asdict(plan.recipe), "base": data.layout.base}
    source = {k: v for k, v in plan.source.items() if k != "where"}
    return {
        "recipe": recipe, "source": source, "subjects": len(data.subjects), "rows": len(data),
        "loss_before": float(before.mean()) if len(before) else None,
        "loss_after": float(after.mean()) if len(after) else None,
    }  # fmt: skip
