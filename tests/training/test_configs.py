"""Every YAML in configs/ trains at toy size: two steps, resumed to four, and its output loads.

A configuration runs in a workspace where the paths it names exist, as ``hyperlora train fit
--config`` would run it, with a few arguments that make it small. Configurations that build on one
another do so here too.
"""

import math
import re
import subprocess
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import typer
import yaml
from torch import Tensor

from data_builder.avatars.vocabulary import GEOMETRY
from data_builder.cli import app
from data_builder.datamodules.faces import IDENTITY_VECTOR_DIM
from data_builder.datamodules.portraits import ATTRIBUTES
from hyperlora import pretrained
from hyperlora.encoders.face_analysis import Face, FaceAnalyzer
from hyperlora.errors import InvalidImageError
from hyperlora.pipelines.image_to_lora_base import ImageToLoraBase
from hyperlora.pipelines.lora_diffusion import LoraDiffusion
from hyperlora.pipelines.pair_to_lora import PairToLora
from hyperlora.training import portraits
from hyperlora.training.cli import train
from hyperlora.training.modules import hypernetwork, instruct_pix2pix, pair_hypernetwork
from hyperlora.training.modules.frozen_base import load_training_base
from tests.training.config_rules import (
    CONFIGS,
    NAMES,
    RULES,
    get_run_dir,
    make_command,
    read_config,
)
from tests.training.config_stages import Stages

HEADER = ("trains", "needs", "writes", "time on", "reproduces")


@pytest.fixture(scope="module")
def stages() -> Stages:
    return Stages()


