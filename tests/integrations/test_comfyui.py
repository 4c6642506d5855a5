"""The node pack as ComfyUI loads it: imported as a package, called by its mappings.

ComfyUI is no package that can be installed. Stubs replace the two modules that nodes call.
"""

import importlib.util
import inspect
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hyperlora.compute import ComputeConfig
from hyperlora.data.images import to_image
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.errors import ModelLoadError
from hyperlora.lora.io.formats import list_readers
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.negative_lora import NEGATIVE_LORA_KEY
from hyperlora.pipelines.config import GenerationConfig
from hyperlora.pipelines.generate import generate_files
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.pair_to_lora import PairToLora
from hyperlora.pipelines.released.registry import open_released_model
from hyperlora.pipelines.released.released_model import ReleasedOptions
from tests.conftest import Bundle
from tests.pipelines.released.tiny_hyperlora import save_world
from tests.pipelines.released.tiny_i2l import save_i2l_world

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
                if not isinstance(kind, list):  # else a list to choose from
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
    lora, trigger, negative = images_node.generate_lora(images, model=str(bundle.model))
    pipeline = ImageToLora.from_pretrained(bundle.model, base=load_diffusion_base(bundle.base))
    assert negative == lora and trigger == pipeline.trigger_phrase
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
    module = sys.modules["pack.models"]
    assert module.find_device() == ComputeConfig().torch_device
    management = SimpleNamespace(get_torch_device=lambda: torch.device("meta"))
    monkeypatch.setitem(sys.modules, "comfy", ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)  # type: ignore[arg-type]
    for name, folder in (("photo_model", bundle.model), ("pair_to_lora", bundle.pair_model)):
        load = getattr(module, f"load_{name}")
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


def test_images_node_runs_networks_in_its_list(
    pack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("insightface")
    world = save_world(tmp_path)
    (tmp_path / "models").mkdir()
    (world / "HyperLoRA").rename(tmp_path / "models" / "hyperlora")
    for variant in ("fidelity", "edit"):
        folder = tmp_path / "models" / "hyperlora" / f"sdxl_hyper_id_lora_v1_{variant}"
        folder.rename(folder.with_name(f"people_{variant}"))
    folder_paths = SimpleNamespace(models_dir=str(tmp_path / "models"))
    monkeypatch.setitem(sys.modules, "folder_paths", folder_paths)  # type: ignore[arg-type]
    node = pack.NODE_CLASS_MAPPINGS["HyperloraImagesToLora"]()
    names, _ = node.INPUT_TYPES()["optional"]["listed_model"]
    assert names[0] == "avatars (bundled)" and {"people_edit", "people_fidelity"} <= set(names)
    assert "bytedance-research/HyperLoRA:edit" in names
    assert "DiffSynth-Studio/Z-Image-i2L:z-image" in names
    assert not any("lorweb" in name for name in names)

    options = ReleasedOptions(face_pack=str(world / "antelopev2"), encoder=str(world / "clip"))
    pixels = np.asarray(Image.open(world / "me.png").convert("RGB"), np.float32) / 255
    images = torch.from_numpy(pixels)[None]
    inputs = {"listed_model": "people_edit", "encoder": str(world / "clip")}
    lora, trigger, negative = node.generate_lora(
        images, **inputs, face_pack=str(world / "antelopev2")
    )
    with pytest.raises(ModelLoadError, match="nobody"):
        node.generate_lora(images, **inputs, face_pack=str(world / "nobody"))
    with pytest.raises(ValueError, match="a server has its own encoder and face pack"):
        node.generate_lora(images, server="http://127.0.0.1:1", face_pack="antelopev2")
    (tmp_path / "models" / "insightface" / "models").mkdir(parents=True)
    (world / "antelopev2").rename(tmp_path / "models" / "insightface" / "models" / "antelopev2")
    options = replace(options, face_pack=sys.modules["pack.models"]._find_face_pack())
    assert node.generate_lora(images, **inputs)[0] == lora, "ComfyUI's own pack is found"
    sys.modules["pack.models"].load_photo_model.cache_clear()
    assert trigger == "fcsks fxhks fhyks, " and negative == lora
    output = tmp_path / "LoRA.safetensors"
    pil_photo = Image.fromarray((pixels * 255).round().astype(np.uint8))
    pil_photo.save(tmp_path / "photo.png")
    model = open_released_model(str(tmp_path / "models" / "hyperlora" / "people_edit"), options)
    generate_files(model, [tmp_path / "photo.png"], output, GenerationConfig())
    assert lora == output.read_bytes()


@pytest.mark.parametrize("num_images", [1, 2])
def test_images_node_makes_the_lora_of_a_style(
    pack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_images: int
) -> None:
    folder = save_i2l_world(tmp_path, monkeypatch)
    monkeypatch.setattr(sys.modules["pack.models"], "find_device", lambda: torch.device("cpu"))
    node = pack.NODE_CLASS_MAPPINGS["HyperloraImagesToLora"]()
    images = make_images(num_images)
    lora, trigger, negative = node.generate_lora(
        images, model=str(folder / "network"), encoder=str(folder / "encoders")
    )
    sys.modules["pack.models"].load_photo_model.cache_clear()
    assert trigger == "" and negative == b"", "Z-Image has no LoRA on the negative branch"
    model = open_released_model(
        str(folder / "network"),
        ReleasedOptions(encoder=str(folder / "encoders")),
        ComputeConfig(device="cpu"),
    )
    expected = model([to_image(image.permute(2, 0, 1)) for image in images]).weights
    assert expected.layout.rank == 4 * num_images
    file = load_lora(lora, expected.layout)
    torch.testing.assert_close(file.weights.flatten(), expected.flatten(), rtol=1e-5, atol=1e-5)
    architecture = file.metadata.architecture
    assert "ComfyUI" in list_readers(expected.layout, file.format, architecture)


def test_outputs_follow_the_rule_of_the_negative_branch(pack: ModuleType, bundle: Bundle) -> None:
    lora = ImageToLora.from_pretrained(bundle.model)(bundle.photo)
    add_outputs = sys.modules["pack.nodes"]._add_outputs

    def write(rule: str) -> bytes:
        extra = {NEGATIVE_LORA_KEY: rule}
        return replace(lora, metadata=LoraMetadata(trigger_phrase="sks", extra=extra)).serialize()

    off, gray = write("off"), write("gray")
    assert add_outputs(off, None) == (off, "sks", b"")
    assert add_outputs(gray, b"negative") == (gray, "sks", b"negative")
    assert add_outputs(gray, None) == (gray, "sks", gray)
    apply_node = pack.NODE_CLASS_MAPPINGS["HyperloraApply"]()
    assert apply_node.apply_lora("model", b"", 1.0, "clip") == ("model", "clip")
