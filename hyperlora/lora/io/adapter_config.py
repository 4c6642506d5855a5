"""What PEFT's ``LoraConfig`` says of the LoRAs of a file: ranks, alphas, and the patterns of both.

It stands in the header of diffusers' files (``lora_adapter_metadata``), or in the
``adapter_config.json`` of a folder that PEFT saved.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from time import monotonic
from typing import Final

from hyperlora.errors import InvalidLoraFileError
from hyperlora.lora.io.pattern_table import PatternTable, check_patterns

MATCH_TIMEOUT_S: Final = 2.0
"""For all patterns of a file together."""
_MAX_CONFIG_VALUE: Final = 1e9
_PATTERN_FIELDS: Final = ("rank_pattern", "alpha_pattern")
_PEFT_TYPES: Final = ("LORA", "LOHA", "LOKR")
_REFUSED_FIELDS: Final[Mapping[str, str]] = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "lora_bias": "a LoRA with biases",
    "layer_replication": "a LoRA of replicated layers",
    "alora_invocation_tokens": "an activated LoRA",
    "arrow_config": "a router of LoRAs",
    "target_parameters": "a LoRA of bare parameters",
}
"""Fields of ``LoraConfig`` that make ΔW depend on more than the two factors."""
_REFUSED_INITS: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations that change the weights of the base, so that its factors fit no other base."""
_COMPONENTS_BY_CLASS: Final[Mapping[str, str]] = {
    "UNet2DConditionModel": "unet",
    "CLIPTextModel": "text_encoder",
    "CLIPTextModelWithProjection": "text_encoder_2",
}


@dataclass(frozen=True)
class AdapterConfig:
    """Fields of ``LoraConfig`` by component, ``""`` standing for every component.

    Attributes:
        fields: Fields by component.
        file_name: The name of the file in error messages.
        source: Where the fields stand, in error messages.
    """

    fields: Mapping[str, Mapping[str, object]]
    file_name: str
    source: str = "lora_adapter_metadata"

    def __post_init__(self) -> None:
        """Check the patterns of all components together, once for the file."""
        tables = [table.get(name) for table in self.fields.values() for name in _PATTERN_FIELDS]
        patterns = [text for table in tables if isinstance(table, dict) for text in table]
        check_patterns(patterns, self.file_name)

    @cached_property
    def _tables(self) -> dict[tuple[str, str], PatternTable]:
        return {}

    @cached_property
    def _deadline(self) -> float:
        return monotonic() + MATCH_TIMEOUT_S

    def compute_scale(self, component: str, path: str, rank: int, check_rank: bool) -> float | None:
        """Compute alpha / rank (rsLoRA: alpha / √rank) as PEFT does.

        Args:
            component: Component of the module.
            path: Path of the module, as in the file.
            rank: Rank of its factors.
            check_rank: Whether the config must name this rank; LyCORIS' adapters have others.

        Returns:
            The scale; None if the config says nothing of the component.

        Raises:
            InvalidLoraFileError: The config names another rank, or no sound number.
        """
        fields = self.fields.get(component) or self.fields.get("")
        if not fields:
            return None
        key = component if component in self.fields else ""
        config_rank = self._resolve_number(fields, key, "rank_pattern", "r", path)
        if check_rank and config_rank != rank:
            raise InvalidLoraFileError(
                f"{component}.{path} of {self.file_name} has rank {rank}, its {self.source} says "
                f"{config_rank:g}"
            )
        alpha_field = "lora_alpha" if "lora_alpha" in fields else "alpha"
        alpha = self._resolve_number(fields, key, "alpha_pattern", alpha_field, path)
        if config_rank <= 0:
            raise self._make_error("r", "rank_pattern")
        return alpha / (sqrt(config_rank) if fields.get("use_rslora") else config_rank)

    def _resolve_number(
        self, fields: Mapping[str, object], component: str, field: str, default: str, path: str
    ) -> float:
        """The value for a path: that of the first pattern which matches it, else the default."""
        patterns = fields.get(field) or {}
        if not isinstance(patterns, dict):
            raise self._make_error(default, field)
        if (component, field) not in self._tables:
            self._tables[component, field] = PatternTable(patterns, field, self.file_name)
        pattern = self._tables[component, field].find(path, self._deadline)
        value = fields.get(default) if pattern is None else patterns[pattern]
        # the comparison also refuses NaN, and integers that no float holds
        if isinstance(value, int | float) and abs(value) < _MAX_CONFIG_VALUE:
            return float(value)
        raise self._make_error(default, field)

    def _make_error(self, default: str, field: str) -> InvalidLoraFileError:
        return InvalidLoraFileError(
            f"{self.file_name} has no sound {default} and {field} in its {self.source}"
        )


