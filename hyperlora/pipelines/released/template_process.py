"""The program that runs a hub's ``model.py`` in a process of its own; see ``template_sandbox``.

Started as ``python -I -m hyperlora.pipelines.released.template_process REQUEST.json``: imports its
libraries, closes what the template must not do, runs the template and writes ``lora.safetensors``
and ``report.json``.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

import torch
import torchvision
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hyperlora.pipelines.released.template_guard import Guard, list_readable_dirs
from hyperlora.pipelines.released.template_sandbox import LORA_NAME, REPORT_NAME


class TemplateNetwork(Protocol):
    """What the class ``TEMPLATE_MODEL`` of a template offers."""

    def process_inputs(self, pipe: None, image: list[Image.Image]) -> dict[str, Any]:
        """Convert images to the arguments of ``forward``.

        Args:
            pipe: Always None: a template runs without a pipeline.
            image: The images of the user, RGB.
        """

    def forward(self, pipe: None, **inputs: Any) -> dict[str, Any]:
        """Return a table with the LoRA under ``lora``.

        Args:
            pipe: Always None: a template runs without a pipeline.
            **inputs: What ``process_inputs`` returned.
        """


def load_template(code: bytes, path: Path) -> ModuleType:
    """Execute the bytes of a ``model.py`` as a module.

    Args:
        code: The bytes whose digest was checked.
        path: The path of the file, for its ``__file__`` and tracebacks.

    Returns:
        The module, with ``TEMPLATE_MODEL`` and ``TEMPLATE_MODEL_PATH``.
    """
    module = ModuleType("template_model")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    exec(compile(code, str(path), "exec"), module.__dict__)
    return module


def import_libraries() -> None:
    """Import what templates use; libraries open libraries of the system when they are imported."""
    for name in ("AutoModel", "SiglipVisionModel", "SiglipImageProcessor", "PreTrainedModel"):
        getattr(transformers, name)
    torchvision.disable_beta_transforms_warning()
    # transformers 5 has one class for both; older templates import the former name
    siglip = transformers.models.siglip.modeling_siglip
    for module in (sys.modules["transformers"], siglip):  # not the lazy object that import bound
        if not hasattr(module, "SiglipVisionTransformer"):
            vars(module)["SiglipVisionTransformer"] = siglip.SiglipVisionModel


def load_weights(template: ModuleType, model_dir: Path) -> dict[str, Tensor]:
    """Load the weights that a template names.

    Args:
        template: The module of ``load_template``.
        model_dir: The folder in which its relative paths begin.

    Returns:
        The weights by key, in the precision of the files.
    """
    paths = template.TEMPLATE_MODEL_PATH
    weights: dict[str, Tensor] = {}
    for name in [paths] if isinstance(paths, str) else paths:
        path = model_dir / name  # an absolute name stays as it is
        path = path if path.is_file() else model_dir / Path(name).name
        if path.suffix != ".safetensors":
            raise ValueError(f"{name} is no .safetensors file, the only kind that is opened")
        weights |= load_file(path)
    return weights


def build_model(template: ModuleType, weights: dict[str, Tensor]) -> TemplateNetwork:
    """Build a template's network with its weights, without a second copy where that is possible.

    Args:
        template: The module of ``load_template``.
        weights: The weights by key.

    Returns:
        The network in the precision of the weights.
    """
    options = getattr(template, "TEMPLATE_MODEL_CONFIG", None) or {}
    with torch.device("meta"):
        model: nn.Module = template.TEMPLATE_MODEL(**options)
    model.load_state_dict(weights, assign=True)
    if any(buffer.is_meta for buffer in model.buffers()):  # computed when built, in no file
        dtype = next(iter(weights.values())).dtype
        model = template.TEMPLATE_MODEL(**options).to(dtype)
        model.load_state_dict(weights, assign=True)
    return cast("TemplateNetwork", model.eval().requires_grad_(False))


def collect_lora(output: object) -> dict[str, Tensor]:
    """Take the LoRA out of what a template returned.

    Raises:
        ValueError: It returned no table of tensors.
    """
    lora = output.get("lora") if isinstance(output, dict) else None
    if not isinstance(lora, dict) or not all(isinstance(t, Tensor) for t in lora.values()):
        raise ValueError("the template returned no table of tensors under 'lora'")
    return {str(key): tensor.detach().cpu().clone().contiguous() for key, tensor in lora.items()}


def run_template(request: dict[str, Any], work_dir: Path, guard: Guard) -> None:
    """Run the template of a request and write the LoRA that it returns.

    Args:
        request: ``model_dir``, ``sha256`` of ``model.py`` and the names of ``images``.
        work_dir: The folder of the pictures and of the result.
        guard: The hook that is set before the template's first line.
    """
    model_path = Path(request["model_dir"]) / "model.py"
    code = model_path.read_bytes()
    if hashlib.sha256(code).hexdigest() != request["sha256"]:
        raise ValueError("model.py changed after it was checked")
    images = [Image.open(work_dir / name).convert("RGB") for name in request["images"]]
    import_libraries()
    sys.addaudithook(guard)
    template = load_template(code, model_path)
    model = build_model(template, load_weights(template, model_path.parent))
    with torch.no_grad():
        inputs = model.process_inputs(pipe=None, image=images)
        output = model.forward(pipe=None, **inputs)
    save_file(collect_lora(output), work_dir / LORA_NAME)


def limit_memory(max_bytes: int) -> None:
    """Limit the private memory of this process, where the system can."""
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (max_bytes, max_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Run one request; the report says how it ended."""
    request_path = Path(sys.argv[1])
    work_dir = request_path.parent
    request: dict[str, Any] = json.loads(request_path.read_text(encoding="utf-8"))
    report_fd = os.open(work_dir / REPORT_NAME, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)

    def report(**fields: str) -> None:
        """Write the report; it is open since before the template ran."""
        os.ftruncate(report_fd, 0)
        os.pwrite(report_fd, json.dumps(fields).encode(), 0)

    guard = Guard(
        work_dir,
        list_readable_dirs(Path(request["model_dir"])),
        lambda action: report(refused=action),
    )
    limit_memory(int(request["max_memory_bytes"]))
    try:
        run_template(request, work_dir, guard)
    except MemoryError:
        report(error="it needs more memory than the limit")
    except BaseException as error:  # whatever a template raises, also SystemExit
        report(error=f"{type(error).__name__}: {error}"[:500])
    else:
        report(ok="")


if __name__ == "__main__":
    main()
