"""``--device`` and its like in every command, on a mock of a CUDA card; memory that runs out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from typer.testing import CliRunner

from data_builder.cli import app as data_builder_app
from hyperlora import pretrained
from hyperlora.compute import ComputeConfig
from hyperlora.diffusion import diffusion_base
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.lora.io.load import load_lora
from tests.conftest import Bundle
from tests.mock_cuda import mock_cuda
from tests.tiny_pipelines import mark_heavy

RunCommand = Callable[..., Any]
CPU_NUMBERS: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
"""Files of the CPU by command, which several tests compare with."""
VERBS = ("render", "edit", "generate", "evaluate", "evaluate-edits", "demo", "serve")


@pytest.fixture
def arguments(
    bundle: Bundle, lora_diffusion_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[Any]]:
    """The arguments of a short run of each command, on the tiny bundle."""
    for name, folder in {
        "BASE_DIR": bundle.base,
        "IMAGE_TO_LORA_DIR": bundle.model,
        "LORA_DIFFUSION_DIR": lora_diffusion_dir,
        "EVALUATOR_DIR": bundle.evaluator,
        "BENCHMARK_DIR": bundle.benchmark,
        "EDIT_BASE_DIR": bundle.edit_base,
        "PAIR_TO_LORA_DIR": bundle.pair_model,
        "EDIT_BENCHMARK_DIR": bundle.edit_benchmark,
        "MODEL_DIR_BY_METHOD": {"hypernetwork": bundle.model, "lora-diffusion": lora_diffusion_dir},
    }.items():
        monkeypatch.setattr(pretrained, name, folder)
    folder = bundle.edit_benchmark / "inverted"
    pair = [folder / "shown-0_before.png", folder / "shown-0_after.png"]
    short = ["--num-subjects", 2, "--steps", 1]
    return {
        "render": ["render", "--prompt", "a b", "-o", tmp_path / "x.png", "--steps", 1],
        "edit": [
            *("edit", *pair, "--images", pair[0], "--images-dir", tmp_path / "edited"),
            *("-o", tmp_path / "edit.safetensors", "--steps", 1),
        ],
        "generate": ["generate", bundle.photo, "-o", tmp_path / "x.safetensors"],
        "evaluate": ["evaluate", "--json", *short],
        "evaluate-edits": ["evaluate", "--task", "edit", "--json", *short],
        "demo": ["demo", "-o", tmp_path / "demo", "--num-subjects", 2],
        "serve": ["serve", "--port", 0, "--no-ui", "--state-dir", tmp_path / "state"],
    }


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[ComputeConfig]:
    """The configurations that bases are loaded with; a server ends before it starts."""
    configs: list[ComputeConfig] = []
    place_pipeline = diffusion_base.place_pipeline

    def record_config(family: Any, compute: ComputeConfig) -> None:
        configs.append(compute)
        place_pipeline(family, ComputeConfig(device=compute.device))

    monkeypatch.setattr(diffusion_base, "place_pipeline", record_config)
    monkeypatch.setattr("hyperlora.cli.serve._run_server", lambda *_: None)
    return configs


@pytest.mark.parametrize("verb", mark_heavy(VERBS, VERBS[:5]))
def test_options_reach_the_base(
    run: RunCommand, arguments: dict[str, list[Any]], loaded: list[ComputeConfig], verb: str
) -> None:
    options = ["--device", "cuda:0", "--dtype", "float32", "--offload", "model"]
    options += ["--vae-tiling", "--compile"]
    extra = ["--refine-steps", 1] if verb == "generate" else []
    with mock_cuda():
        result = run(*arguments[verb], *extra, *options)
        expected = ComputeConfig(
            device="cuda:0", dtype="float32", offload="model", vae_tiling=True, compile=True
        )
    assert result.code == 0, result
    assert loaded and all(compute == expected for compute in loaded)
    description = "cuda:0 (Mock), float32, offload model, VAE tiling, compiled"
    assert result.err.splitlines().count(f"running on {description}") == 1
    if "--json" in arguments[verb]:
        json.loads(result.out)


@pytest.mark.parametrize("verb", mark_heavy(VERBS, VERBS[:5]))
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--device", "gpu"], "unknown device 'gpu'; known: auto, cpu, cuda, cuda:N, mps"),
        (["--device", "cuda:7"], "device 'cuda:7' is not there: torch finds 0 of the kind cuda"),
        (["--dtype", "int8"], "unknown dtype 'int8'; known: auto, float32, bfloat16, float16"),
        (["--offload", "disk"], "unknown offload 'disk'; known: none, model, sequential, group"),
    ],
)
def test_wrong_names_are_refused(
    run: RunCommand, arguments: dict[str, list[Any]], verb: str, options: list[str], sentence: str
) -> None:
    result = run(*arguments[verb], *options)
    assert result.code == 2 and result.err.startswith("error: "), result
    assert sentence in result.err and not result.out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["plan", "avatars:0-1", "-o", "x", "--device", "cpu"], "No such option"),
        (["run", "x", "--device", "gpu"], "holds no plan"),
        (["run", "x", "--dtype", "float32"], "No such option"),
        (["audit", "x", "--device", "cpu"], "holds no plan"),
    ],
)
def test_data_builder_takes_the_dtype_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(data_builder_app, options)
    assert result.exit_code == 2 and sentence in result.stderr


# ---- whole commands on the mock card ----


def read_numbers(folder: Path) -> dict[str, torch.Tensor]:
    """The pixels of all images and the numbers of all LoRAs in a folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    numbers = {}
    for file in files:
        name = str(file.relative_to(folder))
        if file.suffix == ".safetensors":
            numbers[name] = load_lora(file).weights.flatten()
        elif file.suffix == ".png" and file.stem != "scores":  # a plot that shows seconds
            numbers[name] = torch.frombuffer(
                bytearray(Image.open(file).tobytes()), dtype=torch.uint8
            )
    return numbers


