"""The table of a training's memory: its figures, what it refuses, and the real sizes of bases."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hyperlora.diffusion.families.registry import get_pipeline_family
from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.encoders.timm_encoder import TimmEncoder
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.normalization import LoraNormalizer
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.hypernetwork import Hypernetwork
from hyperlora.models.lora_autoencoder import LoraAutoencoder
from hyperlora.models.pair_hypernetwork import PairHypernetwork
from hyperlora.pipelines.lora_codec import LoraCodec
from hyperlora.training import activations, memory
from hyperlora.training.activations import (
    estimate_activation_bytes,
    estimate_text_activation_bytes,
    make_meta_denoiser,
    make_meta_text_encoder,
)
from hyperlora.training.cli import parse_config, train
from hyperlora.training.estimate_config import _count_devices, estimate_config
from hyperlora.training.estimate_lora_models import read_dataset_layout
from hyperlora.training.known_bases import KNOWN_BASES, make_meta_base
from hyperlora.training.memory import (
    MemoryRow,
    TrainerOptions,
    TrainingMemory,
    check_network_size,
    make_network_rows,
)
from hyperlora.training.modules.frozen_base import load_training_base
from hyperlora.training.modules.hypernetwork import HypernetworkTraining
from hyperlora.training.modules.pair_hypernetwork import PairHypernetworkTraining
from hyperlora.training.network_activations import estimate_network_activation_bytes
from tests.tiny_pipelines import get_tiny_pipeline
from tests.tiny_pipelines.base import SIDE
from tests.training.config_rules import CONFIGS, NAMES, TINY_VIT, make_command, read_config
from tests.training.conftest import TRANSFORMERS

PUBLISHED_SIZES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": 0.860,
    "stabilityai/stable-diffusion-xl-base-1.0": 2.567,
    "stabilityai/stable-diffusion-3.5-medium": 2.24,
    "black-forest-labs/FLUX.2-klein-4B": 3.88,
    "black-forest-labs/FLUX.2-klein-9B": 9.08,
    "black-forest-labs/FLUX.2-dev": 32.2,
    "Tongyi-MAI/Z-Image": 6.15,
    "Qwen/Qwen-Image": 20.4,
    "Qwen/Qwen-Image-Edit-2509": 20.4,
}
"""Billions of parameters of the denoiser."""
HEADERS = {
    name: match[1]
    for name in NAMES
    if (match := re.search("^# memory: (.*)$", (CONFIGS / f"{name}.yaml").read_text(), re.M))
}
LORA_MODELS = {
    f"{base}/{name}"
    for base in ("sd15", "sdxl", "z_image")
    for name in ("lora_autoencoder", "lora_diffusion")
}
"""Trainings on LoRAs, whose base only the plan of a dataset names."""


def write_lora_plan_and_codec(folder: str) -> None:
    """Write the plan that a config names, and the codec that its autoencoder would become."""
    text = (CONFIGS / f"{folder}/lora_autoencoder.yaml").read_text()
    recipe = {
        "base": re.search(r"--base (\S+)", text)[1],
        "preset": re.search(r"--preset (\S+)", text)[1],
        "rank": int(re.search(r"--rank (\d+)", text)[1]),
        "parametrization": "lora",
    }
    build_dir = Path(f"runs/{folder}/build")
    build_dir.mkdir(parents=True)
    (build_dir / "plan.json").write_text(json.dumps({"recipe": recipe}))
    model = read_config(f"{folder}/lora_autoencoder")["model"]["init_args"]
    layout = read_dataset_layout(build_dir)
    with torch.device("meta"):
        autoencoder = LoraAutoencoder(layout, **model["autoencoder"])
        codec = LoraCodec(LoraNormalizer(layout), autoencoder)
    codec_dir = Path(model["output_dir"])
    codec_dir.mkdir(parents=True)
    (codec_dir / "config.json").write_text(json.dumps(codec.to_config()))
    (codec_dir / "layout.json").write_text(json.dumps(layout.to_dict()))


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_known_base_has_the_published_size(name: str) -> None:
    base = make_meta_base(name, "bfloat16")
    count = sum(p.numel() for p in base.denoiser.parameters())
    assert count / 1e9 == pytest.approx(PUBLISHED_SIZES[name], rel=0.005)
    assert base.rows[0].num_bytes == 2 * count
    assert len(base.rows) >= 3


def test_every_config_of_a_real_base_states_its_memory() -> None:
    bases = {name: read_config(name)["model"]["init_args"].get("base") for name in NAMES}
    expected = {
        name
        for name, base in bases.items()
        if base in KNOWN_BASES and not read_config(name)["model"]["init_args"].get("start_from")
    }
    assert HEADERS.keys() == expected | LORA_MODELS
    assert len(expected) >= 9


@pytest.mark.parametrize("name", HEADERS)
def test_config_header_equals_the_estimate(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in LORA_MODELS:
        monkeypatch.chdir(tmp_path)
        write_lora_plan_and_codec(Path(name).parent.name)
    estimate = estimate_config(parse_config(["--config", str(CONFIGS / f"{name}.yaml")]))
    assert HEADERS[name] == estimate.describe()
    assert estimate.num_trained_params <= (60e6 if "autoencoder" in name else 300e6)


def test_estimate_follows_the_command_line() -> None:
    """Four devices share the base; a cache of embeddings spares the text encoder."""
    config = ["--config", str(CONFIGS / "flux2/dev_hypernetwork.yaml")]
    whole = estimate_config(parse_config(config))
    shared = estimate_config(parse_config([*config, "--trainer.devices=4"]))
    base_bytes = sum(row.num_bytes or 0 for row in whole.rows[:2])  # transformer, text encoder
    in_transit = 4 * whole.num_trained_params
    assert shared.num_bytes == pytest.approx(whole.num_bytes - 0.75 * base_bytes + in_transit)
    options = "{dtype: bfloat16, text_encoder: null, vae: null}"
    cached = estimate_config(parse_config([*config, f"--model.init_args.base_options={options}"]))
    others = sum(row.num_bytes or 0 for row in whole.rows[1:3])
    assert cached.num_bytes == whole.num_bytes - others


def test_direct_head_on_sdxl_is_refused_before_it_is_made() -> None:
    base = make_meta_base("stabilityai/stable-diffusion-xl-base-1.0")
    layout = make_layout({"unet": base.denoiser}, "attention", 4, "sdxl")
    with torch.device("meta"):
        network = Hypernetwork(layout, 768, width=768, depth=4, num_heads=12, head="direct")
    with pytest.raises(
        InvalidArgumentError,
        match=r"^the network has 7\.09 B parameters, training it takes 113\.5 GB and .* has .*: "
        r"choose another head .*, a lower rank or a smaller preset$",
    ):
        check_network_size(network)


def test_small_network_is_not_refused() -> None:
    check_network_size(nn.Linear(4, 4, device="meta"))


@pytest.mark.parametrize(
    ("sizes", "use_checkpointing", "is_half", "option"),
    [
        ({"network": 9, "base": 2}, False, True, "choose another head"),
        ({"activations": 9, "base": 2}, False, True, "gradient_checkpointing: true"),
        ({"activations": 9, "base": 2}, True, True, "batch_size"),
        ({"network": 1, "base": 9}, False, False, "dtype: bfloat16"),
        ({"network": 1, "base": 9}, False, True, "shard_base: true"),
    ],
)
def test_refusal_names_the_option_of_the_largest_part(
    sizes: dict[Any, int], use_checkpointing: bool, is_half: bool, option: str
) -> None:
    rows = [MemoryRow(part, None, size * 10**9, part) for part, size in sizes.items()]
    estimate = TrainingMemory(rows, "", use_checkpointing, is_half)
    estimate.check_fits(sum(sizes.values()) * 10**9, "cuda")
    with pytest.raises(InvalidArgumentError, match=rf"cuda has 8\.0 GB.*: .*{option}"):
        estimate.check_fits(8 * 10**9, "cuda")


def test_network_rows_count_every_trained_parameter_once() -> None:
    layout = load_layout()
    network = Hypernetwork(layout, 12, width=16, num_heads=2, head_options={"size": 3})
    network.memory_proj.requires_grad_(False)
    rows = make_network_rows(network, TrainerOptions(True, True, 2))
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    decoder, head, *others = rows
    assert (decoder.num_params or 0) + (head.num_params or 0) == trained
    in_head = [network.head, network.code_proj, network.init_codes]
    assert head.num_params == sum(
        part.numel() if isinstance(part, Tensor) else sum(p.numel() for p in part.parameters())
        for part in in_head
    )
    # gradients, two moments, average, half precision, buckets of DDP
    assert [row.num_bytes for row in others] == [n * trained for n in (4, 8, 4, 2, 4)]


def load_layout() -> Any:
    tiny = get_tiny_pipeline("z_image")
    return make_layout({"transformer": tiny.denoiser}, "attention", 2, "tiny")


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", *TRANSFORMERS])
def test_activations_equal_those_that_autograd_saves(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a real forward pass, with as many tokens and without the scores of attention."""
    tiny = get_tiny_pipeline(name)
    family = get_pipeline_family(tiny.pipe)
    layout = make_layout({family.denoiser_name: family.denoiser}, "attention", 2, "tiny")
    weights = LoraWeights.zeros(layout, (2,), 0.1).apply(lambda t: t.requires_grad_())
    images = torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        latents = family.encode_images(images)
        conditions = family.encode_text(["a cat", "a dog"], images)
        if family.edits_images:
            conditions["image_latents"] = latents
    timesteps = torch.tensor([500, 600])
    model = family.denoiser
    owned = [*model.parameters(), *model.buffers(), *weights.down, *weights.up]
    counter = activations.StorageCounter(owned)
    with (
        activations.FlashAttentionMode(),
        saved_tensors_hooks(counter.pack, lambda t: t),
        inject_lora(model, weights),
    ):
        family.predict(latents, timesteps, conditions)

    class_name = type(model).__name__
    shapes = activations._SHAPES[class_name]
    monkeypatch.setattr(family, "text_encoder_area", 0, raising=False)
    num_tokens = conditions["prompt_embeds"].shape[1]
    shapes = replace(shapes, num_text_tokens=num_tokens)
    monkeypatch.setitem(activations._SHAPES, class_name, shapes)
    estimate = estimate_activations(family, layout, 2, SIDE, False)
    assert estimate == pytest.approx(counter.num_bytes, rel=0.02)
    assert 0 < estimate_activations(family, layout, 2, SIDE, True) < estimate


