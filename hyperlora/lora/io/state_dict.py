"""Parse the tensors of a LoRA file to pairs with alpha folded in."""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Final

from torch import Tensor

from hyperlora.errors import InvalidLoraFileError
from hyperlora.lora.io.adapter_config import AdapterConfig
from hyperlora.lora.io.comfyui_keys import COMFYUI_PREFIX
from hyperlora.lora.io.converters import Piece
from hyperlora.lora.io.keys import LoraFormat
from hyperlora.lora.io.lycoris import PlainFactors, convert_to_plain, count_plain_numbers
from hyperlora.lora.io.spellings import find_refused_kind, parse_key, split_stem
from hyperlora.lora.io.target_names import StemShape
from hyperlora.lora.layout import TargetModule

_SGM_STEM: Final = re.compile(
    r"lora_unet_(?:input_blocks|middle_block|output_blocks|time_embed_\d|label_emb|out_\d)"
)
_KERNEL_BY_PATH: Final = {
    re.compile(r"(?:.+\.)?(?:conv[12]|conv_in|conv_out|conv)"): (3, 3),
    re.compile(r"(?:.+\.)?conv_shortcut"): (1, 1),
}
"""Kernels of UNets, for factors that files hold as matrices."""


@dataclass(frozen=True)
class LoraFactors:
    """The factors of one target in a file.

    Attributes:
        name: The name of the target.
        down: [rank, in], or [rank, in, kh, kw] for a convolution.
        up: [out, rank], or [out, rank, 1, 1] for a convolution.
    """

    name: str
    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """Rank of the pair."""
        return self.down.shape[0]

    @property
    def target(self) -> TargetModule:
        """Name and shape of the adapted module."""
        kernel_size = (self.down.shape[2], self.down.shape[3]) if self.down.ndim == 4 else None
        return TargetModule(self.name, self.down[0].numel(), self.up.shape[0], kernel_size)

    def fit(self, target: TargetModule | None) -> "LoraFactors":
        """Reshape matrices to kernels and back, as the adapted module has them.

        Args:
            target: The module; None if it is not known.

        Returns:
            The same ΔW; the factors as they are if they do not fit the module.
        """
        kernel_size = None if target is None else target.kernel_size
        if target is None and self.name.startswith("unet."):
            path = self.name.removeprefix("unet.")
            kernels = (size for p, size in _KERNEL_BY_PATH.items() if p.fullmatch(path))
            kernel_size = next(kernels, None)
        own_kernel_size = self.target.kernel_size
        if kernel_size == own_kernel_size or (target is None and kernel_size is None):
            return self
        if kernel_size is None:
            is_point = own_kernel_size == (1, 1)
            return (
                replace(self, down=self.down.flatten(1), up=self.up.flatten(1))
                if is_point
                else self
            )
        if own_kernel_size is None and self.down.shape[1] % prod(kernel_size) == 0:
            down = self.down.reshape(self.rank, -1, *kernel_size)
            return replace(self, down=down, up=self.up[..., None, None])
        return self