def run_on_both(run: RunCommand, folder: Path, *arguments: Any, offload: str = "none") -> None:
    """Run a command on the CPU and on the mock card, and compare the files that it writes."""
    options = ["--dtype", "float32"]
    key = tuple(str(argument).replace(str(folder), "") for argument in arguments)
    if key not in CPU_NUMBERS:
        result = run(*arguments, *options, "--device", "cpu")
        assert result.code == 0, result
        CPU_NUMBERS[key] = read_numbers(folder)
    expected = CPU_NUMBERS[key]
    with mock_cuda():
        result = run(*arguments, *options, "--offload", offload)
    assert result.code == 0, result
    assert "running on cuda (Mock), float32" in result.err
    actual = read_numbers(folder)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        tolerance = 3 if value.dtype == torch.uint8 else 1e-3
        assert float((value.float() - expected[name].float()).abs().max()) <= tolerance, name


@pytest.mark.parametrize("verb", mark_heavy(VERBS[:6], VERBS[:4]))
def test_commands_run_on_a_card(
    run: RunCommand, arguments: dict[str, list[Any]], tmp_path: Path, verb: str
) -> None:
    run_on_both(run, tmp_path, *arguments[verb])


@pytest.mark.parametrize("offload", ["model", "sequential"])
@pytest.mark.parametrize("verb", ["render", "edit", "evaluate", "evaluate-edits"])
def test_offloaded_commands_run_on_a_card(
    run: RunCommand, arguments: dict[str, list[Any]], tmp_path: Path, verb: str, offload: str
) -> None:
    run_on_both(run, tmp_path, *arguments[verb], offload=offload)


@pytest.mark.parametrize(
    "options",
    [
        ["--refine-steps", 2, "--rank", 3],
        ["--method", "lora-diffusion", "--num-candidates", 2],
        ["--method", "lora-diffusion", "--lora-guidance-scale", 2, "--num-loras", 2],
    ],
)
def test_generate_with_a_base_runs_on_a_card(
    run: RunCommand, arguments: dict[str, list[Any]], tmp_path: Path, options: list[Any]
) -> None:
    offload = "model" if "--rank" in options else "none"
    run_on_both(run, tmp_path, *arguments["generate"], *options, offload=offload)


def test_folders_run_on_a_card(
    run: RunCommand, arguments: dict[str, list[Any]], bundle: Bundle, tmp_path: Path
) -> None:
    command = ["generate", "--input-dir", bundle.subjects, "-o", tmp_path, "--refine-steps", 1]
    result = run(*command, "--device", "cpu")
    assert result.code == 0, result
    for file in tmp_path.iterdir():
        file.unlink()
    run_on_both(run, tmp_path, *command)