@pytest.mark.parametrize(("num_subjects", "num_views"), [(1, 1), (3, 2)])
@pytest.mark.parametrize("is_pair", [False, True])
@pytest.mark.parametrize("trains_encoder", [False, True])
def test_network_activations_equal_those_that_autograd_saves(
    num_subjects: int, num_views: int, is_pair: bool, trains_encoder: bool
) -> None:
    """On SDXL at rank 4 they are 3 GB, a sixth of the training's memory."""
    encoder = TimmEncoder("vit_tiny_patch16_224", 32, options=TINY_VIT | {"img_size": 32})
    network_class = PairHypernetwork if is_pair else Hypernetwork
    network = network_class(load_layout(), encoder.width, width=16, depth=2, num_heads=2)
    counter = activations.StorageCounter(
        t for m in (encoder, network) for t in (*m.parameters(), *m.buffers())
    )
    encoder.requires_grad_(trains_encoder)
    with activations.FlashAttentionMode(), saved_tensors_hooks(counter.pack, lambda t: t):
        images = torch.rand(num_subjects, num_views, 3, 32, 32)
        features = [encoder(images) for _ in range(1 + is_pair)]
        network(*features)
    estimate = estimate_network_activation_bytes(
        encoder, nn.ModuleList([encoder, network]), num_subjects, num_views
    )
    assert estimate == pytest.approx(counter.num_bytes, rel=0.02)
    assert next(network.parameters()).device.type == "cpu"


