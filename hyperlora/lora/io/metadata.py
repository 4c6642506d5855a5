"""``LoraMetadata``: the metadata of a LoRA file.

Keys begin with ``modelspec.`` (for galleries), ``ss_`` (for kohya's tools) or ``hyperlora.``. The
base is ``hyperlora.base`` alone: ``ss_sd_model_name`` names the checkpoint that a LoRA was trained
on, and LoRAs of different checkpoints of one architecture fit each other.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from math import isfinite
from typing import Final

from hyperlora.errors import InvalidArgumentError, InvalidLoraFileError
from hyperlora.lora.io.architectures import (
    get_base_version,
    get_network_module,
    parse_architecture,
)
from hyperlora.lora.io.hashes import HASH_KEYS
from hyperlora.lora.layout import UNKNOWN_BASE, LoraLayout

MODELSPEC_VERSION: Final = "1.0.1"
_TEXT_KEYS: Final[Mapping[str, str]] = {
    "title": "modelspec.title",
    "trigger_phrase": "modelspec.trigger_phrase",
    "license": "modelspec.license",
    "date": "modelspec.date",
    "base_model": "hyperlora.base",
    "layout_fingerprint": "hyperlora.layout_fingerprint",
    "generator": "hyperlora.generator",
    "generator_version": "hyperlora.generator_version",
    "encoder": "hyperlora.encoder",
    "encoder_license": "hyperlora.encoder_license",
    "output_name": "ss_output_name",
}
_RESERVED_KEYS: Final = frozenset(
    {
        "format",
        "lora_adapter_metadata",
        "modelspec.sai_model_spec",
        "modelspec.implementation",
        "modelspec.architecture",
        "modelspec.resolution",
        "ss_v2",
        "ss_base_model_version",
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
        "ss_network_args",
        "hyperlora.reference_sha256",
        "hyperlora.recommended_strength",
    }
)
"""Keys computed from the weights or from fields that are not plain text."""
_TRIGGER_KEYS: Final = ("ss_tag_frequency", "ss_datasets")
"""Keys in which LoRA managers look for trigger words; a trainer's own are kept."""
_STALE_KEYS: Final = HASH_KEYS | {"modelspec.implementation_version"}
_OWN_KEYS: Final = _RESERVED_KEYS | _STALE_KEYS | set(_TEXT_KEYS.values())
_STALE_PREFIX: Final = "modelspec.hash_"
"""What is no longer true of a file that is written anew."""


@cache
def _get_version() -> str:
    return version("hyperlora")  # reads files


