"""What trainings do with their base at the start, and the pipelines they write at the end."""

import json
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    ModelMixin,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
)
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

from hyperlora.diffusion.shared_components import SHARED_COMPONENTS_KEY
from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.training.modules.frozen_base import load_training_base
from hyperlora.training.modules.instruct_pix2pix import InstructPix2PixTraining
from hyperlora.training.modules.text_to_image import NOISE_SCHEDULE, TextToImageTraining
from tests.conftest import Bundle
from tests.mock_cuda import CudaTensor, mock_cuda
from tests.training.test_instruct_pix2pix import make_module as make_edit_module
from tests.training.test_pair_hypernetwork import NETWORK, make_pair_module
from tests.training.test_text_to_image import make_module


@pytest.fixture
def attribute_classifier(tmp_path: Path) -> str:
    folder = tmp_path / "classifier"
    options = {"channels": 4, "base_channels": 8}
    AttributeClassifier("latents", 8, {"hat": ["a", "b"]}, options=options).save_pretrained(folder)
    return str(folder)


def attach_trainer(module: Any, world_size: int = 1, is_global_zero: bool = True) -> None:
    module._trainer = SimpleNamespace(world_size=world_size, is_global_zero=is_global_zero)


def assert_half_of(stored: nn.Module, trained: nn.Module) -> None:
    """Assert that a pipeline, loaded in float32, holds the weights of a training in half."""
    trained_state = trained.state_dict()
    for name, value in stored.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, trained_state[name].half().float()), name


def list_devices(module: nn.Module) -> set[str]:
    return {parameter.device.type for parameter in module.parameters()}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_training_base_is_loaded_on_the_cpu_in_its_precision(
    bundle: Bundle, dtype: str | None
) -> None:
    """The trainer moves it, also where there is a card."""
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    with mock_cuda():
        base = load_training_base(bundle.base, **options, text_encoder=None)
    expected = torch.float32 if dtype is None else torch.bfloat16
    for part in (base.denoiser, base.pipeline.vae):
        assert {parameter.dtype for parameter in part.parameters()} == {expected}
        assert list_devices(part) == {"cpu"}
        assert not any(isinstance(parameter, CudaTensor) for parameter in part.parameters())
    assert base.pipeline.text_encoder is None


def test_pipelines_ask_for_files_of_at_most_16_mb(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[Any] = []
    save = ModelMixin.save_pretrained

    @wraps(save)  # a pipeline asks for the names of the arguments
    def record_size(module: Any, folder: Any, **options: Any) -> None:
        sizes.append(options.get("max_shard_size"))
        save(module, folder, **options)

    monkeypatch.setattr(ModelMixin, "save_pretrained", record_size)
    for name, make in (("base", make_module), ("edit-base", make_edit_module)):
        module = make(bundle)
        module.hparams["output_dir"] = str(tmp_path / name)
        attach_trainer(module)
        module.on_train_end()
    assert sizes == ["16MB"] * 3, "VAE and UNet, and the UNet of the edit base"


def test_text_to_image_writes_a_pipeline_in_half_precision(bundle: Bundle, tmp_path: Path) -> None:
    module: TextToImageTraining = make_module(bundle)
    module.hparams["output_dir"] = str(tmp_path / "base")
    attach_trainer(module, is_global_zero=False)
    module.on_train_end()
    assert not (tmp_path / "base").exists(), "one process writes"

    attach_trainer(module)
    module.on_train_end()
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "base")
    assert_half_of(pipeline.unet, module.unet)
    assert_half_of(pipeline.text_encoder, module.text_encoder)
    assert_half_of(pipeline.vae, load_training_base(bundle.base).pipeline.vae)
    for component in ("unet", "text_encoder", "vae"):
        (path,) = (tmp_path / "base" / component).glob("*.safetensors")
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    assert pipeline.tokenizer.get_vocab() == module.tokenizer.get_vocab()
    assert isinstance(pipeline.scheduler, DPMSolverMultistepScheduler)
    assert NOISE_SCHEDULE.items() <= dict(pipeline.scheduler.config).items()
    assert pipeline.safety_checker is None and pipeline.feature_extractor is None
    assert pipeline.config["requires_safety_checker"] is False


