"""``LoraMetadata``: what a LoRA file says about itself, for galleries (``modelspec``), kohya's tools (``ss_``) and us."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from math import isfinite
from typing import Any, Final

from hyperlora.errors import InvalidArgumentError, InvalidLoraFileError
from hyperlora.lora.layout import LoraLayout

MODELSPEC_VERSION: Final = "1.0.1"
KOHYA_BASE_VERSIONS: Final[Mapping[str, str]] = {
    "stable-diffusion-v1": "sd_v1",
    "stable-diffusion-v2-512": "sd_v2",
    "stable-diffusion-v2-768-v": "sd_v2_v",
    "stable-diffusion-xl-v1-base": "sdxl_base_v1-0",
    "stable-diffusion-3": "sd3",
    "flux-1-dev": "flux1",
}
"""modelspec architecture -> kohya's ``ss_base_model_version``; any other architecture is written as it is."""
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
}
_RESERVED_KEYS: Final = frozenset(
    {
        *(
            "format",
            "lora_adapter_metadata",
            "modelspec.sai_model_spec",
            "modelspec.implementation",
        ),
        *(
            "modelspec.architecture",
            "modelspec.resolution",
            "ss_v2",
            "ss_base_model_version",
            "ss_network_module",
        ),
        *("ss_network_dim", "ss_network_alpha", "ss_network_args"),
        *("hyperlora.reference_sha256", "hyperlora.recommended_strength"),
    }
)
"""Keys computed from the weights or from fields that are not plain text."""


@cache
def _get_version() -> str:
    return version("hyperlora")  # reads files


@dataclass(frozen=True)
class LoraMetadata:
    """Who made a LoRA, from what, for which base, and how to use it. Empty fields are unknown.

    ``architecture`` is modelspec's (``stable-diffusion-v1``), ``resolution`` (width, height), ``reference_sha256`` the
    digests of the photos, ``extra`` any other key of the file (e.g. ``modelspec.author``, ``ss_tag_frequency``).
    ``base_model``, ``layout_fingerprint`` and ``date`` are filled in by ``save_lora``.
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
    extra: Mapping[str, str] = field(default_factory=dict)

    def with_defaults(self, layout: LoraLayout) -> "LoraMetadata":
        """With base and fingerprint of ``layout`` and, where missing, a title and today's date (UTC)."""
        today = datetime.now(UTC).date().isoformat()
        return replace(
            self,
            title=self.title or f"LoRA for {layout.base}",
            date=self.date or today,
            base_model=layout.base,
            layout_fingerprint=layout.fingerprint,
        )

    def to_safetensors_metadata(self, layout: LoraLayout) -> dict[str, str]:
        """The safetensors metadata of a file with these ``layout`` and header; strings only.

        Sources: ModelSpec 1.0.1; kohya-ss/sd-scripts ``train_network.py`` (``ss_`` keys). Raises ``InvalidArgumentError`` if
        ``extra`` claims a key that a field owns.
        """
        if reserved := sorted(self.extra.keys() & (_RESERVED_KEYS | set(_TEXT_KEYS.values()))):
            raise InvalidArgumentError(
                f"the extra header key {reserved[0]!r} is reserved: use the field of LoraHeader instead"
            )
        rank, has_conv = layout.rank, any(target.kernel_size for target in layout.targets)
        optional = {
            key: getattr(self, name) for name, key in _TEXT_KEYS.items() if getattr(self, name)
        }
        if self.resolution:
            optional["modelspec.resolution"] = "{}x{}".format(*self.resolution)
        return {
            **self.extra,
            **optional,
            "modelspec.sai_model_spec": MODELSPEC_VERSION,
            "modelspec.architecture": f"{self.architecture or 'unknown'}/lora",
            "modelspec.implementation": "diffusers",
            "ss_v2": str(self.architecture.startswith("stable-diffusion-v2")),
            "ss_base_model_version": KOHYA_BASE_VERSIONS.get(
                self.architecture, self.architecture or "unknown"
            ),
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(rank),
            "ss_network_alpha": str(float(rank)),
            "ss_network_args": json.dumps(
                {"conv_dim": rank, "conv_alpha": float(rank)} if has_conv else {}
            ),
            "hyperlora.reference_sha256": json.dumps(self.reference_sha256),
            "hyperlora.recommended_strength": repr(float(self.recommended_strength)),
        }

    @classmethod
    def from_safetensors_metadata(cls, metadata: Mapping[str, str]) -> "LoraMetadata":
        """Inverse of ``to_safetensors_metadata``; for files of other tools, what of it they say (base by ``ss_sd_model_name``).

        Raises ``InvalidLoraFileError`` if our own fields are malformed; odd fields of other tools are ignored.
        """
        text_fields = {name: metadata.get(key, "") for name, key in _TEXT_KEYS.items()}
        text_fields["base_model"] = text_fields["base_model"] or metadata.get(
            "ss_sd_model_name", ""
        )
        try:
            sha256 = json.loads(metadata.get("hyperlora.reference_sha256", "[]"))
            strength = float(metadata.get("hyperlora.recommended_strength", "1.0"))
        except (ValueError, RecursionError) as error:
            raise InvalidLoraFileError(
                f"the file's own hyperlora header is malformed: {error}"
            ) from error
        if not isfinite(strength):
            raise InvalidLoraFileError(
                f"the file's own hyperlora header is malformed: recommended_strength {strength}"
            )
        if not isinstance(sha256, list) or not all(isinstance(digest, str) for digest in sha256):
            raise InvalidLoraFileError(
                "the file's own hyperlora header is malformed: reference_sha256 is no list of texts"
            )
        fields: dict[str, Any] = {
            **text_fields,
            "architecture": _parse_architecture(metadata),
            "resolution": _parse_resolution(metadata.get("modelspec.resolution", "")),
            "reference_sha256": tuple(sha256),
            "recommended_strength": strength,
            "extra": {
                k: v
                for k, v in metadata.items()
                if k not in _RESERVED_KEYS and k not in set(_TEXT_KEYS.values())
            },
        }
        return cls(**fields)


def _parse_architecture(metadata: Mapping[str, str]) -> str:
    if spec := metadata.get("modelspec.architecture", "").removesuffix("/lora"):
        return "" if spec == "unknown" else spec
    base_version = metadata.get("ss_base_model_version", "")
    return next(
        (name for name, kohya_name in KOHYA_BASE_VERSIONS.items() if kohya_name == base_version),
        base_version,
    )


def _parse_resolution(text: str) -> tuple[int, int] | None:
    width, _, height = text.partition("x")
    is_valid = all(side.isdecimal() and len(side) <= 5 for side in (width, height))
    return (int(width), int(height)) if is_valid else None