@pytest.mark.parametrize("strategy", ["merge", "composite"])
def test_composition_runs_on_a_card(
    run: RunCommand, arguments: dict[str, list[Any]], tmp_path: Path, strategy: str
) -> None:
    run(*arguments["generate"])
    lora = tmp_path / "x.safetensors"
    options = ["--lora", lora, "--lora", f"{lora}:0.5", "--strategy", strategy]
    run_on_both(run, tmp_path, *arguments["render"], *options)


@pytest.mark.parametrize("options", [[], ["--finetune-steps", 2, "--refine-steps", 2]])
def test_baselines_of_an_evaluation_run_on_a_card(
    run: RunCommand, arguments: dict[str, list[Any]], tmp_path: Path, options: list[Any]
) -> None:
    method = ["--method", "lora-diffusion", "--num-candidates", 2]
    extra = ["--report-dir", tmp_path / "report"]
    run_on_both(run, tmp_path / "report", *arguments["evaluate"], *method, *options, *extra)
    if options:
        run_on_both(run, tmp_path, *arguments["evaluate-edits"], *options[:2])


@pytest.mark.parametrize("verb", mark_heavy(VERBS[:6], VERBS[:4]))
def test_commands_run_in_half_precision(
    run: RunCommand, arguments: dict[str, list[Any]], verb: str
) -> None:
    extra = ["--refine-steps", 2] if verb in ("generate", "evaluate") else []
    result = run(*arguments[verb], *extra, "--dtype", "bfloat16", "--device", "cpu")
    assert result.code == 0, result
    assert "running on cpu, bfloat16" in result.err


# ---- memory ----


@pytest.mark.parametrize(
    ("verb", "options", "advice"),
    [
        ("render", [], "--offload model"),
        ("render", ["--offload", "model"], "--offload group"),
        ("edit", ["--offload", "group"], "--offload sequential"),
        ("demo", ["--offload", "sequential"], "--vae-tiling"),
        (
            "render",
            ["--offload", "sequential", "--vae-tiling"],
            "a smaller --width and --height",
        ),
        ("evaluate", ["--finetune-steps", "2", "--vae-tiling"], "--device cpu"),
        ("evaluate-edits", ["--device", "cpu"], "--vae-tiling"),
        ("serve", ["--device", "cpu", "--vae-tiling"], "--dtype bfloat16"),
    ],
)
def test_lack_of_memory_is_one_sentence(
    run: RunCommand,
    arguments: dict[str, list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    options: list[str],
    advice: str,
) -> None:
    def fail(*_: Any, **__: Any) -> DiffusionBase:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", fail)
    with mock_cuda():
        result = run(*arguments[verb], *options)
    assert result.code == 2, result
    last_line = result.err.splitlines()[-1]
    assert last_line.startswith(f"error: {verb.split('-')[0]} ran out of memory on c")
    assert last_line.endswith(f": try {advice}") and "Traceback" not in result.err


def test_bugs_keep_their_traceback(
    run: RunCommand, arguments: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run(*arguments["render"])


def test_black_images_of_half_precision_are_noted(
    run: RunCommand, arguments: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    black = [Image.new("RGB", (8, 8))]
    monkeypatch.setattr("hyperlora.diffusion.text_to_image.generate_images", lambda *_, **__: black)
    note = "warning: an image is black"
    assert note not in run(*arguments["render"], "--device", "cpu").err
    result = run(*arguments["render"], "--device", "cpu", "--dtype", "float16")
    assert note in result.err and "try --dtype float32" in result.err


@pytest.mark.parametrize("offload", ["group", "sequential"])
def test_refinement_says_which_offload_it_can_have(
    run: RunCommand,
    arguments: dict[str, list[Any]],
    loaded: list[ComputeConfig],
    offload: str,
) -> None:
    with mock_cuda():
        result = run(*arguments["generate"], "--refine-steps", 1, "--offload", offload)
    assert result.code == 2 and loaded
    assert f"offload '{offload}' moves its weights away before: use offload none" in result.err
