"""``LoraLayout``: which weights of a base model a LoRA adapts, in which order and at which rank."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, TypedDict

from torch import nn

from hyperlora.errors import InvalidArgumentError, LayoutMismatchError

COMPILED_CHILD: Final = "_orig_mod"
"""Where the wrapper that ``torch.compile`` returns keeps its module."""
UNKNOWN_BASE: Final = "unknown"
"""The base of a LoRA whose file does not name one."""


class TargetDict(TypedDict):
    """A ``TargetModule`` as JSON."""

    name: str
    in_features: int
    out_features: int
    kernel_size: Sequence[int] | None


class LayoutDict(TypedDict):
    """A ``LoraLayout`` as JSON, the content of ``layout.json``."""

    targets: list[TargetDict]
    rank: int
    base: str


@dataclass(frozen=True)
class TargetModule:
    """One adapted weight of a base model, of a Linear or a Conv2d layer.

    The LoRA of a convolution is a ``kernel_size`` convolution to ``rank`` channels, then a 1x1
    convolution back (LoCon).

    Attributes:
        name: ``component.module.path``, e.g. ``unet.mid_block.attentions.0.proj_in``.
        in_features: Columns of ΔW; for a convolution, input channels times kernel area.
        out_features: Rows of ΔW.
        kernel_size: Height and width of a convolution's kernel, None for a Linear layer.
    """

    name: str
    in_features: int
    out_features: int
    kernel_size: tuple[int, int] | None = None

    @property
    def component(self) -> str:
        """Component of the pipeline, e.g. ``unet``."""
        return self.name.split(".", 1)[0]

    @property
    def path(self) -> str:
        """Path of the module inside its component."""
        return self.name.split(".", 1)[1]

    @property
    def shape_text(self) -> str:
        """The shape of ΔW for messages, e.g. ``27→64 (3x3 conv)``."""
        shape = f"{self.in_features}→{self.out_features}"
        if self.kernel_size is None:
            return shape
        height, width = self.kernel_size
        return f"{shape} ({height}x{width} conv)"

    @property
    def is_text_projection(self) -> bool:
        """Whether the module projects text tokens to keys or values (cross-attention of UNets)."""
        return self.path.endswith((".attn2.to_k", ".attn2.to_v"))


@dataclass(frozen=True)
class LoraLayout:
    """The ordered targets of one base model at one rank.

    LoRAs of different layouts are never combined; ``check_compatible`` raises instead.

    Attributes:
        targets: The adapted modules; their order is the order of the numbers of a LoRA.
        rank: The rank at every target.
        base: The id of the base model, e.g. ``avatars/base``.
    """

    targets: tuple[TargetModule, ...]
    rank: int
    base: str

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        component: str,
        filter_fn: Callable[[str], bool],
        rank: int,
        base: str,
    ) -> "LoraLayout":
        """Collect every Linear and Conv2d layer of ``module`` that passes a filter.

        Args:
            module: The denoiser or text encoder; it may be on the meta device.
            component: The first part of the targets' names, e.g. ``unet``.
            filter_fn: Whether the layer at a path (without component) becomes a target.
            rank: The rank at every target.
            base: The id of the base model.

        Returns:
            The layout, in the order of ``module.named_modules()``.

        Raises:
            LayoutMismatchError: No layer passes the filter.
        """
        targets = tuple(
            make_target(f"{component}.{path}", get_base_layer(layer))
            for path, layer in list_layers(module)
            if filter_fn(path)
        )
        if not targets:
            raise LayoutMismatchError(
                f"no target of the preset exists in {type(module).__name__}: choose another preset"
            )
        return cls(targets, rank, base)

    @property
    def components(self) -> tuple[str, ...]:
        """Components with at least one target, in order."""
        # unlike a set, a dictionary keeps the order
        return tuple(dict.fromkeys(target.component for target in self.targets))

    @property
    def factor_sizes(self) -> list[int]:
        """Numbers of each factor in a flat LoRA: down [r, in], then up [out, r] of each target."""
        return [
            self.rank * num_features
            for target in self.targets
            for num_features in (target.in_features, target.out_features)
        ]

    @property
    def numel(self) -> int:
        """Length of the flat vector of one LoRA."""
        return sum(self.factor_sizes)

    @property
    def init_std(self) -> float:
        """Standard deviation of random ``down`` factors: (mean in_features)^-1/2."""
        # rows of down then have norms about 1: the numbers of down x are as large as those of x
        mean_in_features = sum(target.in_features for target in self.targets) / len(self.targets)
        return float(mean_in_features**-0.5)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any target, shape, order, rank or base id.

        Files hold this value, so the hashed encoding is fixed; it is that of file format 1.
        """
        encoding = {
            "sites": [
                {
                    "name": target.name,
                    "fan_in": target.in_features,
                    "fan_out": target.out_features,
                    "kernel": target.kernel_size,
                }
                for target in self.targets
            ],
            "rank": self.rank,
            "base": self.base,
        }
        # 64 of the 256 bits; 2³² layouts would be needed for a likely collision
        return hashlib.sha256(json.dumps(encoding, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def max_rank(self) -> int:
        """The highest rank of a ΔW of the widest target; a LoRA of a higher rank adds nothing."""
        return max(min(target.in_features, target.out_features) for target in self.targets)

    def check_rank(self, rank: int, name: str = "rank") -> None:
        """Check a rank that a user chooses.

        Args:
            rank: The rank.
            name: What it is called in the error message.

        Raises:
            InvalidArgumentError: It is below 1 or above ``max_rank``.
        """
        if rank < 1:
            raise InvalidArgumentError(f"{name} must be at least 1, got {rank}")
        if rank > self.max_rank:
            raise InvalidArgumentError(
                f"{name} {rank} asked for, but no weight of {self.base!r} has more than "
                f"{self.max_rank}: give at most that"
            )

    def with_rank(self, rank: int) -> "LoraLayout":
        """Copy the layout at another rank."""
        return replace(self, rank=rank)

    def __add__(self, other: "LoraLayout") -> "LoraLayout":
        """Append the targets of another layout of the same rank and base, e.g. a text encoder's.

        Raises:
            LayoutMismatchError: The ranks or the bases differ.
        """
        # own targets with the other's rank and base, since the targets themselves may differ
        self.check_compatible(LoraLayout(self.targets, other.rank, other.base))
        return replace(self, targets=self.targets + other.targets)

    def check_compatible(self, other: "LoraLayout", *, ignore_rank: bool = False) -> None:
        """Check that LoRAs of another layout can be combined with LoRAs of this one.

        Args:
            other: The layout of the other LoRAs.
            ignore_rank: Whether the ranks may differ.

        Raises:
            LayoutMismatchError: Targets, their shapes or order, base or rank differ.
        """
        # the most general difference first, as it explains the others
        other.check_base(self.base)
        own_targets = {target.name: target for target in self.targets}
        other_targets = {target.name: target for target in other.targets}
        if differing_names := own_targets.keys() ^ other_targets.keys():
            raise LayoutMismatchError(
                f"the LoRA has {len(other_targets)} targets, {len(own_targets)} expected; "
                f"{len(differing_names)} differ, e.g. {min(differing_names)}"
            )
        for name, target in own_targets.items():
            if target != other_targets[name]:
                raise LayoutMismatchError(
                    f"target {name} is {other_targets[name].shape_text} in the LoRA, "
                    f"{target.shape_text} expected"
                )
        # equal names and shapes, so only the order is left: flat vectors would be mixed up
        if self.targets != other.targets:
            raise LayoutMismatchError("the LoRA's targets are in another order than expected")
        if not ignore_rank and self.rank != other.rank:
            raise LayoutMismatchError(
                f"the LoRA has rank {other.rank}, rank {self.rank} expected: resize it first"
            )

    def check_base(self, base: str) -> None:
        """Check that LoRAs of this layout are for the base model ``base``.

        An unknown base fits every other: then the shapes of the targets decide.

        Raises:
            LayoutMismatchError: They are for another base model.
        """
        if self.base != base and UNKNOWN_BASE not in (self.base, base):
            raise LayoutMismatchError(
                f"the LoRA is for base {self.base!r}, this base is {base!r}: use its own base"
            )

    def to_dict(self) -> LayoutDict:
        """Convert to a dictionary for JSON; ``from_dict`` is the inverse."""
        return {
            "targets": [
                {
                    "name": target.name,
                    "in_features": target.in_features,
                    "out_features": target.out_features,
                    "kernel_size": target.kernel_size,
                }
                for target in self.targets
            ],
            "rank": self.rank,
            "base": self.base,
        }

    @classmethod
    def from_dict(cls, data: LayoutDict) -> "LoraLayout":
        """Build a layout from what ``to_dict`` returns, also after a trip through JSON."""
        targets = tuple(
            TargetModule(
                target["name"],
                target["in_features"],
                target["out_features"],
                _make_kernel_size(target["kernel_size"]),
            )
            for target in data["targets"]
        )
        return cls(targets, data["rank"], data["base"])


def list_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over the Linear and Conv2d layers of a module, as if nothing wrapped any of them.

    Args:
        module: A denoiser or text encoder; it or parts of it may be compiled or wrapped by PEFT.

    Yields:
        Path and layer; where PEFT has wrapped a layer, the wrapper, at the path of the layer.
    """
    wrapper_prefix: str | None = None
    for path, layer in unwrap_module(module).named_modules():
        if wrapper_prefix is not None and path.startswith(wrapper_prefix):
            continue  # the layer itself, and the factors of adapters
        wrapper_prefix = None
        if COMPILED_CHILD in layer._modules:
            continue  # the wrapper of torch.compile, whose child follows
        base_layer = get_base_layer(layer)
        if base_layer is not layer:
            wrapper_prefix = f"{path}."
        if isinstance(base_layer, nn.Conv2d) or _get_linear_features(base_layer) is not None:
            yield ".".join(part for part in path.split(".") if part != COMPILED_CHILD), layer


def unwrap_module(module: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of torch.compile and PEFT; any other module itself.

    Args:
        module: A denoiser or text encoder, as a pipeline holds it.
    """
    while True:
        if (compiled := module._modules.get(COMPILED_CHILD)) is not None:
            module = compiled
        elif callable(unwrap := getattr(module, "get_base_model", None)):  # of peft's PeftModel
            module = unwrap()
        else:
            return module


def get_base_layer(layer: nn.Module) -> nn.Module:
    """Return the layer that a wrapper of PEFT adapts; any other layer itself."""
    unwrap = getattr(layer, "get_base_layer", None)  # of peft's BaseTunerLayer
    return unwrap() if callable(unwrap) else layer


def describe_other_layer(modules: Mapping[str, nn.Module], target_name: str) -> str:
    """Describe a layer that stands at the path of a target, but takes no LoRA.

    Args:
        modules: Modules by component.
        target_name: ``component.module.path``.

    Returns:
        The end of a sentence; empty if there is no module at this path.
    """
    component, path = target_name.split(".", 1)
    layers = unwrap_module(modules[component]).named_modules() if component in modules else ()
    layer = next((layer for layer_path, layer in layers if layer_path == path), None)
    if layer is None or isinstance(layer, nn.Conv2d) or _get_linear_features(layer) is not None:
        return ""
    return (
        f"{target_name} of the base is a {type(layer).__name__}, to which no LoRA can be added: "
        "load the base as it is, or quantized by bitsandbytes, torchao, quanto or GGUF"
    )


def make_target(name: str, layer: nn.Module) -> TargetModule:
    """Make the target of a layer, from its settings, since quantized weights have other shapes.

    Args:
        name: ``component.module.path``.
        layer: A Linear or Conv2d layer.

    Returns:
        The target.
    """
    if (features := _get_linear_features(layer)) is not None:
        return TargetModule(name, *features)
    assert isinstance(layer, nn.Conv2d)
    height, width = int(layer.kernel_size[0]), int(layer.kernel_size[1])
    # the kernel [out, in_channels / groups, height, width] as a matrix: one row per output channel
    in_features = layer.in_channels // layer.groups * height * width
    return TargetModule(name, in_features, layer.out_channels, (height, width))


def _get_linear_features(layer: nn.Module) -> tuple[int, int] | None:
    """Input and output features of a Linear layer, also of quantizers' own classes; None of others.

    Quantized layers of Nunchaku, AWQ and GPTQ are plain modules with the same two attributes.
    """
    is_single = isinstance(layer, nn.Linear) or next(layer.children(), None) is None
    in_features = getattr(layer, "in_features", None)
    out_features = getattr(layer, "out_features", None)
    if is_single and isinstance(in_features, int) and isinstance(out_features, int):
        return in_features, out_features
    return None


def _make_kernel_size(sizes: Sequence[int] | None) -> tuple[int, int] | None:
    return (sizes[0], sizes[1]) if sizes else None  # JSON has lists, which equal no tuple
