"""``ComputeConfig``: where models run and in which precision; every command decides it here."""

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch

from hyperlora.errors import InvalidArgumentError

Offload = Literal["none", "model", "sequential", "group"]
OFFLOADS: Final = get_args(Offload)
_OFFLOADS_BY_MEMORY: Final[tuple[Offload, ...]] = ("none", "model", "group", "sequential")
"""Each needs less memory than the one before, and more time."""
_DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Device, precision and memory of the models that a command runs.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``. ``auto`` is the accelerator if
            there is one, else the CPU.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``, of the base. ``auto`` is bfloat16
            on a CUDA device that computes in it, float16 on another accelerator, float32 on a CPU.
        offload: Where the base waits while it does not compute, for models larger than the memory
            of the device: ``none``, ``model`` (one component at a time), ``sequential`` (one layer
            at a time, slow) or ``group`` (a few layers at a time, prefetched).
        vae_tiling: Whether the VAE works on tiles, which bounds its memory for large images.
        compile: Whether the denoiser is compiled, which pays off over many images.
    """

    device: str = "auto"
    dtype: str = "auto"
    offload: Offload = "none"
    vae_tiling: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        """Check every setting against this machine.

        Raises:
            InvalidArgumentError: A name is unknown, or this machine lacks the device.
        """
        if self.dtype not in ("auto", *_DTYPES):
            raise InvalidArgumentError(
                f"unknown dtype {self.dtype!r}; known: auto, {', '.join(_DTYPES)}"
            )
        if self.offload not in OFFLOADS:
            raise InvalidArgumentError(
                f"unknown offload {self.offload!r}; known: {', '.join(OFFLOADS)}"
            )
        device = self.torch_device  # checks the name
        if self.offload != "none" and device.type == "cpu":
            raise InvalidArgumentError(
                f"offload {self.offload!r} frees the memory of an accelerator, and the device is "
                "the CPU: leave it out"
            )

    @property
    def torch_device(self) -> torch.device:
        """The device that was chosen or found.

        Raises:
            InvalidArgumentError: The name is unknown, or this machine lacks the device.
        """
        if self.device == "auto":
            return torch.accelerator.current_accelerator(check_available=True) or torch.device(
                "cpu"
            )
        try:
            device = torch.device(self.device)
        except RuntimeError:
            device = torch.device("meta")
        if device.type not in ("cpu", "cuda", "mps", "xpu"):
            raise InvalidArgumentError(
                f"unknown device {self.device!r}; known: auto, cpu, cuda, cuda:N, mps, xpu"
            )
        num_devices = {
            "cpu": 1,
            "cuda": torch.cuda.device_count(),
            "mps": int(torch.backends.mps.is_available()),
            "xpu": torch.xpu.device_count(),
        }[device.type]
        if (device.index or 0) >= num_devices:
            raise InvalidArgumentError(
                f"device {self.device!r} is not there: torch finds {num_devices} of the kind "
                f"{device.type}; use --device auto"
            )
        return device

    @property
    def torch_dtype(self) -> torch.dtype:
        """The precision that was chosen, or that suits the device."""
        if self.dtype != "auto":
            return _DTYPES[self.dtype]
        device = self.torch_device
        if device.type == "cpu":
            return torch.float32
        if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.float16
        return torch.float16 if device.type == "mps" else torch.bfloat16

    def describe(self) -> str:
        """Describe the choice in one line, e.g. ``cuda (NVIDIA L4), bfloat16, offload model``."""
        device = self.torch_device
        name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
        parts = [f"{device}{name}", str(self.torch_dtype).removeprefix("torch.")]
        parts += [f"offload {self.offload}"] if self.offload != "none" else []
        parts += ["VAE tiling"] if self.vae_tiling else []
        parts += ["compiled"] if self.compile else []
        return ", ".join(parts)

    def suggest_less_memory(self, option_names: Collection[str]) -> str | None:
        """Suggest the option to try next where memory has run out.

        Args:
            option_names: The options that can be changed: ``offload``, ``vae_tiling``, ``dtype``.

        Returns:
            The option as the command line takes it; None if all are used up.
        """
        is_accelerator = self.torch_device.type != "cpu"
        if "offload" in option_names and is_accelerator and self.offload != "sequential":
            next_index = _OFFLOADS_BY_MEMORY.index(self.offload) + 1
            return f"--offload {_OFFLOADS_BY_MEMORY[next_index]}"
        if "vae_tiling" in option_names and not self.vae_tiling:
            return "--vae-tiling"
        if "dtype" in option_names and self.torch_dtype == torch.float32:
            return "--dtype bfloat16"
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of a device, or of the CPU, is used up."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # errors without a class of their own: of the allocator of the CPU, of MPS and of a driver
    texts = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def disable_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Compute in the dtype of the tensors, also where mixed precision is on.

    Args:
        device: Where the tensors are. The meta device, which has no autocast, is left as it is.

    Returns:
        A context manager.
    """
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def empty_cache() -> None:
    """Give memory that torch keeps for later back to the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def fork_rng(device: torch.device) -> AbstractContextManager[None]:
    """Put back the global random states of the CPU and a device after a ``with`` block.

    Args:
        device: The device of the computation. Others are left alone: to ask for its state would
            start a card that is not used.

    Returns:
        A context manager.
    """
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
