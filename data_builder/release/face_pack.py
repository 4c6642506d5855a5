"""Face packs that insightface loads: two ONNX networks and a manifest with their SHA-256."""

import hashlib
import json
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor, nn

from hyperlora.encoders.face_networks import FaceDetector, FaceRecognizer
from hyperlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from onnx import ModelProto

DETECTOR_FILE: Final = "det_avatars.onnx"
RECOGNIZER_FILE: Final = "rec_avatars.onnx"
LICENSE_FILE: Final = "MODEL.LICENSE"
_LICENSE_TEXT: Final = (
    "Apache-2.0\n\nThe two networks of this pack were trained by hyperlora, from nothing, on "
    "portraits that python_avatars (MIT) draws.\nhttps://www.apache.org/licenses/LICENSE-2.0\n"
)
_MIN_FP16_SIZE: Final = 64
"""Least number of elements of a weight that is stored as fp16."""


def write_face_pack(detector: Path, recognizer: Path, output_dir: Path) -> int:
    """Write a face pack from a released detector and recognizer.

    Args:
        detector: Folder of a ``FaceDetector``.
        recognizer: Folder of a ``FaceRecognizer``.
        output_dir: Folder to write.

    Returns:
        Size of the pack in bytes.

    Raises:
        ModelLoadError: If a folder holds another network.
        InvalidArgumentError: If the package ``onnx`` is missing.
    """
    face_detector, face_recognizer = (
        FaceDetector.from_pretrained(detector),
        FaceRecognizer.from_pretrained(recognizer),
    )
    spatial_axes = {2: "height", 3: "width"}
    files = {
        DETECTOR_FILE: _export_onnx(face_detector, torch.zeros(1, 3, 128, 128), 9, spatial_axes),
        RECOGNIZER_FILE: _export_onnx(
            face_recognizer, face_recognizer.example_input, 1, {0: "batch"}
        ),
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (output_dir / name).write_bytes(data)
    (output_dir / LICENSE_FILE).write_text(_LICENSE_TEXT, encoding="utf-8")
    file_entries = {
        name: {"file": name, "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    }
    manifest = {
        "manifest_version": 2,
        "model_id": "avatars",
        "license": LICENSE_FILE,
        "tasks": {
            "detection": file_entries[DETECTOR_FILE],
            "recognition": file_entries[RECOGNIZER_FILE],
        },
    }
    (output_dir / "manifest.json").write_text(
        json.dumps(manifest, indent=1) + "\n", encoding="utf-8"
    )
    return sum(file.stat().st_size for file in output_dir.iterdir())


def _export_onnx(
    network: nn.Module, example: Tensor, num_outputs: int, input_axes: dict[int, str]
) -> bytes:
    """Export a network with fp16 weights; ``input_axes`` names input axes of variable length."""
    try:
        import onnx
    except ImportError as error:
        raise InvalidArgumentError("writing a face pack needs onnx: pip install onnx") from error
    names = [f"out{i}" for i in range(num_outputs)]
    dynamic_axes = {"in": input_axes} | (
        {"out0": {0: "batch"}} if 0 in input_axes else {name: {0: f"k{name}"} for name in names}
    )
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        file = Path(folder) / "network.onnx"
        warnings.simplefilter("ignore")  # PyTorch's, on the exporter that needs no further package
        torch.onnx.export(
            network,
            (example,),
            file,
            dynamo=False,
            opset_version=17,
            input_names=["in"],
            output_names=names,
            dynamic_axes=dynamic_axes,
        )
        return _convert_weights_to_fp16(onnx.load(file)).SerializeToString()


def _convert_weights_to_fp16(model: "ModelProto") -> "ModelProto":
    """Store weights as fp16, each with a cast that onnxruntime evaluates once, when it loads the
    model.
    """
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for weight in model.graph.initializer:
        if weight.data_type != TensorProto.FLOAT or np.prod(weight.dims) < _MIN_FP16_SIZE:
            continue
        name, values = weight.name, numpy_helper.to_array(weight)
        weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
        casts.append(
            helper.make_node("Cast", [f"{name}.half"], [name], f"cast.{name}", to=TensorProto.FLOAT)
        )
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model