def estimate_activations(
    family: Any, layout: Any, num_samples: int, resolution: int, use_checkpointing: bool
) -> int:
    denoiser = make_meta_denoiser(family.denoiser)
    estimate = estimate_activation_bytes(
        family, denoiser, layout, num_samples, resolution, use_checkpointing
    )
    assert estimate is not None
    return estimate


def test_activations_of_an_unknown_denoiser_are_left_open() -> None:
    tiny = get_tiny_pipeline("chroma")
    family = get_pipeline_family(tiny.pipe)
    layout = make_layout({"transformer": family.denoiser}, "attention", 2, "tiny")
    assert estimate_activation_bytes(family, tiny.denoiser, layout, 1, SIDE, False) is None


@pytest.mark.parametrize("name", ["z_image", "qwen_image_edit_plus"])
def test_meta_base_of_a_folder_equals_the_loaded_one(name: str, workspace: Path) -> None:
    folder = str(workspace / "tiny" / name)
    meta, base = make_meta_base(folder), load_training_base(folder)
    counts = {
        component: sum(p.numel() for p in module.parameters())
        for component, module in base.pipeline.components.items()
        if isinstance(module, nn.Module)
    }
    names = [row.name.split(" ")[0] for row in meta.rows]
    assert dict(zip(names, (row.num_params for row in meta.rows), strict=True)) == counts
    assert meta.family.pipeline.vae_scale_factor == base.pipeline.vae_scale_factor


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_training_prints_its_table_and_refuses_what_cannot_fit(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workspace)
    name = "z_image/hypernetwork"
    arguments = [
        *make_command(name),
        "--run_name=memory",
        "--model.init_args.output_dir=runs/memory",
    ]
    monkeypatch.setattr(memory, "get_device_bytes", lambda device: 10**12)
    monkeypatch.setattr(
        "hyperlora.training.modules.pretrained_model.get_device_bytes", lambda device: 10**5
    )
    with pytest.raises(InvalidArgumentError, match=r"the training takes about .* and cpu has 0\.1"):
        train(arguments)
    table = capsys.readouterr().out
    for part in ("transformer (bfloat16, frozen)", "decoder", "head", "moments", "activations"):
        assert part in table
    assert "LoRA for tiny/z_image: rank 16, 16 targets, " in table


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["z_image/hypernetwork", "qwen_image/edit_pair_hypernetwork"])
def test_network_that_is_too_large_is_not_made(
    name: str, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(memory, "get_device_bytes", lambda device: 10**5)
    with pytest.raises(InvalidArgumentError, match=r"^the network has .* and cpu has 0\.1 MB: "):
        train(make_command(name))


def test_strategies_that_shard_the_network_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.strategies import FSDPStrategy

    class Trainer:
        strategy = FSDPStrategy()

    monkeypatch.setattr(HypernetworkTraining, "trainer", Trainer)
    module = HypernetworkTraining.__new__(HypernetworkTraining)
    with pytest.raises(InvalidArgumentError, match="use strategy ddp with shard_base: true"):
        module.setup("fit")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("flux2/klein_hypernetwork", []),
        ("sd15/hypernetwork", ["--model.init_args.text_encoders=true"]),
        ("sdxl/hypernetwork", ["--model.init_args.text_encoders=true"]),
        ("sd15/hypernetwork", ["--model.init_args.start_from=start"]),
        ("instruct_pix2pix/finetune", ["--model.init_args.start_from=start"]),
        ("instruct_pix2pix/pretrain", ["--model.init_args.freeze_encoder=true"]),
    ],
)
def test_estimate_of_a_folder_equals_the_table_of_the_training(
    name: str,
    arguments: list[str],
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One device and the same options; a trainer adds none of its own."""
    monkeypatch.chdir(workspace)
    class_path = read_config(name)["model"]["class_path"]
    module_class = {
        training.__name__: training for training in (HypernetworkTraining, PairHypernetworkTraining)
    }[class_path.rpartition(".")[2]]
    command = make_command(name)[1:]
    if "start" in str(arguments):
        options = {**parse_config(command)["model"]["init_args"], "start_from": None, "rank": 3}
        module_class(**options).model.save_pretrained(tmp_path / "start")
        arguments = [f"--model.init_args.start_from={tmp_path / 'start'}"]
        if class_path.endswith("HypernetworkTraining"):
            arguments.append("--model.init_args.rank=3")
    config = parse_config([*command, *arguments])
    estimate = estimate_config(config)
    module = module_class(**config["model"]["init_args"])

    class Trainer:
        world_size, precision, callbacks = 1, config["trainer"]["precision"], ()

        class datamodule:  # noqa: N801
            hparams = config["data"]["init_args"]

    monkeypatch.setattr(module_class, "trainer", Trainer)
    rows = {row.name: row.num_bytes for row in module.estimate_memory().rows}
    expected = {row.name: row.num_bytes for row in estimate.rows}
    expected.pop("moving average of the weights", None)
    assert json.loads(json.dumps(rows)) == expected
    assert ("activations of text encoders (estimate)" in rows) == ("text_enc" in str(arguments))


@pytest.mark.parametrize(
    ("devices", "num_nodes", "count"),
    [(4, 1, 4), ("4", 1, 4), ([4, 6], 1, 2), ("4,5", 1, 2), (2, 3, 6), ("auto", 1, 1), (-1, 2, 2)],
)
def test_estimate_counts_the_devices_of_all_nodes(devices: Any, num_nodes: int, count: int) -> None:
    assert _count_devices({"devices": devices, "num_nodes": num_nodes}) == count


def test_autoencoder_activations_equal_those_that_autograd_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of real numbers, at the size of Stable Diffusion 1.5."""
    monkeypatch.chdir(tmp_path)
    write_lora_plan_and_codec("sd15")
    config = parse_config(
        ["--config", str(CONFIGS / "sd15/lora_autoencoder.yaml"), "--data.init_args.batch_size=2"]
    )
    rows = {row.name: row.num_bytes for row in estimate_config(config).rows}
    layout = read_dataset_layout(Path("runs/sd15/build"))
    network = LoraAutoencoder(layout, **config["model"]["init_args"]["autoencoder"])
    counter = activations.StorageCounter([*network.parameters(), *network.buffers()])
    with saved_tensors_hooks(counter.pack, lambda tensor: tensor):
        network(torch.randn(2, layout.numel))
    assert rows["activations (estimate)"] == pytest.approx(counter.num_bytes, rel=0.02)
    assert rows["network"] == 4 * sum(p.numel() for p in network.parameters())
    assert rows["LoRAs of a batch"] == 4 * 4 * 2 * layout.numel


def test_estimate_of_lora_models_refuses_what_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, message in (
        ("autoencoder", "neither LoRAs nor a plan of them, which decide the memory"),
        ("diffusion", "codec'.* decides the memory, and there is no such folder"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            estimate_config(parse_config(["--config", str(CONFIGS / f"sd15/lora_{name}.yaml")]))


def test_estimate_refuses_what_it_cannot_know() -> None:
    for name, arguments, message in (
        ("sdxl/hypernetwork", ["start_from=missing/model"], "'missing/model' decides the memory"),
        ("z_image/hypernetwork", ["text_encoders=true"], "only those of CLIP do; set"),
        ("sdxl/hypernetwork", ["encoder=unet"], "whose encoder is the UNet"),
    ):
        options = [f"--model.init_args.{argument}" for argument in arguments]
        with pytest.raises(InvalidArgumentError, match=message):
            estimate_config(parse_config(["--config", str(CONFIGS / f"{name}.yaml"), *options]))


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3"])
def test_text_activations_equal_those_that_autograd_saves(name: str) -> None:
    """Of real prompts; LoRAs of text encoders need them besides those of the denoiser."""
    tiny = get_tiny_pipeline(name)
    family = get_pipeline_family(tiny.pipe)
    modules = {key: family.text_encoders[key] for key in family.adaptable_text_encoders}
    layout = make_layout({family.denoiser_name: family.denoiser, **modules}, "attention", 2, "tiny")
    targets = tuple(t for t in layout.targets if t.component in modules)
    weights = LoraWeights.zeros(replace(layout, targets=targets), (2,), 0.1)
    weights = weights.apply(lambda t: t.requires_grad_())
    owned = [p for m in family.text_encoders.values() for p in (*m.parameters(), *m.buffers())]
    counter = activations.StorageCounter([*owned, *weights.down, *weights.up])
    with (
        activations.FlashAttentionMode(),
        saved_tensors_hooks(counter.pack, lambda t: t),
        inject_lora(modules, weights),
    ):
        family.encode_text(["a cat", "a dog"])
    meta = {key: make_meta_text_encoder(module) for key, module in modules.items()}
    estimate = estimate_text_activation_bytes(meta, layout, 2)
    assert estimate == pytest.approx(counter.num_bytes, rel=0.1)
