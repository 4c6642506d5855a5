"""The node pack as ComfyUI meets it: imported as a package, called by its mappings.

ComfyUI itself is no package one can install; its two modules that nodes call are stood in for by what they promise.
"""

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.lora.io.load import load_lora
from hyperlora.pipelines.image_to_lora import ImageToLora

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


def test_the_interface_is_comfyuis(pack: ModuleType) -> None:
    assert pack.NODE_CLASS_MAPPINGS.keys() == pack.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in pack.NODE_CLASS_MAPPINGS.values():
        inputs = node.INPUT_TYPES()
        assert inputs.keys() <= {"required", "optional", "hidden"}
        named = {name for group in inputs.values() for name in group}
        method = inspect.signature(getattr(node, node.FUNCTION))
        assert named == set(method.parameters) - {"self"}
        needed = {n for n, p in method.parameters.items() if p.default is p.empty} - {"self"}
        assert needed == set(inputs["required"])
        for group in inputs.values():
            for kind, *options in group.values():
                assert kind in {"IMAGE", "MODEL", "CLIP", "STRING", "INT", "FLOAT", "HYPERLORA"}
                assert all(isinstance(o, dict) for o in options)
        assert isinstance(node.RETURN_TYPES, tuple) and node.CATEGORY
        assert node.RETURN_TYPES or node.OUTPUT_NODE


def test_images_to_a_saved_lora(
    pack: ModuleType, bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = (
        torch.rand(2, 20, 20, 3, generator=torch.Generator().manual_seed(0))
        .mul(255)
        .round()
        .div(255)
    )
    make, apply, save = (
        pack.NODE_CLASS_MAPPINGS[f"Hyperlora{n}"]() for n in ("ImagesToLora", "Apply", "Save")
    )
    (made,) = make.make(images, model=str(bundle.model))
    network = ImageToLora.from_pretrained(bundle.model, base=load_diffusion_base(bundle.base))
    file = load_lora(made, network.layout)
    assert file.format == "kohya"
    from hyperlora.data.images import to_image

    expected = network([to_image(image.permute(2, 0, 1)) for image in images])
    torch.testing.assert_close(file.weights.flatten(), expected.flatten())

    called: list[Any] = []
    comfy = SimpleNamespace(load_lora_for_models=lambda *a: called.append(a) or ("model+", "clip+"))
    monkeypatch.setitem(sys.modules, "comfy", ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.sd", comfy)  # type: ignore[arg-type]
    sys.modules["comfy"].sd = comfy  # type: ignore[attr-defined]
    assert apply.apply("model", made, 0.8, "clip") == ("model+", "clip+")
    (arguments,) = called
    assert arguments[:2] == ("model", "clip") and arguments[3:] == (0.8, 0.8)
    assert all(key.startswith("lora_unet_") for key in arguments[2])

    paths = SimpleNamespace(get_folder_paths=lambda kind: [str(tmp_path / kind)])
    monkeypatch.setitem(sys.modules, "folder_paths", paths)  # type: ignore[arg-type]
    names = [save.save(made, "../me/x")["ui"]["text"][0] for _ in range(2)]
    assert [p.name for p in sorted((tmp_path / "loras").iterdir())] == sorted(names)
    assert len(set(names)) == 2
    assert (tmp_path / "loras" / names[1]).read_bytes() == made


def test_a_pair_to_a_lora(pack: ModuleType, bundle: Any) -> None:
    from hyperlora.data.images import to_image
    from hyperlora.pipelines.pair_to_lora import PairToLora

    before = (
        torch.rand(1, 20, 20, 3, generator=torch.Generator().manual_seed(0))
        .mul(255)
        .round()
        .div(255)
    )
    after = 1 - before
    node = pack.NODE_CLASS_MAPPINGS["HyperloraPairToLora"]()
    (made,) = node.make(before, after, model=str(bundle.pair_model))
    network = PairToLora.from_pretrained(bundle.pair_model)
    expected = network(tuple(to_image(x[0].permute(2, 0, 1)) for x in (before, after)))
    file = load_lora(made, network.layout)
    assert file.format == "kohya"
    torch.testing.assert_close(file.weights.flatten(), expected.flatten())
    with pytest.raises(ValueError, match="the same size is expected"):
        node.make(before, after[:, :10])
