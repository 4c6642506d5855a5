"""Builds: a plan decides every row; a run may be killed at any moment; packing, reading."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from data_builder.build.chunk_store import Chunks, alone
from data_builder.build.make_plan import make_plan
from data_builder.build.plan import Plan, Recipe, read_plan, write_plan
from data_builder.build.run import run
from data_builder.build.subject_data import material
from data_builder.build.trainer import Farm
from data_builder.cli import app
from data_builder.sources.crops import crop_of
from data_builder.sources.sources import Avatars, Folder, Hub, opened, source_of, to_dict
from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.diffusion.diffusion_base import load_base
from hyperlora.errors import BadRequest
from hyperlora.lora.merge import relative_error
from hyperlora.lora.weights import LoraWeights

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six subjects: some a file, some a folder of two or three."""
    folder, draw = tmp_path_factory.mktemp("photos"), random.Random(0)
    for s in range(6):
        home = folder if s % 2 else folder / f"person-{s}"
        home.mkdir(exist_ok=True)
        for p in range(1 if s % 2 else 2 + s // 4):
            image = Image.new("RGB", (24, 20), tuple(draw.randrange(256) for _ in range(3)))
            image.paste(tuple(draw.randrange(256) for _ in range(3)), (4, 4, 12, 12))
            image.save(home / (f"person-{s}.png" if s % 2 else f"{p}.png"))
    (folder / "person-0" / "0.txt").write_text("{} in a garden")
    return folder


def recipe(bundle: Any, **more: Any) -> Recipe:
    facts = {"preset": "attention", "rank": 2, "steps": 4, "at_once": 2, "every": 2, "lr": 1e-2, "rows": "float32"}
    return Recipe(str(bundle.base), **{**facts, **more})


def built(bundle: Any, photos: Path, folder: Path, **more: Any) -> LoraDataset:
    write_plan(make_plan(Folder(str(photos)), recipe(bundle, **more)), folder)
    run(folder)
    return LoraDataset(folder)


def near(one: LoraWeights, other: LoraWeights) -> bool:
    """But for rounding, which Adam's first steps magnify where a gradient is almost nothing."""
    return relative_error(one, other) < 0.02


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted((folder / "chunks").iterdir())}


def test_a_plan_survives_its_file(bundle: Any, photos: Path) -> None:
    plan = make_plan(Folder(str(photos)), recipe(bundle), crop=crop_of("none"), views=2, validation=0.5)
    again = Plan.from_json(plan.to_json())
    assert again == plan and again.digest == plan.digest
    assert len(plan.rows) == 12 and len({row.seed for row in plan.rows}) == 12
    assert {row.split for row in plan.rows} == {"train", "validation"}
    other = make_plan(Folder(str(photos)), recipe(bundle, steps=5), crop=crop_of("none"), views=2, validation=0.5)
    assert other.digest != plan.digest and [r.seed for r in other.rows] == [r.seed for r in plan.rows]


def test_rows_do_not_depend_on_interruptions_or_neighbours(bundle: Any, photos: Path, tmp_path: Path) -> None:
    whole = built(bundle, photos, tmp_path / "whole")
    assert len(whole) == 6 and whole.records[0].subject == "person-0"
    assert [len(r.images) for r in whole.records] == [2, 1, 2, 1, 3, 1]
    interrupted = tmp_path / "interrupted"
    write_plan(read_plan(tmp_path / "whole"), interrupted)
    base = load_base(bundle.base)
    chunks = Chunks(read_plan(interrupted), interrupted)
    chunks.write(2, Farm(chunks.plan, base).chunk(2), 1.0)
    (interrupted / "chunks" / ".000001.safetensors.x.tmp").write_bytes(b"half")
    assert run(interrupted) == 4
    assert all_bytes(interrupted) == all_bytes(tmp_path / "whole")
    assert run(interrupted) == 0
    one_by_one = built(bundle, photos, tmp_path / "single", at_once=1)
    for i in range(6):
        assert near(one_by_one.lora(i), whole.lora(i))


