"""Steps of trainings on a mock of a CUDA card give the losses of the CPU."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device

from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.training.batches import PairBatch
from hyperlora.training.modules import pair_hypernetwork as pair_training
from hyperlora.training.modules.hypernetwork import HypernetworkTraining
from tests.conftest import Bundle
from tests.mock_cuda import CUDA, mock_cuda
from tests.tiny_pipelines import get_tiny_pipeline
from tests.training import test_hypernetwork_training as hypernetwork
from tests.training import test_instruct_pix2pix as instruct_pix2pix
from tests.training import test_lora_autoencoder_training as lora_autoencoder
from tests.training import test_lora_diffusion_training as lora_diffusion
from tests.training import test_pair_hypernetwork as pair_hypernetwork
from tests.training import test_text_to_image as text_to_image
from tests.training.test_hypernetwork_training import base_dir  # noqa: F401
from tests.training.test_lora_autoencoder_training import make_module as make_codec_training  # noqa: F401
from tests.training.test_lora_diffusion_training import codec_dir  # noqa: F401
from tests.training.test_pair_hypernetwork import batch as pair_batch  # noqa: F401

Case = tuple[Callable[[], Any], Any]


def make_regression(folder: Path) -> HypernetworkTraining:
    """A hypernetwork that is trained on codes, too."""
    torch.manual_seed(0)
    module = hypernetwork.make_module(folder, code_loss_weight=0.5)
    codes = module.model.hypernetwork.code_proj
    module.code_targets = torch.ones(1, *codes.shape[:-1])
    return module


@pytest.fixture(
    params=[
        "text_to_image",
        "instruct_pix2pix",
        "hypernetwork",
        "pair_hypernetwork",
        "pair_instructions",
        "pair_images",
        "lora_autoencoder",
        "lora_diffusion",
    ]
)
def case(request: pytest.FixtureRequest, bundle: Bundle) -> Case:
    """A function that makes a training, and a batch."""

    def get(name: str) -> Any:
        return request.getfixturevalue(name)

    match request.param:
        case "text_to_image":
            return lambda: text_to_image.make_module(bundle), text_to_image.make_batch()
        case "instruct_pix2pix":
            return lambda: instruct_pix2pix.make_module(bundle), instruct_pix2pix.make_batch()
        case "hypernetwork":
            return lambda: make_regression(get("base_dir")), hypernetwork.make_batch()
        case "pair_hypernetwork":
            return lambda: pair_hypernetwork.make_pair_module(bundle), get("pair_batch")
        case "pair_instructions":
            options = {
                "network": pair_hypernetwork.NETWORK,
                "instruction_loss_weight": 0.5,
                "swap_prob": 0.5,
            }
            return lambda: pair_hypernetwork.make_pair_module(bundle, **options), get("pair_batch")
        case "pair_images":
            pipeline = get_tiny_pipeline("qwen_image_edit_plus").pipe
            get("monkeypatch").setattr(
                pair_training,
                "load_training_base",
                lambda *_, **__: DiffusionBase("tiny/qwen", deepcopy(pipeline)),
            )
            images = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
            batch = PairBatch(["a", "b"], images[:, None, :, :, :16, :16], images=images)
            return lambda: pair_hypernetwork.make_pair_module(bundle), batch
        case "lora_autoencoder":
            return get("make_codec_training"), lora_autoencoder.TinyDataset("folder", "train").rows[
                :5
            ]
        case _:
            return lambda: lora_diffusion.make_module(get("codec_dir")), lora_diffusion.make_batch()


@pytest.mark.filterwarnings("ignore::UserWarning")  # there is no trainer to log to
@pytest.mark.parametrize("name", ["training_step", "validation_step"])
def test_step_is_the_same_on_a_card(case: Case, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_training, batch = case

    def run(module: Any, device: torch.device) -> dict[str, float]:
        values: dict[str, float] = {}

        def log(name: str, value: Any, *args: Any, **options: Any) -> None:
            values[name] = float(value)

        def log_dict(logs: dict[str, Any], *args: Any, **options: Any) -> None:
            values.update({name: float(value) for name, value in logs.items()})

        monkeypatch.setattr(module, "log", log)
        monkeypatch.setattr(module, "log_dict", log_dict)
        monkeypatch.setattr(module, "_trainer", SimpleNamespace(world_size=1))
        module.to(device)
        module.on_fit_start()
        torch.manual_seed(5)
        with torch.no_grad():
            getattr(module, name)(move_data_to_device(batch, device), 3)
        return values

    module, module_on_card = make_training(), make_training()
    expected = run(module, torch.device("cpu"))
    with mock_cuda():
        actual = run(module_on_card, CUDA)
    prefix = name.removesuffix("ing_step").replace("validation_step", "val")
    assert len(expected) > 0 and all(key.startswith(f"{prefix}/") for key in expected)
    assert actual == pytest.approx(expected, rel=1e-4, abs=1e-5)