@dataclass(frozen=True)
class LoraMetadata:
    """Origin, base and use of a LoRA. Empty fields are unknown.

    Attributes:
        title: The name shown in galleries; ``save_lora`` fills in a default.
        base_model: The id of the base model, set by ``save_lora``.
        architecture: modelspec's name of the base, e.g. ``stable-diffusion-v1``.
        resolution: Width and height of images, in pixels.
        trigger_phrase: The words of a prompt that call up the subject.
        license: SPDX id or name of the license.
        date: Date of creation, ISO 8601; today's (UTC) by default in ``save_lora``.
        generator: The program or model that made the LoRA.
        generator_version: Its version.
        layout_fingerprint: ``LoraLayout.fingerprint``, set by ``save_lora``.
        encoder: The image encoder of the photos.
        encoder_license: Its license.
        output_name: The name by which A1111 calls the LoRA in prompts, set by ``save_lora``.
        reference_sha256: SHA-256 of the photos.
        recommended_strength: Factor of ΔW at which the LoRA works best.
        extra: Any other keys, e.g. ``modelspec.author`` or ``ss_tag_frequency``.
    """

    title: str = ""
    base_model: str = ""
    architecture: str = ""
    resolution: tuple[int, int] | None = None
    trigger_phrase: str = ""
    license: str = ""
    date: str = ""
    generator: str = "hyperlora"
    generator_version: str = field(default_factory=_get_version)
    layout_fingerprint: str = ""
    encoder: str = ""
    encoder_license: str = ""
    reference_sha256: tuple[str, ...] = ()
    recommended_strength: float = 1.0
    output_name: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)

    def with_defaults(self, layout: LoraLayout) -> "LoraMetadata":
        """Set base, fingerprint and, where missing, a title and today's date (UTC).

        A layout of unknown base leaves the base that the metadata names.
        """
        today = datetime.now(UTC).date().isoformat()
        base = self.base_model if layout.base == UNKNOWN_BASE else layout.base
        named_layout = replace(layout, base=base or UNKNOWN_BASE)
        return replace(
            self,
            title=self.title or self.output_name or f"LoRA for {base or UNKNOWN_BASE}",
            date=self.date or today,
            base_model=base,
            layout_fingerprint=named_layout.fingerprint,
        )

    def to_safetensors_metadata(self, layout: LoraLayout) -> dict[str, str]:
        """Convert to the metadata of a safetensors file.

        Sources: ModelSpec 1.0.1; ``train_network.py`` of kohya-ss/sd-scripts (``ss_`` keys).

        Args:
            layout: The layout of the LoRA in the file.

        Returns:
            Strings by key.

        Raises:
            InvalidArgumentError: ``extra`` has a key that belongs to a field.
        """
        if reserved := sorted(self.extra.keys() & _OWN_KEYS):
            raise InvalidArgumentError(
                f"the extra metadata key {reserved[0]!r} is reserved: "
                f"use the field of LoraMetadata instead"
            )
        rank, has_conv = layout.rank, any(target.kernel_size for target in layout.targets)
        optional = {
            key: getattr(self, name) for name, key in _TEXT_KEYS.items() if getattr(self, name)
        }
        if self.resolution:
            optional["modelspec.resolution"] = "{}x{}".format(*self.resolution)
        if module := get_network_module(self.architecture, layout):
            optional["ss_network_module"] = module
        return {
            **self._make_trigger_fields(),
            **self.extra,
            **optional,
            "modelspec.sai_model_spec": MODELSPEC_VERSION,
            "modelspec.architecture": f"{self.architecture or 'unknown'}/lora",
            "modelspec.implementation": "diffusers",
            "ss_v2": str(self.architecture.startswith("stable-diffusion-v2")),
            "ss_base_model_version": get_base_version(self.architecture),
            "ss_network_dim": str(rank),
            "ss_network_alpha": str(float(rank)),
            "ss_network_args": json.dumps(
                {"conv_dim": rank, "conv_alpha": float(rank)} if has_conv else {}
            ),
            "hyperlora.reference_sha256": json.dumps(self.reference_sha256),
            "hyperlora.recommended_strength": repr(float(self.recommended_strength)),
        }

    def _make_trigger_fields(self) -> dict[str, str]:
        """The trigger phrase as kohya's trainer writes the captions of a folder of images."""
        if not self.trigger_phrase or self.extra.keys() & set(_TRIGGER_KEYS):
            return {}  # nothing to say, or a trainer said it
        num_images = max(len(self.reference_sha256), 1)
        folder = f"1_{self.trigger_phrase}"  # kohya's "<repeats>_<class tokens>"
        tag_frequency = {folder: {self.trigger_phrase: num_images}}
        dataset = {
            "is_dreambooth": True,
            "num_train_images": num_images,
            "num_reg_images": 0,
            "resolution": self.resolution,
            "tag_frequency": tag_frequency,
            "subsets": [
                {
                    "img_count": num_images,
                    "num_repeats": 1,
                    "image_dir": folder,
                    "class_tokens": self.trigger_phrase,
                    "is_reg": False,
                }
            ],
        }
        return dict(
            zip(_TRIGGER_KEYS, (json.dumps(tag_frequency), json.dumps([dataset])), strict=True)
        )

    @classmethod
    def from_safetensors_metadata(cls, metadata: Mapping[str, str]) -> "LoraMetadata":
        """Parse the metadata of a safetensors file; the inverse of ``to_safetensors_metadata``.

        In files of other tools, missing fields stay empty and malformed ones are ignored.

        Args:
            metadata: Strings by key.

        Returns:
            The metadata. Hashes are left out: they are of that file alone.

        Raises:
            InvalidLoraFileError: A ``hyperlora.`` key is malformed.
        """
        text_fields = {name: metadata.get(key, "") for name, key in _TEXT_KEYS.items()}
        if text_fields["base_model"] == UNKNOWN_BASE:  # older versions wrote it
            text_fields["base_model"] = ""
        try:
            sha256 = json.loads(metadata.get("hyperlora.reference_sha256", "[]"))
            strength = float(metadata.get("hyperlora.recommended_strength", "1.0"))
        except (ValueError, RecursionError) as error:
            raise InvalidLoraFileError(
                f"the file's own hyperlora metadata is malformed: {error}"
            ) from error
        if not isfinite(strength):
            raise InvalidLoraFileError(
                f"the file's own hyperlora metadata is malformed: recommended_strength {strength}"
            )
        if not isinstance(sha256, list) or not all(isinstance(digest, str) for digest in sha256):
            raise InvalidLoraFileError(
                "the file's own hyperlora metadata is malformed: "
                "reference_sha256 is no list of texts"
            )
        parsed = cls(
            title=text_fields["title"],
            base_model=text_fields["base_model"],
            trigger_phrase=text_fields["trigger_phrase"],
            license=text_fields["license"],
            date=text_fields["date"],
            generator=text_fields["generator"],
            generator_version=text_fields["generator_version"],
            layout_fingerprint=text_fields["layout_fingerprint"],
            encoder=text_fields["encoder"],
            encoder_license=text_fields["encoder_license"],
            output_name=text_fields["output_name"],
            architecture=parse_architecture(metadata),
            resolution=_parse_resolution(metadata.get("modelspec.resolution", "")),
            reference_sha256=tuple(sha256),
            recommended_strength=strength,
        )
        trigger_fields = parsed._make_trigger_fields()
        return replace(
            parsed,
            extra={
                key: value
                for key, value in metadata.items()
                if key not in _OWN_KEYS
                and not key.startswith(_STALE_PREFIX)
                and trigger_fields.get(key) != value
            },
        )


def _parse_resolution(text: str) -> tuple[int, int] | None:
    """``512x768`` to (512, 768), None for anything else."""
    width, _, height = text.partition("x")
    is_valid = all(side.isdecimal() and len(side) <= 5 for side in (width, height))
    return (int(width), int(height)) if is_valid else None