@pytest.fixture(autouse=True)
def frozen_bases(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Run in the workspace; collect the bases that are trained through, and copies of them."""
    monkeypatch.chdir(workspace)
    loaded: list[tuple[Any, Any]] = []

    def load(name: str, **options: Any) -> Any:
        base = load_training_base(name, **options)
        loaded.append((base, deepcopy({c: m.state_dict() for c, m in base.modules.items()})))
        return base

    for module in (hypernetwork, pair_hypernetwork, instruct_pix2pix):
        monkeypatch.setattr(module, "load_training_base", load)
    draw = portraits.generate_images  # pipelines have up to 50 steps by default

    def draw_quickly(*args: Any, **options: Any) -> Any:
        return draw(*args, **{**options, "num_inference_steps": 2})

    monkeypatch.setattr(portraits, "generate_images", draw_quickly)
    return loaded


def test_every_config_has_a_rule() -> None:
    assert set(NAMES) == set(RULES)


@pytest.mark.parametrize("name", NAMES)
def test_config_begins_with_its_header(name: str) -> None:
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    for line, key in zip(lines, HEADER, strict=False):
        assert line.startswith(f"# {key}: ")
    assert all(len(line) <= 100 for line in lines)


@pytest.mark.parametrize("name", NAMES)
def test_config_header_names_the_output(name: str) -> None:
    writes = (CONFIGS / f"{name}.yaml").read_text().splitlines()[2]
    assert writes == f"# writes: {read_config(name)['model']['init_args']['output_dir']}"


def test_config_run_names_are_unique() -> None:
    run_names = [read_config(name)["run_name"] for name in NAMES]
    assert len(set(run_names)) == len(run_names)


def test_vocabulary_equals_data_builder() -> None:
    vocabulary = yaml.safe_load((CONFIGS / "avatars/vocabulary.yaml").read_text())
    assert vocabulary == {name: list(classes) for name, classes in ATTRIBUTES.items()}
    assert list(vocabulary) == list(ATTRIBUTES)
    for name in ("05_latent_classifier", "07_evaluator", "08_photo_encoder"):
        model = read_config(f"avatars/{name}")["model"]["init_args"]
        assert model["attributes"] == "configs/avatars/vocabulary.yaml"
        assert model["geometry"] == list(GEOMETRY)


def test_face_recognizer_config_has_identity_vector_dim() -> None:
    model = read_config("avatars/10_face_recognizer")["model"]["init_args"]
    assert model["identity_vector_dim"] == IDENTITY_VECTOR_DIM


def test_make_avatars_runs_all_stages_in_order(tmp_path: Path) -> None:
    commands = _list_make_commands(tmp_path)
    trained = [re.search(r"--config configs/(\S+)\.yaml", line) for line in commands]
    stages = [match[1] for match in trained if match]
    assert stages == [name for name in NAMES if re.match(r"avatars/\d\d_", name)]


def test_make_avatars_commands_parse(tmp_path: Path) -> None:
    group = typer.main.get_command(app)
    lines = [
        line for line in _list_make_commands(tmp_path) if line.split()[0].endswith("data-builder")
    ]
    assert len(lines) > 15
    for line in lines:
        name, *arguments = line.split()[1:]
        with typer.Context(group) as context:
            group.get_command(context, name).make_context(name, arguments, parent=context)


def test_make_avatars_makes_what_each_step_needs(tmp_path: Path) -> None:
    """Every stage and path that a header or a configuration names comes from an earlier step."""
    made: set[str] = set()  # names of stages, files and folders
    for line in _list_make_commands(tmp_path):
        if match := re.search(r"--config configs/(\S+)\.yaml", line):
            assert match[1] in NAMES, f"{line}: there is no such configuration"
            config = read_config(match[1])
            output_dir = config["model"]["init_args"]["output_dir"]
            inputs = {*_read_needs(match[1]), *_list_paths(config)} - {output_dir}
            outputs = {match[1].removeprefix("avatars/"), output_dir}
        else:
            paths = re.findall(r"(?:-[op] )?\b(?:runs|checkpoints)/\S+", line)
            if line.startswith("cp "):
                paths[-1] = f"-o {paths[-1]}"
            outputs = {path[3:] for path in paths if path.startswith("-")}
            inputs = {path for path in paths if not path.startswith("-")}
        missing = {i for i in inputs if not any(f"{i}/".startswith(f"{m}/") for m in made)}
        assert not missing, f"{line}: no earlier step makes {missing}"
        made |= {output.rstrip("/") for output in outputs}
    assert {"17_vae_decoder", "checkpoints/avatars/pair-to-lora"} <= made


def _read_needs(name: str) -> list[str]:
    """The stages and paths in the second line of a configuration, ``{a,b}`` expanded."""
    line = (CONFIGS / f"{name}.yaml").read_text().splitlines()[1]
    needs = re.findall(r"\b\d\d_\w+|\bruns/[\w/-]+(?:\{[^}]+\})?", line)
    assert needs, f"{name}: {line!r} names no stage and no path"
    split_needs = [need.rstrip("}").partition("{") for need in needs]
    return [stem + part for stem, _, parts in split_needs for part in parts.split(",")]


def _list_paths(value: Any) -> Iterator[str]:
    """All strings in a configuration that are paths of this repository's outputs."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _list_paths(item)
    elif isinstance(value, str) and value.startswith(("runs/", "checkpoints/")):
        yield value


def _list_make_commands(build_dir: Path) -> list[str]:
    """The commands of ``make avatars`` where no stage is finished, one a line."""
    command = ["make", "-n", "avatars", "RUN=", f"DONE={build_dir}/done"]
    done = subprocess.run(
        command, cwd=CONFIGS.parent, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.replace("\\\n", " ").splitlines()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's, about so small a training
@pytest.mark.parametrize("name", NAMES)
def test_config_trains_and_resumes(
    name: str, stages: Stages, frozen_bases: list[tuple[Any, Any]]
) -> None:
    straight = stages.run(name)
    config = read_config(name)["model"]
    model = config["init_args"]
    encoder_is_trained = "PairHypernetwork" in config["class_path"] and not model.get(
        "freeze_encoder"
    )
    has_frozen_encoder = "encoder" in model and not encoder_is_trained
    frozen = ("model.encoder.", "model.codec.", "model.regression.") if has_frozen_encoder else ()
    _check_what_trains(straight.states, (*RULES[name].frozen, *frozen))
    assert straight.losses.keys() == {0, 1, 2, 3}
    assert all(
        math.isfinite(value) for metrics in straight.losses.values() for value in metrics.values()
    )
    _check_output(RULES[name].load(Path(model["output_dir"])))
    if "ValidationPortraits" in (CONFIGS / f"{name}.yaml").read_text():
        assert len(list((get_run_dir(name) / "portraits").glob("*.png"))) == 2

    resumed = stages.resume(name)
    assert resumed.losses == {
        step: pytest.approx(straight.losses[step], rel=1e-5) for step in (2, 3)
    }
    torch.testing.assert_close(resumed.states[4], straight.states[4])
    _check_output(RULES[name].load(Path(model["output_dir"])))

    for base, loaded in frozen_bases:
        for component, module in base.modules.items():
            assert all(p.grad is None for p in module.parameters())
            torch.testing.assert_close(module.state_dict(), loaded[component], rtol=0, atol=0)


@pytest.mark.slow
def test_lora_diffusion_says_where_there_is_no_face(
    stages: Stages,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of some photos a warning; of all, an error before anything is trained."""
    name = "avatars/ablations/difflora"
    for need in RULES[name].needs:
        stages.prepare(need)
    command = [
        *make_command(name),
        f"--run_name={tmp_path / 'run'}",
        f"--model.init_args.output_dir={tmp_path / 'model'}",
    ]
    train([*command, "--data.init_args.num_occlusions=3"])
    assert re.search(r"no face was found in \d+ of 32 photos", caplog.text)
    model = LoraDiffusion.from_pretrained(tmp_path / "model")
    assert model.face_analyzer is not None
    assert model.face_analyzer.pack_dir == (tmp_path / "model/face-pack").resolve()
    assert model.mixture.mode == "gate" and model.photo_size == 128

    def detect_nothing(analyzer: FaceAnalyzer, image: Any) -> list[Face]:
        return []

    monkeypatch.setattr(FaceAnalyzer, "detect_faces", detect_nothing)
    with pytest.raises(InvalidImageError, match="finds no face in any of 16 photos"):
        train(command)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in NAMES
        if not name.startswith("avatars/") and "encoder" in read_config(name)["model"]["init_args"]
    ],
)
def test_config_encoder_is_pretrained_at_its_image_size(name: str) -> None:
    model = read_config(name)["model"]["init_args"]
    assert model["encoder_options"]["pretrained"]
    size = timm.get_pretrained_cfg(model["encoder"]).input_size[-1]
    data = read_config(name)["data"]["init_args"]
    # LoRAs of a build come with their photos, which the model resizes itself
    assert model["encoder_options"]["image_size"] == size == data.get("encoder_size", size)


def _check_what_trains(states: dict[int, dict[str, Tensor]], frozen: tuple[str, ...]) -> None:
    """Between steps 2 and 4, frozen parameters stay and nearly all others change."""
    assert states.keys() == {2, 4}
    changed = {name: not torch.equal(value, states[4][name]) for name, value in states[2].items()}
    frozen_names = {name for name in changed if name.startswith(frozen)}
    assert not any(changed[name] for name in frozen_names)
    statistics = {
        name
        for name in changed
        if name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    }
    trained = [changed[name] for name in changed.keys() - frozen_names - statistics]
    assert sum(trained) > 0.9 * len(trained)
    assert all(value.isfinite().all() for value in states[4].values() if value.is_floating_point())


def _check_output(model: Any) -> None:
    """A hypernetwork, which starts at ΔW = 0, generates LoRAs now."""
    if isinstance(model, ImageToLoraBase):
        photo = Path("photos/train/person-0/0.png")  # noise, without a face
        if getattr(model, "face_analyzer", None) is not None:
            photo = next(pretrained.BENCHMARK_DIR.glob("subjects/*/*"))
        lora = model([photo])
    elif isinstance(model, PairToLora):
        before, after = (Path(f"pairs/validation/0_{side}.png") for side in ("before", "after"))
        lora = model((before, after))
    else:
        return
    norms = lora.weights.compute_delta_norms()
    assert norms.isfinite().all()
    assert norms.max() > 0
