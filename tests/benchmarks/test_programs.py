"""Every program of ``benchmarks/`` says what it measures; most run, on tiny models and data."""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperlora import pretrained
from tests.benchmarks.conftest import Builds

ROOT = Path(__file__).parents[2]
MODULES = [
    ".".join(path.relative_to(ROOT / "benchmarks").with_suffix("").parts)
    for path in sorted(ROOT.glob("benchmarks/**/*.py"))
    if path.name != "__init__.py"
]
LIBRARIES = {
    "ablations.codec_heldout",
    "ablations.lora_diffusion_training",
    "ablations.paired_edit",
    "avatar_evaluator",
    "mutation.copy_repository",
    "mutation.order_tests",
    "mutation.report",
    "quality.concept_loras",
    "robustness.hostile_clients",
    "robustness.http_requests",
    "robustness.malformed_request_generators",
    "service_process",
}
"""Modules that programs import."""
PROGRAMS = [name for name in MODULES if name not in LIBRARIES]
NOT_RUN = {
    "ablations.pair_hypernetwork_training": "needs the data that its training config names",
    "mutation.named_faults": "runs the tests of each fault, which takes minutes",
    "mutation.run": "runs the quick tests for each of thousands of mutants",
    "robustness.fair_turns": "starts a server with the bundled models",
    "robustness.mixed_load": "starts a server with the bundled models",
    "robustness.slow_senders": "starts a server with the bundled models",
    "robustness.malformed_requests": "starts servers with the bundled models",
    "robustness.openapi_fuzzing": "starts a server with the bundled models",
    "speed.released_hyperlora": "has 3 GB of weights, the size of the released network",
    "speed.sd15_inference": "has weights of the size of Stable Diffusion 1.5",
    "speed.service_load": "starts a server with the bundled models",
}
RUNS = [
    (
        "ablations.edit_steps_and_strength",
        "{bundle.edit_benchmark} --steps 1 --strengths 1 2",
        r"(?s)1 steps, strength 1 .*1 steps, strength 2 ",
    ),
    (
        "ablations.finetuning_hyperparameters",
        "{bundle.benchmark} --num-subjects 2 --steps 1 2 --lr 1e-3",
        r"(?s)\| lr 0.001, 1 steps \|.*\| lr 0.001, 2 steps \|",
    ),
    (
        "ablations.finetuning_initialization",
        "--num-subjects 2 --steps 2",
        r"(?s)^zero +loss .*\nshared +loss .*\nnetwork +loss ",
    ),
    (
        "ablations.lora_diffusion",
        "{builds.others} --dataset scratch {builds.train} --mixtures image --codecs autoencoder"
        " --steps 1 --codec-steps 1 --encoder {bundle.model} --num-subjects 2 --num-prompts 1"
        " --sampling-steps 1 --num-inference-steps 1 -o {output_dir}",
        r"(?s)\| scratch, autoencoder \|.*\| scratch, autoencoder, image, part covered \|",
    ),
    (
        "ablations.lora_strength",
        "{bundle.benchmark} --num-subjects 2 --steps 1 --strengths 1 1.5",
        r"(?s)\| strength 1 \|.*\| strength 1.5 \|",
    ),
    (
        "quality.concept_sliders",
        "--num-subjects 2 --steps 1 -o {output_dir}",
        r"\| differential LoRA \|",
    ),
    ("quality.face_analysis", "{portraits} --num-faceless 2", r"noise: 0 of 2 with a face"),
    (
        "quality.dit_overfit",
        "flux2_klein --pretrain-steps 1 --steps 1 --num-subjects 2 --rounds 1",
        r"(?s)Flux2Transformer2DModel of .*\| own \|.*\| shuffled \|",
    ),
    (
        "quality.hypernetwork_comparison",
        "tiny={bundle.model} --num-subjects 2 --steps 1 --refine-steps 1",
        r"\| tiny: one photo, refined 1 steps \|",
    ),
    (
        "quality.lora_diffusion",
        "{builds.train} {builds.others} --num-components 3 --model {bundle.model}"
        " --num-subjects 2 --num-prompts 1 --num-inference-steps 1",
        r"(?s)3 principal components \|.*one photo \|",
    ),
    (
        "quality.multi_lora_composition",
        "autolora --num-subjects 2 --steps 1 -o {output_dir}",
        r"\| 1.5 \| 0.5 \|",
    ),
    (
        "quality.multi_lora_composition",
        "strategies --num-subjects 2 --steps 1 -o {output_dir}",
        r"\| composite \|",
    ),
    (
        "robustness.build_crash_recovery",
        "--num-subjects 8 --num-kills 1 --fork --folder {output_dir}",
        r"lost 0, duplicates 0, half-written files 0, identical rows 8 of 8",
    ),
    (
        "robustness.ood_detection",
        "{bundle.subjects}/person-0",
        r"(?s)test portraits \(false alarms\).*person-0 100.0% of 4 out of domain",
    ),
    ("robustness.pair_input_checks", "{pairs}", r"(?s)own pair: .*shuffled pair: "),
    (
        "speed.composite_inference",
        "--num-loras 2 --steps 2 --num-images 1",
        r"latents differ by at most (0.0e\+00|\d\.\de-0[5-9])",
    ),
    (
        "speed.lora_file_writing",
        "stable-diffusion-v1-5/stable-diffusion-v1-5 --rank 1",
        r"(?s)\| 128 \| 0\.\d+ \| diffusers, float32 \|.*\| kohya, float16 \|",
    ),
    ("speed.lora_generation", "--num-photos 2 --finetune-steps 1", r"one pass is \d+x, refined"),
    (
        "speed.lora_shard_reading",
        "--num-loras 20 --num-parameters 1000 --num-reads 40 --batch-size 8",
        r"one file per LoRA, random: [\d,]+ LoRAs/s",
    ),
    (
        "speed.multi_lora_finetuning",
        "--num-loras 2 --steps 2 --batch-size 1",
        r"final loss (\d\.\d{3})\d and \1",
    ),
    (
        "speed.streamed_encoders",
        "clip --layers 1 --images 2",
        r"\| clip \| 0\.\d\d \| 2 \| float32 \|",
    ),
    (
        "speed.time_to_identity",
        "{bundle.benchmark} --num-subjects 2 --batch-size 1 --steps 1 2 --warm-steps 0 1"
        " --timed-steps 1",
        r"(?s)\| PEFT, encoding once \|.*\| all subjects together \|",
    ),
]
"""Program, arguments, and what it prints."""
WITH_BUNDLED_MODEL = {"robustness.ood_detection"}
WITH_AVATAR_EVALUATOR = {"quality.concept_sliders", "quality.multi_lora_composition"}


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    """A forked process hangs if its parent computed on several threads, and it does too."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.mark.parametrize("name", MODULES)
def test_programs_are_the_modules_with_main(name: str) -> None:
    assert hasattr(importlib.import_module(f"benchmarks.{name}"), "main") == (name in PROGRAMS)


def test_every_program_runs_or_says_why_not() -> None:
    assert {name for name, *_ in RUNS} | NOT_RUN.keys() == set(PROGRAMS)
    assert not {name for name, *_ in RUNS} & NOT_RUN.keys()


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_says_what_the_program_measures(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as exit_info:
        module.main()
    assert exit_info.value.code == 0
    description = str(module.__doc__).split("\n\n")[0]
    # argparse breaks lines at hyphens too
    assert "".join(description.split()) in "".join(capsys.readouterr().out.split())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@pytest.mark.parametrize(("name", "arguments", "pattern"), RUNS, ids=[name for name, *_ in RUNS])
def test_program_prints_figures_of_tiny_models(
    name: str,
    arguments: str,
    pattern: str,
    bundle: Any,
    builds: Builds,
    portraits: Path,
    pairs: Path,
    avatar_evaluator: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    has_concepts = name in WITH_AVATAR_EVALUATOR
    tiny_dirs = {
        "BASE_DIR": bundle.base,
        "IMAGE_TO_LORA_DIR": bundle.model,
        "EVALUATOR_DIR": avatar_evaluator if has_concepts else bundle.evaluator,
        "BENCHMARK_DIR": bundle.benchmark,
        "EDIT_BASE_DIR": bundle.edit_base,
        "PAIR_TO_LORA_DIR": bundle.pair_model,
    }
    if name not in WITH_BUNDLED_MODEL:
        for constant, folder in tiny_dirs.items():
            monkeypatch.setattr(pretrained, constant, folder)
    if has_concepts:
        for module_name in ("concept_loras", "concept_sliders"):
            concepts = importlib.import_module(f"benchmarks.quality.{module_name}")
            monkeypatch.setattr(concepts, "CONCEPT_STEPS", 1)
    argv = arguments.format(
        bundle=bundle, builds=builds, portraits=portraits, pairs=pairs, output_dir=tmp_path
    )
    monkeypatch.setattr(sys, "argv", [name, *argv.split()])
    importlib.import_module(f"benchmarks.{name}").main()
    assert re.search(pattern, capsys.readouterr().out)
    if has_concepts:
        (sheet_path,) = tmp_path.glob("*.png")
        assert sheet_path.stat().st_size > 1000
