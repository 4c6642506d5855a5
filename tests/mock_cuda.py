"""A mock of a CUDA card: real numbers on the CPU in tensors that claim to be on ``cuda:0``.

Whole commands run on it without a card. Code that mixes devices raises as it does with one, and
results can be compared with those of the CPU. ``FakeTensorMode`` has no numbers, so samplers, whose
steps depend on them, cannot run in it; neither can backward passes on a card that is not there.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

CUDA: Final = torch.device("cuda:0")
_INDEX_OPS: Final = {"index", "index_put", "index_put_", "_index_put_impl_", "index_fill_"}
"""Operations whose indices may be on the CPU."""
_COPY_OPS: Final = {"copy_", "_to_copy"}
_CPU_FUNCTIONS: Final = {torch._C._nn.pad_sequence, torch._C._nn.one_hot}
"""Functions that make further tensors in C++, which sees the CPU."""


class CudaTensor(Tensor):
    """A tensor that claims to be on the mock card; ``elem`` holds its numbers."""

    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor, requires_grad: bool = False) -> Any:
        elem = _unwrap(elem)  # accelerate makes parameters of the class that it finds
        if elem.is_meta:
            return nn.Parameter(elem, requires_grad)
        tensor = Tensor._make_wrapper_subclass(
            cls,
            elem.shape,
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            device="cpu",  # what C++ sees, whose backward pass would ask a real card
            requires_grad=requires_grad,
        )
        tensor.elem = elem
        return tensor

    device: Any = property(lambda self: CUDA)
    is_cuda: Any = property(lambda self: True)
    is_cpu: Any = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_: Any) -> str:
        return f"CudaTensor({self.elem})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run_operation(func, args, kwargs or {})


@contextmanager
def mock_cuda() -> Iterator[None]:
    """Pretend within a ``with`` block that this machine has one CUDA card."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
        for name, value in {
            "_lazy_init": None,
            "is_available": True,
            "device_count": 1,
            "empty_cache": None,
            "get_device_name": "Mock",
            "is_bf16_supported": True,
            "get_rng_state": None,
            "set_rng_state": None,
        }.items():
            patch.setattr(torch.cuda, name, _make_constant(value))
        # parameters change their class, so their data cannot be replaced in place
        patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
        patch.setattr(
            torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None
        )
        with use_mock_tensors():
            yield


@contextmanager
def use_mock_tensors() -> Iterator[None]:
    """Take part in ``mock_cuda`` within a ``with`` block, in a thread that did not enter it."""
    with _DispatchMode(), _FunctionMode():
        yield


def _make_constant(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


class _DispatchMode(TorchDispatchMode):
    """Sees operations without a tensor of the mock card, e.g. ``torch.zeros(2, device=...)``."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run_operation(func, args, kwargs or {})


def _run_operation(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Check the devices of an operation, run it on the CPU and put the result where it belongs."""
    name, tensors = func.overloadpacket.__name__, _list_tensors((args, kwargs))
    on_card = any(isinstance(tensor, CudaTensor) for tensor in tensors)
    if on_card and name not in _COPY_OPS:
        checked = [args[0]] if name in _INDEX_OPS else tensors
        if any(not isinstance(t, CudaTensor) and t.ndim for t in checked):
            raise RuntimeError(f"Expected all tensors to be on the same device: {func}")
    if kwargs.get("device") is not None:
        on_card = torch.device(kwargs["device"]).type == "cuda"
        if on_card and kwargs.get("generator") is not None:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        kwargs = {**kwargs, "device": torch.device("cpu")} if on_card else kwargs
    if name in _COPY_OPS:  # C++ gives the device that it sees; ``_move`` changes it
        on_card = isinstance(args[0], CudaTensor)
    output = func(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
    known = {id(_unwrap(tensor)): tensor for tensor in tensors}  # in-place operations return these

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor) or id(value) in known:
            return known.get(id(value), value)
        return CudaTensor(value) if on_card else value

    return tree_map(wrap, output)


class _FunctionMode(TorchFunctionMode):
    """Moves tensors between CPU and mock card, which C++ takes for the same device."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.cpu, Tensor.cuda):
            func, args, kwargs = Tensor.to, (args[0], func.__name__), {}
        if func is Tensor.to:
            return _move(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            options = {name: value for name, value in kwargs.items() if name != "device"}
            return _move(func(*args, **options), kwargs["device"])
        if func in _CPU_FUNCTIONS:
            device = _list_tensors(args)[0].device
            to_cpu = partial(_move, device="cpu")
            return _move(func(*tree_map_only(Tensor, to_cpu, args), **kwargs), device)
        if args and isinstance(args[0], CudaTensor):
            if func in (Tensor.numpy, Tensor.__array__):
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            if func is Tensor.tolist:
                return args[0].elem.tolist()
            if func is Tensor.new_tensor:
                return _move(func(*args, **kwargs), CUDA)
        return func(*args, **kwargs)


def _move(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``Tensor.to`` in all its forms."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for value in (*args, kwargs.get("other")):
        if isinstance(value, Tensor):
            device, dtype = value.device, value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, str | torch.device):
            device = value
        elif isinstance(value, int) and not isinstance(value, bool):
            device = torch.device("cuda", value)
    from_card, device = isinstance(tensor, CudaTensor), torch.device(device or tensor.device)
    if not from_card and device.type != "cuda":
        return tensor.to(*args, **kwargs)
    if from_card != (device.type == "cuda"):
        tensor = _Move.apply(tensor, not from_card)
    tensor = tensor.to("meta") if device.type == "meta" else tensor
    return tensor if dtype is None else tensor.to(dtype)


class _Move(torch.autograd.Function):
    """A differentiable copy to the other device."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, to_card: bool) -> Tensor:
        ctx.to_card = to_card
        return _copy(tensor, to_card)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _copy(grad, not ctx.to_card), None


def _copy(tensor: Tensor, to_card: bool) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass(), _disable_current_modes():
        elem = _unwrap(tensor).detach().clone()
        return CudaTensor(elem) if to_card else elem


def _unwrap(value: Any) -> Any:
    return value.elem if isinstance(value, CudaTensor) else value


def _list_tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
