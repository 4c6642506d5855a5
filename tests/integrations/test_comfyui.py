"""The node pack as ComfyUI loads it: imported as a package, called by its mappings.

ComfyUI is no package that can be installed. Stubs replace the two modules that nodes call.
"""

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from hyperlora.compute import ComputeConfig
from hyperlora.data.images import to_image
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.lora.io.load import load_lora
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.pair_to_lora import PairToLora
from tests.conftest import Bundle

FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui"


@pytest.fixture(scope="module")
def pack() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "pack", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pack"] = module
    spec.loader.exec_module(module)
    return module


def test_node_pack_has_the_interface_of_comfyui(pack: ModuleType) -> None:
    assert pack.NODE_CLASS_MAPPINGS.keys() == pack.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in pack.NODE_CLASS_MAPPINGS.values():
        inputs = node.INPUT_TYPES()
        assert inputs.keys() <= {"required", "optional", "hidden"}
        input_names = {name for group in inputs.values() for name in group}
        method = inspect.signature(getattr(node, node.FUNCTION))
        assert input_names == set(method.parameters) - {"self"}
        required_names = {n for n, p in method.parameters.items() if p.default is p.empty} - {
            "self"
        }
        assert required_names == set(inputs["required"])
        for group in inputs.values():
            for kind, *options in group.values():
                assert kind in {"IMAGE", "MODEL", "CLIP", "STRING", "INT", "FLOAT", "HYPERLORA"}
                assert all(isinstance(o, dict) for o in options)
        assert isinstance(node.RETURN_TYPES, tuple) and node.CATEGORY
        assert node.RETURN_TYPES or node.OUTPUT_NODE


def make_images(count: int) -> torch.Tensor:
    """Make images [count, 20, 20, 3] as ComfyUI passes them, of 8-bit values in [0, 1]."""
    noise = torch.rand(count, 20, 20, 3, generator=torch.Generator().manual_seed(0))
    return noise.mul(255).round().div(255)


def test_nodes_generate_apply_and_save_a_lora(
    pack: ModuleType, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_images(2)
    images_node, apply_node, save_node = (
        pack.NODE_CLASS_MAPPINGS[f"Hyperlora{name}"]() for name in ("ImagesToLora", "Apply", "Save")
    )
    (lora,) = images_node.generate_lora(images, model=str(bundle.model))
    pipeline = ImageToLora.from_pretrained(bundle.model, base=load_diffusion_base(bundle.base))
    file = load_lora(lora, pipeline.layout)
    assert file.format == "kohya"
    expected = pipeline([to_image(image.permute(2, 0, 1)) for image in images]).weights
    torch.testing.assert_close(file.weights.flatten(), expected.flatten())

    calls: list[Any] = []
    comfy = SimpleNamespace(
        load_lora_for_models=lambda *args: calls.append(args) or ("model+", "clip+")
    )
    monkeypatch.setitem(sys.modules, "comfy", ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.sd", comfy)  # type: ignore[arg-type]
    sys.modules["comfy"].sd = comfy  # type: ignore[attr-defined]
    assert apply_node.apply_lora("model", lora, 0.8, "clip") == ("model+", "clip+")
    (args,) = calls
    assert args[:2] == ("model", "clip") and args[3:] == (0.8, 0.8)
    assert all(key.startswith("lora_unet_") for key in args[2])

    folder_paths = SimpleNamespace(get_folder_paths=lambda kind: [str(tmp_path / kind)])
    monkeypatch.setitem(sys.modules, "folder_paths", folder_paths)  # type: ignore[arg-type]
    names = [save_node.save_lora(lora, "../me/x")["ui"]["text"][0] for _ in range(2)]
    assert [path.name for path in sorted((tmp_path / "loras").iterdir())] == sorted(names)
    assert len(set(names)) == 2
    assert (tmp_path / "loras" / names[1]).read_bytes() == lora


def test_nodes_compute_where_comfyui_does(
    pack: ModuleType, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["pack.nodes"]
    assert module._find_device() == ComputeConfig().torch_device
    management = SimpleNamespace(get_torch_device=lambda: torch.device("meta"))
    monkeypatch.setitem(sys.modules, "comfy", ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)  # type: ignore[arg-type]
    for name, folder in (("image", bundle.model), ("pair", bundle.pair_model)):
        load = getattr(module, f"_load_{name}_to_lora")
        load.cache_clear()
        assert load(str(folder)).device == torch.device("meta")
        load.cache_clear()


def test_pair_node_generates_an_edit_lora(pack: ModuleType, bundle: Bundle) -> None:
    before = make_images(1)
    after = 1 - before
    node = pack.NODE_CLASS_MAPPINGS["HyperloraPairToLora"]()
    (lora,) = node.generate_lora(before, after, model=str(bundle.pair_model))
    pipeline = PairToLora.from_pretrained(bundle.pair_model)
    pair = tuple(to_image(images[0].permute(2, 0, 1)) for images in (before, after))
    file = load_lora(lora, pipeline.layout)
    assert (file.format, file.metadata.title) == ("kohya", "edit")
    torch.testing.assert_close(file.weights.flatten(), pipeline(pair).weights.flatten())
    with pytest.raises(ValueError, match="the same size is expected"):
        node.generate_lora(before, after[:, :10])