def test_early_stop_ends_subjects_apart_and_keeps_their_best(bundle: Any, photos: Path, tmp_path: Path) -> None:
    free = built(bundle, photos, tmp_path / "free", steps=12, lr=0.3)
    early = built(bundle, photos, tmp_path / "early", steps=12, lr=0.3, patience=1)
    assert {r.steps for r in free.records} == {12}
    assert min(r.steps for r in early.records) < 12
    for before, after in zip(early.records, free.records, strict=True):
        assert before.before == after.before and before.after >= after.after - 1e-5  # type: ignore[operator]
        assert before.after <= before.before  # type: ignore[operator]
    alone_ = built(bundle, photos, tmp_path / "alone", steps=12, lr=0.3, patience=1, at_once=1)
    for i in range(6):
        assert alone_.records[i].steps == early.records[i].steps
        assert near(alone_.lora(i), early.lora(i))


@pytest.mark.parametrize("space", ["locon", "lidb", "loha", "lokr"])
def test_every_space_gives_plain_loras_that_lower_the_loss(
    bundle: Any, photos: Path, tmp_path: Path, space: str
) -> None:
    made = built(bundle, photos, tmp_path, space=space, rank=4, steps=30, at_once=3)
    assert made.layout.rank == 4 and len(made) == 6
    assert any(s.kernel for s in made.layout.sites) == (space == "locon")
    assert all(r.after < r.before for r in made.records)  # type: ignore[operator]
    assert float(made.lora(range(6)).norms().sum(-1).min()) > 0


def test_starts(bundle: Any, photos: Path, tmp_path: Path) -> None:
    plain = built(bundle, photos, tmp_path / "shared", steps=2)
    for start, source in (("zero", ""), ("mean", str(tmp_path / "shared")), ("network", str(bundle.model))):
        write_plan(make_plan(Folder(str(photos)), recipe(bundle, start=start, start_from=source)), tmp_path / start)
    base, plan = load_base(bundle.base), read_plan(tmp_path / "mean")
    start = Farm(plan, base).start(plan.chunk(0), [])
    mean = plain.lora(range(6)).mean()
    for got, expected in zip(LoraWeights.unflatten(plain.layout, start)[0].delta(), mean.delta(), strict=True):
        assert torch.allclose(got, expected, atol=1e-6)
    plan = read_plan(tmp_path / "zero")
    own = Farm(plan, base).start(plan.chunk(0), [])
    assert not torch.equal(own[0], own[1])
    run(tmp_path / "network")
    network = LoraDataset(tmp_path / "network")
    assert float(network.lora(0).norms().min()) > 0, "a network's LoRA changes every site"
    shared = Farm(read_plan(tmp_path / "shared"), base).start(plan.chunk(0), [])
    assert torch.equal(shared[0], shared[1])


def test_a_networks_loras_are_fitted_from_as_they_are(bundle: Any, photos: Path) -> None:
    """Not only the same ΔW: factors turned by SVD have nothing in common from row to row."""
    plan = make_plan(Folder(str(photos)), recipe(bundle, start="network", start_from=str(bundle.model)))
    farm = Farm(plan, load_base(bundle.base))
    assert farm.network is not None
    materials = [material(row, farm.source, farm.base, plan.recipe) for row in plan.rows]
    wanted = [farm.network.forward(m.pixels[None]).flatten() for m in materials]
    torch.testing.assert_close(farm.start(plan.rows, materials), torch.cat(wanted))


def test_dreambooth_options(bundle: Any, photos: Path, tmp_path: Path) -> None:
    from data_builder.build.subject_data import class_prompts, material

    options = {"prior_images": 3, "templates": ("a photo of {}", "{} at sea"), "variants": 2, "held_out": 1}
    plan = make_plan(Folder(str(photos)), recipe(bundle, **options, identifier="ohwx dog", class_name="a dog"))
    base = load_base(bundle.base)
    assert class_prompts(plan.recipe) == ["a photo of a dog", "a dog at sea", "a photo of a dog"]
    first = material(plan.rows[0], Folder(str(photos)), base, plan.recipe)
    assert first.examples.latents.shape[:2] == (1, 2), "one photo learned, twice cropped, under its own caption"
    assert first.measure.latents.shape[:2] == (1, 2), "the other photo measures, under both templates"
    one = material(plan.rows[1], Folder(str(photos)), base, plan.recipe)
    assert one.examples.latents.shape[1] == 4, "a single photo learns and measures: two crops, two templates"
    write_plan(plan, tmp_path)
    run(tmp_path)
    stamp = (tmp_path / "class.safetensors").read_bytes()
    without = built(bundle, photos, tmp_path / "without", **{**options, "prior_images": 0}, identifier="ohwx dog")
    assert not torch.allclose(LoraDataset(tmp_path)[0], without[0])
    (tmp_path / "chunks" / "000001.safetensors").unlink()
    before = all_bytes(tmp_path)
    run(tmp_path)
    assert (tmp_path / "class.safetensors").read_bytes() == stamp
    assert all(all_bytes(tmp_path)[name] == data for name, data in before.items())


