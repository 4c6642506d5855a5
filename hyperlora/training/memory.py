"""The memory of a training: a table of its parts, and a refusal of what cannot fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.layout import LoraLayout
from hyperlora.models.hypernetwork import Hypernetwork
from hyperlora.training.sharding import count_sharded_bytes

_Network = TypeVar("_Network", bound=nn.Module)
Part = Literal["base", "encoder", "network", "activations"]
"""What a row belongs to, for the advice in a refusal."""
BYTES_PER_TRAINED_PARAM: Final = 16
"""A float32 weight, its gradient, and both moments of AdamW."""
_HEAD_NAMES: Final = ("head.", "code_proj", "init_codes", "code_embed")
"""Prefixes of the parameters of a ``Hypernetwork`` that grow with targets and rank."""
_NETWORK_ADVICE: Final = (
    "choose another head (basis with share_by_shape is small), a lower rank or a smaller preset"
)


@dataclass(frozen=True)
class MemoryRow:
    """One line of the table.

    Attributes:
        name: What it is.
        num_params: Parameters; None for what has none.
        num_bytes: Memory on one device; None where it is not known.
        part: What the row belongs to.
    """

    name: str
    num_params: int | None
    num_bytes: int | None
    part: Part


@dataclass(frozen=True)
class TrainingMemory:
    """Memory that a training takes on each device.

    Attributes:
        rows: The parts.
        lora: One line about the LoRA.
        use_checkpointing: Whether the denoiser recomputes activations.
        is_half: Whether the base is in half precision.
    """

    rows: Sequence[MemoryRow]
    lora: str
    use_checkpointing: bool
    is_half: bool

    @property
    def num_bytes(self) -> int:
        """The sum of all parts that are known."""
        return sum(row.num_bytes or 0 for row in self.rows)

    @property
    def num_trained_params(self) -> int:
        """Parameters of the network that is trained."""
        return sum(row.num_params or 0 for row in self.rows if row.part == "network")

    def describe(self) -> str:
        """Describe the sums in one line, as the headers of configurations do."""
        return (
            f"{format_bytes(self.num_bytes)} per device, "
            f"{format_count(self.num_trained_params)} trained parameters"
        )

    def print_table(self, device_bytes: int | None = None, device_name: str = "") -> None:
        """Print the table.

        Args:
            device_bytes: Memory of the device, for the last line; None leaves it out.
            device_name: Its name.
        """
        table = Table("", "parameters", "memory")
        for column in table.columns[1:]:
            column.justify = "right"
        for row in self.rows:
            params = "" if row.num_params is None else format_count(row.num_params)
            memory = "not estimated" if row.num_bytes is None else format_bytes(row.num_bytes)
            table.add_row(row.name, params, memory)
        table.add_section()
        table.add_row("together, on each device", "", format_bytes(self.num_bytes))
        if device_bytes is not None:
            table.add_row(f"memory of {device_name}", "", format_bytes(device_bytes))
        console = Console(width=100)
        console.print(self.lora, highlight=False)
        console.print(table)

    def check_fits(self, device_bytes: int, device_name: str) -> None:
        """Refuse a training that cannot fit.

        Args:
            device_bytes: Memory of the device.
            device_name: Its name.

        Raises:
            InvalidArgumentError: It cannot; the sentence names the option of the largest part.
        """
        if self.num_bytes <= device_bytes:
            return
        sizes: dict[Part, int] = {}
        for row in self.rows:
            sizes[row.part] = sizes.get(row.part, 0) + (row.num_bytes or 0)
        largest = max(sizes, key=lambda part: sizes[part])
        raise InvalidArgumentError(
            f"the training takes about {format_bytes(self.num_bytes)} and {device_name} has "
            f"{format_bytes(device_bytes)}; the largest part is the {largest} with "
            f"{format_bytes(sizes[largest])}: {self._advise(largest)}"
        )

    def _advise(self, part: Part) -> str:
        if part == "network":
            return _NETWORK_ADVICE
        if part == "activations" and not self.use_checkpointing:
            return "set gradient_checkpointing: true"
        if part == "activations":
            return "lower batch_size, num_targets or resolution"
        if not self.is_half:
            return "set base_options: {dtype: bfloat16}"
        return "shard the base over several devices with shard_base: true, or take a smaller base"


@dataclass(frozen=True)
class TrainerOptions:
    """What of a trainer changes the memory of a training.

    Attributes:
        has_average: Whether a moving average of the weights is kept.
        is_mixed: Whether the network computes with copies of its weights in half precision.
        num_devices: Devices that share each step.
    """

    has_average: bool = False
    is_mixed: bool = False
    num_devices: int = 1


def make_network_rows(network: nn.Module, options: TrainerOptions) -> list[MemoryRow]:
    """Make the rows of the trained network.

    Args:
        network: All that is trained, with or without numbers.
        options: Of the trainer.

    Returns:
        The network, or a hypernetwork's decoder and head, and what training adds.
    """
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    head_names = {
        f"{path}.{name}".removeprefix(".")
        for path, module in network.named_modules()
        if isinstance(module, Hypernetwork)
        for name, _ in module.named_parameters()
        if name.startswith(_HEAD_NAMES)
    }
    num_head = sum(p.numel() for name, p in trained.items() if name in head_names)
    num_all = sum(p.numel() for p in trained.values())
    rows = [MemoryRow("network", num_all, 4 * num_all, "network")]
    if num_head:
        num_decoder = num_all - num_head
        rows = [
            MemoryRow("decoder", num_decoder, 4 * num_decoder, "network"),
            MemoryRow("head (grows with targets and rank)", num_head, 4 * num_head, "network"),
        ]
    rows += [
        MemoryRow("gradients", None, 4 * num_all, "network"),
        MemoryRow("moments of the optimizer", None, 8 * num_all, "network"),
    ]
    extras = {
        "moving average of the weights": 4 * num_all * options.has_average,
        "weights in half precision": 2 * num_all * options.is_mixed,
        "gradients in transit between devices": 4 * num_all * (options.num_devices > 1),
    }
    return rows + [MemoryRow(name, None, size, "network") for name, size in extras.items() if size]


def make_frozen_row(name: str, module: nn.Module, part: Part, num_shards: int = 1) -> MemoryRow:
    """Make the row of a frozen module at the precision of its weights.

    Args:
        name: What it is.
        module: With or without numbers.
        part: ``base`` or ``encoder``.
        num_shards: Devices over which its blocks are spread.

    Returns:
        The row.
    """
    parameters = list(module.parameters())
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
    num_bytes = count_sharded_bytes(module, num_shards)
    num_params = sum(p.numel() for p in parameters)
    shards = "" if num_shards == 1 else f", {num_shards} shards"
    name = f"{name} ({', '.join(dtypes)}, frozen{shards})"
    return MemoryRow(name, num_params, num_bytes, part)


def describe_lora(layout: LoraLayout) -> str:
    """Describe the LoRAs of a layout in one line."""
    return (
        f"LoRA for {layout.base}: rank {layout.rank}, {len(layout.targets)} targets, "
        f"{format_count(layout.numel)} numbers, {format_bytes(4 * layout.numel)} in float32"
    )


def make_checked_network(make_network: Callable[[], _Network]) -> _Network:
    """Make a network, unless no training on this machine can hold it.

    Args:
        make_network: Makes it; called a first time without memory for the weights.

    Returns:
        The network.

    Raises:
        InvalidArgumentError: It is too large.
    """
    with torch.device("meta"):
        check_network_size(make_network())
    return make_network()


def check_network_size(network: nn.Module) -> None:
    """Refuse a network that no training on this machine can hold.

    Args:
        network: With or without numbers.

    Raises:
        InvalidArgumentError: Weights, gradients and moments exceed the memory of the accelerator,
            or the weights that of the machine.
    """
    num_params = sum(p.numel() for p in network.parameters())
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    checks = (
        (BYTES_PER_TRAINED_PARAM * num_params, device, "training it takes"),
        (4 * num_params, torch.device("cpu"), "its weights take"),
    )
    for num_bytes, place, verb in checks:
        if num_bytes > (available := get_device_bytes(place)):
            raise InvalidArgumentError(
                f"the network has {format_count(num_params)} parameters, {verb} "
                f"{format_bytes(num_bytes)} and {place} has {format_bytes(available)}: "
                f"{_NETWORK_ADVICE}"
            )


def get_device_bytes(device: torch.device) -> int:
    """Return the memory of a device; of the CPU, that of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    return int(psutil.virtual_memory().total)


def format_count(count: int) -> str:
    """Format a number of parameters, e.g. ``7.10 B``, ``85.8 M`` or ``9.5 k``."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} B"
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count / 1e3:.1f} k"


def format_bytes(num_bytes: int) -> str:
    """Format bytes in units of 10⁹, e.g. ``12.3 GB``, or ``5.1 MB`` below 0.1 GB."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