def test_edit_training_writes_a_pipeline_with_its_schedule(bundle: Bundle, tmp_path: Path) -> None:
    module: InstructPix2PixTraining = make_edit_module(bundle, prediction_type="sample")
    unet = {name: value.clone() for name, value in module.unet.state_dict().items()}
    folder = tmp_path / "new" / "edit-base"
    module.hparams["output_dir"] = str(folder)
    attach_trainer(module, is_global_zero=False)
    module.on_train_end()
    assert not folder.exists()

    attach_trainer(module)
    for _ in range(2):  # a finished run may be repeated
        module.on_train_end()
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder)
    for name, value in pipeline.unet.state_dict().items():
        torch.testing.assert_close(value, unet[name].half().float(), rtol=0, atol=0)
    assert pipeline.scheduler.config["prediction_type"] == "sample"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["vae"][1] == "AutoencoderKL" and index["requires_safety_checker"] is False
    components = ("vae", "text_encoder", "tokenizer")
    assert index[SHARED_COMPONENTS_KEY].keys() == set(components)
    for component in components:
        path = folder / index[SHARED_COMPONENTS_KEY][component] / component
        assert (folder / component).resolve() == path.resolve()
        assert path.resolve() == (bundle.base / component).resolve()


def test_text_to_image_moves_its_classifier(bundle: Bundle, attribute_classifier: str) -> None:
    module = make_module(bundle, attribute_classifier=attribute_classifier).to("meta")
    classifier = module.attribute_loss.classifier
    assert list_devices(classifier) == {"cpu"}, "no submodule"
    module.on_fit_start()
    assert list_devices(classifier) == {"meta"}


@pytest.mark.parametrize("shards_base", [False, True])
def test_base_and_classifier_are_moved_to_the_device_of_the_training(
    bundle: Bundle, attribute_classifier: str, shards_base: bool
) -> None:
    """One process keeps a whole base, whatever the setting."""
    module = make_edit_module(bundle, attribute_classifier=attribute_classifier)
    assert module.denoiser_name == "unet"
    module.shards_base = shards_base
    attach_trainer(module)
    module.to("meta")
    assert list_devices(module.base.denoiser) == {"cpu"}, "no submodule"
    module.on_fit_start()
    for part in (
        *module.base.modules.values(),
        module.base.pipeline.vae,
        module.attribute_loss.classifier,
    ):
        assert list_devices(part) == {"meta"}
        assert not any(isinstance(parameter, DTensor) for parameter in part.parameters())


def test_several_processes_shard_the_base_if_they_are_told_to(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        "hyperlora.training.modules.frozen_base.shard_base", lambda *args: calls.append(args)
    )
    module = make_edit_module(bundle)
    for shards_base, world_size in ((False, 2), (True, 1), (True, 2)):
        module.shards_base = shards_base
        attach_trainer(module, world_size)
        module.on_fit_start()
    assert calls == [(module.base, torch.device("cpu"))]


def test_denoiser_recomputes_its_activations(bundle: Bundle) -> None:
    module = make_edit_module(bundle)
    assert not module.base.denoiser.is_gradient_checkpointing
    module.enable_gradient_checkpointing()
    assert module.base.denoiser.is_gradient_checkpointing


@pytest.mark.parametrize("has_head", [True, False])
def test_pair_training_takes_the_texts_of_its_base(bundle: Bundle, has_head: bool) -> None:
    """A checkpoint may hold those of another base."""
    module = make_pair_module(bundle, network=NETWORK if has_head else {})
    attach_trainer(module)
    buffers = dict(module.model.network.named_buffers())
    expected = {name: value.clone() for name, value in buffers.items()}
    assert ("instruction_head.text_a" in expected) == has_head
    for name, value in buffers.items():
        if "text_" in name:
            value.zero_()
    module.on_fit_start()
    for name, value in expected.items():
        torch.testing.assert_close(buffers[name], value)