def test_bfloat16_and_checkpointing(bundle: Any, photos: Path, tmp_path: Path) -> None:
    plain = built(bundle, photos, tmp_path / "a")
    saving = built(bundle, photos, tmp_path / "b", checkpointing=True)
    half = built(bundle, photos, tmp_path / "c", dtype="bfloat16", rows="bfloat16")
    assert torch.allclose(saving[0], plain[0], atol=1e-4)
    assert half[0].dtype == torch.bfloat16 and torch.allclose(half[0].float(), plain[0], atol=0.05)
    assert half.records[0].after < half.records[0].before * 1.01  # type: ignore[operator]


def test_sdxl_in_bfloat16_with_checkpointing(bundle: Any, photos: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    pipe = StableDiffusionPipeline.from_pretrained(bundle.base)
    torch.manual_seed(6)
    unet = UNet2DConditionModel.from_config(
        pipe.unet.config,
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    text = CLIPTextModelWithProjection(CLIPTextConfig(**pipe.text_encoder.config.to_dict() | {"projection_dim": 16}))
    parts = (pipe.vae, pipe.text_encoder, text, pipe.tokenizer, pipe.tokenizer, unet, pipe.scheduler)
    xl = StableDiffusionXLPipeline(*parts, add_watermarker=False)
    xl.to(torch.float16).save_pretrained(tmp_path / "tiny" / "xl", variant="fp16")
    facts = {"base": str(tmp_path / "tiny" / "xl"), "variant": "fp16", "dtype": "bfloat16", "checkpointing": True}
    plan = make_plan(Folder(str(photos)), replace(recipe(bundle, steps=8, prior_images=2), **facts), limit=3)
    write_plan(plan, tmp_path / "build")
    run(tmp_path / "build")
    made = LoraDataset(tmp_path / "build")
    assert made.layout.base == "tiny/xl" and len(made) == 3
    assert all(r.after < r.before for r in made.records)  # type: ignore[operator]


def test_bad_photos_are_named_and_the_rest_goes_on(bundle: Any, photos: Path, tmp_path: Path) -> None:
    import shutil

    mixed = tmp_path / "photos"
    shutil.copytree(photos, mixed)
    (mixed / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (mixed / "empty").mkdir()
    (mixed / "person-0" / "9.jpg").write_bytes(b"no image")
    out = tmp_path / "build"
    arguments = ["plan", mixed, "-o", out, "--base", bundle.base, "--steps", 2, "--at-once", 3, "--rank", 2]
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == 0, done.output
    plan = read_plan(out)
    assert len(plan.rows) == 6
    for name in ("broken.png", "empty", "9.jpg"):
        assert sum(name in line for line in plan.skipped) == 1 and name in done.stderr
    Image.new("RGB", (9, 9)).save(mixed / "person-1.png")  # another photo since the plan
    (mixed / "person-3.png").unlink()
    run(out)
    assert [r.subject for r in LoraDataset(out).records] == ["person-0", "person-2", "person-4", "person-5"]
    shown = CliRunner().invoke(app, ["status", str(out), "--json"])
    found = json.loads(shown.stdout)
    assert (found["finished"], found["planned"], found["rows"]) == (6, 6, 4)
    assert any("another than when the plan was made" in line for line in found["skipped"])
    assert any("person-3.png" in line and "no file" in line for line in found["skipped"])


def test_what_cannot_be_is_said(bundle: Any, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "build"
    write_plan(make_plan(Folder(str(photos)), recipe(bundle)), out)
    base = ["--base", str(bundle.base)]
    for arguments, sentence in (
        (["plan", "avatars:5-5", "-o", "x"], "avatars:FIRST-LAST"),
        (["plan", str(tmp_path / "nowhere"), "-o", str(tmp_path / "x"), *base], "neither a folder of photos nor a"),
        (["plan", str(photos), "-o", str(out), *base], "holds another plan"),
        (["plan", str(photos), "-o", str(tmp_path / "x"), "--template", "no place"], "must name the subject once"),
        (["plan", str(photos), "-o", str(tmp_path / "x"), "--start", "mean"], "--start-from"),
        (["plan", str(photos), "-o", str(tmp_path / "x"), "--space", "lidb", "--start", "network"], "lidb fits its"),
        (["run", str(tmp_path)], "holds no plan.json"),
        (["pack", str(out), "-o", str(tmp_path / "x")], "no chunk"),
    ):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 2, (arguments, done.output)
        assert sentence in done.stderr and done.stderr.strip().startswith("error: ")
    assert not (tmp_path / "x").exists()
    with alone(out), pytest.raises(BadRequest, match="another run is at work"):
        run(out)


def test_as_many_subjects_as_a_gpu_holds() -> None:
    from data_builder.build.batch_size import within

    gib = 2**30
    assert within(80 * gib, 8 * gib, 10 * gib) == 31  # 8 + 30 · 2 GiB are 85 % of 80 GiB
    assert within(8 * gib, 9 * gib, 12 * gib) == 1 and within(80 * gib, gib, gib + 1) == 256


def test_packing_keeps_rows_and_their_order(bundle: Any, photos: Path, tmp_path: Path) -> None:
    made = built(bundle, photos, tmp_path / "build", rows="float16")
    done = CliRunner().invoke(
        app, ["pack", str(tmp_path / "build"), "-o", str(tmp_path / "out"), "--rows-per-shard", "4"]
    )
    assert done.exit_code == 0, done.output
    packed = LoraDataset(tmp_path / "out")
    assert packed.records == made.records and packed.layout == made.layout
    assert torch.equal(packed[:], made[:]) and len(packed.shards) == 2
    assert torch.equal(packed[[5, 0, 4]], torch.stack([made[5], made[0], made[4]]))
    assert torch.equal(packed[-1], made[5])
    (tmp_path / "build" / "chunks" / "000001.safetensors").unlink()
    refused = CliRunner().invoke(app, ["pack", str(tmp_path / "build"), "-o", str(tmp_path / "out")])
    assert refused.exit_code == 2 and "1 of 3 chunks are not finished" in refused.stderr
    assert len(LoraDataset(tmp_path / "out")) == 6


def test_sources_survive_the_plan_and_know_their_subjects(photos: Path, tmp_path: Path) -> None:
    import datasets

    rows = {"image": [str(photos / "person-1.png"), str(photos / "person-3.png")] * 2, "celeb_id": [7, 8, 7, 9],
            "text": ["a", "b", "c", ""]}  # fmt: skip
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    made.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "parquet").mkdir()
    made.to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    nothing = dict.fromkeys(("image", "subject", "caption"))
    for where in ("saved", "parquet"):
        source = source_of(str(tmp_path / where), each=1, size=16, split="train", columns=nothing)
        assert isinstance(source, Hub) and opened(to_dict(source)) == source
        found = list(source.subjects([]))
        assert [(s.name, s.photos) for s in found] == [("7", (("0", "a"), ("2", "c"))), ("8", (("1", "b"),)),
                                                       ("9", (("3", None),))]  # fmt: skip
        image, digest = source.read("2")
        assert image.size == (24, 20) and len(digest) == 64
    people = source_of("avatars:1000000-1000002", each=3, size=32, split="train", columns=nothing)
    assert people == Avatars(1_000_000, 1_000_002, 3, 32) and opened(to_dict(people)) == people
    assert [s.split for s in people.subjects([])] == ["validation"] * 2
    assert people.read("1000000/1")[0].size == (32, 32)


@pytest.mark.slow
def test_a_killed_run_loses_and_repeats_nothing(bundle: Any, photos: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments, the last ones after chunks were finished; then to the end."""
    plan = make_plan(Folder(str(photos)), recipe(bundle, steps=6, at_once=1), views=3)
    write_plan(plan, tmp_path / "whole")
    run(tmp_path / "whole")
    out = tmp_path / "killed"
    write_plan(plan, out)
    draw, kills = random.Random(1), 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for _ in range(2):
        child = subprocess.Popen([sys.executable, "-m", "data_builder", "run", str(out)], env=environment,
                                 stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)  # fmt: skip
        before = len(Chunks(plan, out).done())
        while child.poll() is None and len(Chunks(plan, out).done()) < min(before + 3, plan.chunks - 1):
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.05))
        kills += child.poll() is None
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert kills and 0 < len(Chunks(plan, out).done()) < plan.chunks
    run(out)
    assert all_bytes(out) == all_bytes(tmp_path / "whole")