@dataclass(frozen=True)
class Adapters:
    """The tensors of a file by module.

    Attributes:
        tensors: Tensors by role, by stem.
        file_name: The name of the file in error messages.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    file_name: str

    def detect_format(self, components: Collection[str]) -> LoraFormat:
        """Detect the format in which the file is best written again.

        Args:
            components: Components that the file adapts.

        Returns:
            The key names of its first module; ``diffusers`` for spellings that are never written.
        """
        stem = next(iter(self.tensors))
        is_kohya = stem.startswith(("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_"))
        if "transformer" in components:
            return "comfyui" if stem.startswith(COMFYUI_PREFIX) else "diffusers"
        if any(map(_SGM_STEM.match, self.tensors)):
            return "sgm"
        return "kohya" if is_kohya or stem.startswith(COMFYUI_PREFIX) else "diffusers"


def check_keys(keys: Iterable[str], file_name: str) -> tuple[list[str], list[str]]:
    """Divide the keys of a file into those of a LoRA and bystanders.

    Args:
        keys: The keys.
        file_name: The name of the file in error messages.

    Returns:
        The keys of the LoRA, and those that can be left out.

    Raises:
        InvalidLoraFileError: Leaving a key out would change images.
    """
    lora_keys: list[str] = []
    other_keys: list[str] = []
    for key in keys:
        if parse_key(key) is not None:
            lora_keys.append(key)
        elif kind := find_refused_kind(key):
            raise InvalidLoraFileError(
                f"{file_name} {kind} (key {key}): only LoRA, LoCon, LoHa and LoKr are read"
            )
        else:
            other_keys.append(key)
    return lora_keys, other_keys


def group_tensors(tensors: Mapping[str, Tensor], file_name: str) -> Adapters:
    """Group the tensors of a LoRA by module.

    Args:
        tensors: The tensors by key.
        file_name: The name of the file in error messages.

    Returns:
        The tensors by stem and role.

    Raises:
        InvalidLoraFileError: A module has two tensors for one role.
    """
    groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        parsed = parse_key(key)
        assert parsed is not None
        if parsed.role in groups[parsed.stem]:
            raise InvalidLoraFileError(
                f"{file_name} has two keys for {parsed.role} of {parsed.stem}, one of them {key}"
            )
        groups[parsed.stem][parsed.role] = tensor
    return Adapters(dict(groups), file_name)


def parse_adapters(
    adapters: Adapters,
    config: AdapterConfig,
    resolve_fn: Callable[[Sequence[StemShape]], Mapping[str, Sequence[Piece]]],
    max_parameters: int,
) -> dict[str, LoraFactors]:
    """Convert the modules of a file to pairs in float32, with the scale multiplied into ``up``.

    Args:
        adapters: The tensors of the file.
        config: Alphas of PEFT's and diffusers' files. In kohya's files they are tensors.
        resolve_fn: Function from modules to their targets.
        max_parameters: Numbers that the pairs may have.

    Returns:
        Pairs by target name.

    Raises:
        InvalidLoraFileError: A factor is missing, shapes do not fit each other, or two modules are
            one target.
    """
    file_name = adapters.file_name
    num_numbers = sum(map(count_plain_numbers, adapters.tensors.values()))
    if num_numbers > max_parameters:
        raise InvalidLoraFileError(
            f"{file_name} would unfold to {num_numbers:,} numbers as a plain LoRA: too many"
        )
    factors = {
        stem: _make_plain_factors(stem, tensors, file_name)
        for stem, tensors in adapters.tensors.items()
    }
    shapes = [
        StemShape(stem, plain.up.shape[0], plain.down[0].numel()) for stem, plain in factors.items()
    ]
    factors_by_name: dict[str, LoraFactors] = {}
    for stem, pieces in resolve_fn(shapes).items():
        plain, tensors = factors[stem], adapters.tensors[stem]
        scale = _compute_scale(stem, pieces[0].name, tensors, plain, config, file_name)
        up = plain.up if scale == 1 else plain.up.double() * scale
        pair = LoraFactors(stem, plain.down.float(), up.float())
        for name, piece in _split_pair(pair, pieces):
            if name in factors_by_name:
                raise InvalidLoraFileError(
                    f"{file_name} has two LoRAs for target {name}, one of them under {stem}"
                )
            factors_by_name[name] = piece
    return factors_by_name


def _make_plain_factors(stem: str, tensors: Mapping[str, Tensor], file_name: str) -> PlainFactors:
    """The factors of one module, checked."""
    shapes = ", ".join(f"{role} {list(tensor.shape)}" for role, tensor in tensors.items())
    try:
        plain = convert_to_plain(tensors)
    except (ValueError, RuntimeError, IndexError) as error:
        raise InvalidLoraFileError(
            f"{stem} of {file_name} is {shapes}, which do not fit each other"
        ) from error
    if plain is None:
        missing = "down" if "down" not in tensors else "up"
        if any(role.startswith(("hada_", "lokr_")) for role in tensors):
            missing = "other half"
        raise InvalidLoraFileError(
            f"{file_name} has {' and '.join(sorted(tensors))} of {stem} but no {missing}"
        )
    down, up = plain.down, plain.up
    if (
        down.ndim != up.ndim
        or down.ndim not in (2, 4)
        or 0 in (*down.shape, *up.shape)
        or up[0, 0].numel() != 1
    ):
        raise InvalidLoraFileError(
            f"{stem} of {file_name} is {shapes}, which is no Linear or convolution LoRA"
        )
    if up.shape[1] != down.shape[0]:
        raise InvalidLoraFileError(
            f"{stem} of {file_name} is {shapes}: "
            f"the ranks {down.shape[0]} and {up.shape[1]} differ inside the pair"
        )
    return plain


def _compute_scale(
    stem: str,
    name: str,
    tensors: Mapping[str, Tensor],
    plain: PlainFactors,
    config: AdapterConfig,
    file_name: str,
) -> float:
    """The scale of ΔW: alpha of the tensors or of the config over the rank, else 1."""
    component, path = name.split(".", 1)
    has_own_rank = "down" in tensors
    config_scale: float | None = None
    if "." in stem:  # kohya's programs read tensors only
        file_path = split_stem(stem).path  # as the patterns of the config spell it
        config_scale = config.compute_scale(
            component, file_path if "." in file_path else path, plain.down.shape[0], has_own_rank
        )
    alpha = tensors.get("alpha")
    if alpha is None:
        return 1.0 if config_scale is None else config_scale
    if alpha.numel() != 1 or config_scale is not None:
        raise InvalidLoraFileError(
            f"alpha of {stem} of {file_name} is not one number given once: "
            f"shape {list(alpha.shape)}"
        )
    return 1.0 if plain.scale_rank is None else float(alpha.double().item()) / plain.scale_rank


def _split_pair(pair: LoraFactors, pieces: Sequence[Piece]) -> list[tuple[str, LoraFactors]]:
    """The targets of one pair; of fused ones without the targets and ranks that are zero."""
    if len(pieces) == 1:
        (piece,) = pieces
        up = pair.up if piece.rows is None else pair.up[piece.rows]
        return [(piece.name, LoraFactors(piece.name, pair.down, up))]
    split: list[tuple[str, LoraFactors]] = []
    whole: list[tuple[str, LoraFactors]] = []
    for piece in pieces:
        up = pair.up[piece.rows]
        whole.append((piece.name, LoraFactors(piece.name, pair.down.clone(), up)))
        columns = up.flatten(1).any(0)  # [rank]
        if columns.any():
            split.append((piece.name, LoraFactors(piece.name, pair.down[columns], up[:, columns])))
    return split or whole  # of a LoRA that changes nothing every target stays
