"""Encoders of any size in little memory: weights are read from the file when a layer runs.

The model is built without numbers. Hooks give each of its layers the weights before it computes,
and take them away after it. Where file and computation have one precision, the weights are views of
the mapped file, whose pages the system drops when it needs memory.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hyperlora.errors import ModelLoadError, format_reason

_UNIT_CLASSES: Final = (nn.MultiheadAttention,)
"""Modules that use the parameters of their children without calling them."""
_NUM_NAMES: Final = 3
"""Names of tensors in an error message."""


class TensorFiles:
    """The tensors of one or several safetensors files, read one at a time.

    Args:
        paths: The files; their tensors have different names.

    Raises:
        ModelLoadError: A file is missing or not whole.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        for path in paths:
            if not path.is_file():
                raise ModelLoadError(f"there is no file {path}: fetch the model again")
            try:
                file = self._stack.enter_context(safe_open(path, "pt"))
                self._files |= dict.fromkeys(file.keys(), file)
            except (SafetensorError, OSError, ValueError) as error:
                raise ModelLoadError(
                    f"{path} is not whole ({format_reason(error)}): fetch it again"
                ) from error

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name, from the headers alone."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}

    def read(self, name: str) -> Tensor:
        """Read one tensor in the precision of the file."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def read_first_row(self, name: str) -> bytes:
        """Read the bytes of the first row of one tensor, for a fingerprint."""
        row: Tensor = self._files[name].get_slice(name)[:1]
        return row.contiguous().view(torch.uint8).numpy().tobytes()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the files."""
        self._files.clear()
        self._stack.close()


def build_streamed_module(
    build_fn: Callable[[], nn.Module],
    files: TensorFiles,
    *,
    rename_fn: Callable[[str], str | None] = str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Build a module whose layers read their weights from files whenever they run.

    Args:
        build_fn: Makes the module; its parameters take no memory.
        files: Hold every parameter. They stay open as long as the module is used.
        rename_fn: From the name of a tensor to the name of a parameter; None for a tensor of
            another part of the model.
        dtype: The precision of the computation.
        device: Where it runs.

    Returns:
        The module, frozen and in evaluation mode.

    Raises:
        ModelLoadError: Parameters are missing in the files, are of other shapes, or tensors are
            left over.
    """
    with init_empty_weights(include_buffers=False):
        module = build_fn()
    module.eval().requires_grad_(False)
    tensor_names = _match_names(module, files, rename_fn)
    for parameter in module.parameters():  # buffers keep theirs, e.g. frequencies in float32
        parameter.data = torch.empty_like(parameter, dtype=dtype)
    for submodule in module.modules():
        for name, buffer in submodule.named_buffers(recurse=False):
            submodule._buffers[name] = buffer.to(device)
    for owner_path, owner in _list_units(module):
        prefix = f"{owner_path}." if owner_path else ""
        is_unit = isinstance(owner, _UNIT_CLASSES)
        names = {
            name: tensor_names[prefix + name] for name, _ in owner.named_parameters(recurse=is_unit)
        }
        if names:
            _add_hooks(owner, names, files, torch.device(device), dtype)
    return module


def choose_encoder_dtype(device: torch.device) -> torch.dtype:
    """Choose bfloat16 where the device computes fast in it, else float32.

    Args:
        device: Where the encoder runs.

    Returns:
        The precision.
    """
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        is_fast = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
        return torch.bfloat16 if is_fast else torch.float32
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def _match_names(
    module: nn.Module, files: TensorFiles, rename_fn: Callable[[str], str | None]
) -> dict[str, str]:
    """Return the tensor of each parameter; raise ``ModelLoadError`` unless all fit."""
    shapes = files.shapes
    tensor_names = {
        parameter_name: name for name in shapes if (parameter_name := rename_fn(name)) is not None
    }
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    file_names = ", ".join(path.name for path in files.paths)
    class_name = type(module).__name__
    for description, names in (
        ("lacks", expected.keys() - tensor_names.keys()),
        ("has unknown tensors", tensor_names.keys() - expected.keys()),
    ):
        if names:
            raise ModelLoadError(
                f"{file_names} is no {class_name} of this size: it {description} "
                f"{_format_names(sorted(names))}; give the encoder's own file"
            )
    for name, shape in expected.items():
        if shapes[tensor_names[name]] != shape:
            raise ModelLoadError(
                f"{file_names} is no {class_name} of this size: {name} is "
                f"{list(shapes[tensor_names[name]])}, {list(shape)} expected; give the encoder's "
                "own file"
            )
    return tensor_names


def _format_names(names: Sequence[str]) -> str:
    text = ", ".join(names[:_NUM_NAMES])
    num_others = len(names) - _NUM_NAMES
    return f"{text} and {num_others} more" if num_others > 0 else text


def _list_units(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module, without the children of ``_UNIT_CLASSES``."""
    unit_prefix: str | None = None
    for path, submodule in module.named_modules():
        if unit_prefix is not None and path.startswith(unit_prefix):
            continue
        unit_prefix = f"{path}." if isinstance(submodule, _UNIT_CLASSES) else None
        yield path, submodule


def _add_hooks(
    owner: nn.Module,
    names: dict[str, str],
    files: TensorFiles,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Make a module read its parameters before it runs, and drop them after."""
    empty = dict(owner.named_parameters())

    def set_parameter(name: str, parameter: nn.Parameter) -> None:
        """Replace a parameter of the module or of one of its children."""
        path, _, leaf = name.rpartition(".")
        setattr(owner.get_submodule(path), leaf, parameter)

    def read_weights(*_: object) -> None:
        """Read the parameters."""
        for name, tensor_name in names.items():
            tensor = files.read(tensor_name).to(device, dtype)
            set_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def drop_weights(*_: object) -> None:
        """Put the parameters without numbers back."""
        for name in names:
            set_parameter(name, empty[name])

    owner.register_forward_pre_hook(read_weights)
    owner.register_forward_hook(drop_weights, always_call=True)