def parse_header_config(metadata: Mapping[str, str], file_name: str) -> AdapterConfig:
    """Parse diffusers' ``lora_adapter_metadata``, whose keys are ``<component>.<field>``.

    Args:
        metadata: The metadata of a file.
        file_name: Its name in error messages.

    Returns:
        The config; without fields if the file has none.

    Raises:
        InvalidLoraFileError: It is malformed, or of an adapter that is no plain LoRA.
    """
    config = _parse_json_table(metadata.get("lora_adapter_metadata", "{}"), file_name)
    fields: dict[str, dict[str, object]] = {}
    for key, value in config.items():
        component, _, field = key.partition(".")
        fields.setdefault(component, {})[field] = value
    for component, component_fields in fields.items():
        _check_fields(component_fields, file_name, f"{component}.")
    return AdapterConfig(fields, file_name)


def parse_peft_config(text: str, file_name: str) -> tuple[AdapterConfig, str | None]:
    """Parse the ``adapter_config.json`` of a folder that PEFT saved.

    Args:
        text: The content of the file.
        file_name: The name of the folder in error messages.

    Returns:
        The config, and the component that the base's class tells, None if it tells none.

    Raises:
        InvalidLoraFileError: It is malformed, or of an adapter that is no plain LoRA.
    """
    source = "adapter_config.json"
    fields = _parse_json_table(text, file_name, source)
    kind = str(fields.get("peft_type"))
    if kind not in _PEFT_TYPES:
        raise InvalidLoraFileError(
            f"{file_name} is {kind[:40]} (peft_type in its {source}): expected one of "
            f"{', '.join(_PEFT_TYPES)}"
        )
    _check_fields(fields, file_name, "", source)
    mapping = fields.get("auto_mapping")
    class_name = str(mapping.get("base_model_class", "")) if isinstance(mapping, dict) else ""
    component = _COMPONENTS_BY_CLASS.get(class_name)
    if component is None and class_name.endswith(("Transformer2DModel", "Transformer3DModel")):
        component = "transformer"
    return AdapterConfig({"": fields}, file_name, source), component


def _parse_json_table(
    text: str, file_name: str, source: str = "lora_adapter_metadata"
) -> dict[str, object]:
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidLoraFileError(f"{file_name} has a {source} that is no JSON") from error
    if not isinstance(table, dict):
        raise InvalidLoraFileError(f"{file_name} has a {source} that is no table")
    return table


def _check_fields(
    fields: Mapping[str, object], file_name: str, prefix: str, source: str = "metadata"
) -> None:
    """Raise ``InvalidLoraFileError`` for adapters that are no plain LoRA."""
    for field, kind in _REFUSED_FIELDS.items():
        if fields.get(field):
            raise InvalidLoraFileError(
                f"{file_name} is {kind} ({prefix}{field} in its {source}): "
                "only LoRA, LoCon, LoHa and LoKr are read"
            )
    init = fields.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_REFUSED_INITS):
        raise InvalidLoraFileError(
            f"{file_name} changes the base, too ({prefix}init_lora_weights={init[:40]!r} in its "
            f"{source}): let PEFT convert it to a LoRA with save_pretrained("
            "path_initial_model_for_weight_conversion=...)"
        )
