"""Two networks to a pack that insightface loads: ONNX files, and a manifest that pins their SHA-256."""

import hashlib
import json
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from hyperlora.encoders.face_networks import FaceDetector, FaceRecogniser
from hyperlora.errors import BadRequest

DETECTOR: Final = "det_avatars.onnx"
RECOGNISER: Final = "rec_avatars.onnx"
LICENCE: Final = "MODEL.LICENSE"
_TERMS: Final = (
    "Apache-2.0\n\nThe two networks of this pack were trained by hyperlora, from nothing, on portraits that "
    "python_avatars (MIT) draws.\nhttps://www.apache.org/licenses/LICENSE-2.0\n"
)
_LEAST: Final = 64
"""Numbers of a weight that is stored as fp16."""


def write_face_pack(detector: Path, recogniser: Path, out: Path) -> int:
    """Write the pack of two released networks into the folder ``out``; how many bytes it has.

    Raises ``BadArtifact`` if a folder holds another network, ``BadRequest`` if ``onnx`` is missing.
    """
    finder, knower = FaceDetector.from_pretrained(detector), FaceRecogniser.from_pretrained(recogniser)
    sides = {2: "height", 3: "width"}
    files = {
        DETECTOR: _exported(finder, torch.zeros(1, 3, 128, 128), 9, sides),
        RECOGNISER: _exported(knower, knower.example, 1, {0: "batch"}),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (out / name).write_bytes(data)
    (out / LICENCE).write_text(_TERMS, encoding="utf-8")
    digests = {name: {"file": name, "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    manifest = {
        "manifest_version": 2, "model_id": "avatars", "license": LICENCE,
        "tasks": {"detection": digests[DETECTOR], "recognition": digests[RECOGNISER]},
    }  # fmt: skip
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return sum(file.stat().st_size for file in out.iterdir())


def _exported(network: nn.Module, example: Tensor, outputs: int, moving: dict[int, str]) -> bytes:
    """The network as ONNX, weights fp16; ``moving`` names the axes of its input that may have any length."""
    try:
        import onnx
    except ImportError as error:
        raise BadRequest("a face pack is written with onnx: pip install onnx") from error
    names = [f"out{i}" for i in range(outputs)]
    axes = {"in": moving} | ({"out0": {0: "batch"}} if 0 in moving else {name: {0: f"k{name}"} for name in names})
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        file = Path(folder) / "network.onnx"
        warnings.simplefilter("ignore")  # PyTorch's, on the exporter that needs no further package
        torch.onnx.export(
            network, (example,), file, dynamo=False, opset_version=17, input_names=["in"], output_names=names,
            dynamic_axes=axes,
        )  # fmt: skip
        return _halved(onnx.load(file)).SerializeToString()


def _halved(model: "onnx.ModelProto") -> "onnx.ModelProto":  # type: ignore[name-defined]  # noqa: F821
    """Weights as fp16 with a cast behind each, which onnxruntime does once, when it loads the model."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for weight in model.graph.initializer:
        if weight.data_type != TensorProto.FLOAT or np.prod(weight.dims) < _LEAST:
            continue
        name, values = weight.name, numpy_helper.to_array(weight)
        weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
        casts.append(helper.make_node("Cast", [f"{name}.half"], [name], f"cast.{name}", to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model
