"""The folders that PEFT's ``save_pretrained`` and diffusers' ``save_lora_weights`` write."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hyperlora.errors import InvalidLoraFileError
from hyperlora.lora.io.adapter_config import AdapterConfig, parse_header_config, parse_peft_config
from hyperlora.paths import find_path

PEFT_WEIGHTS_NAME: Final = "adapter_model.safetensors"
PEFT_CONFIG_NAME: Final = "adapter_config.json"
_DIFFUSERS_WEIGHTS_NAME: Final = "pytorch_lora_weights.safetensors"
_MAX_CONFIG_BYTES: Final = 16 << 20


@dataclass(frozen=True)
class LoraSource:
    """Where a LoRA is read from.

    Attributes:
        file: The path of the weights, or their bytes.
        name: Its name in error messages.
        config_path: PEFT's ``adapter_config.json``; None if there is none.
    """

    file: Path | bytes
    name: str
    config_path: Path | None = None

    @property
    def size_bytes(self) -> int:
        """The size of the weights."""
        return len(self.file) if isinstance(self.file, bytes) else self.file.stat().st_size


def find_source(source: Path | bytes) -> LoraSource:
    """Find the weights and the config of a LoRA.

    Args:
        source: A file, its bytes, or a folder of PEFT or diffusers.

    Returns:
        The files. The config of PEFT counts beside PEFT's own file, too.

    Raises:
        InvalidLoraFileError: The folder holds no LoRA.
    """
    if isinstance(source, bytes):
        return LoraSource(source, "the LoRA")
    source = find_path(source)
    if not source.is_dir():
        config_path = source.with_name(PEFT_CONFIG_NAME)
        has_config = source.name == PEFT_WEIGHTS_NAME and config_path.is_file()
        return LoraSource(source, source.name, config_path if has_config else None)
    name = source.name or str(source)
    weights_path, config_path = source / PEFT_WEIGHTS_NAME, source / PEFT_CONFIG_NAME
    if weights_path.is_file():
        if not config_path.is_file():
            raise InvalidLoraFileError(
                f"the folder {name} has {PEFT_WEIGHTS_NAME} but no {PEFT_CONFIG_NAME}, which holds "
                "its alpha: copy it there, too"
            )
        return LoraSource(weights_path, name, config_path)
    if (source / _DIFFUSERS_WEIGHTS_NAME).is_file():
        return LoraSource(source / _DIFFUSERS_WEIGHTS_NAME, name)
    hint = ""
    if list(source.glob("*.bin")):
        hint = "; its .bin files can run code and are never opened"
    raise InvalidLoraFileError(
        f"the folder {name} holds no LoRA: expected {PEFT_WEIGHTS_NAME} with {PEFT_CONFIG_NAME}, "
        f"or {_DIFFUSERS_WEIGHTS_NAME}{hint}"
    )


def read_config(source: LoraSource, metadata: dict[str, str]) -> tuple[AdapterConfig, str | None]:
    """Read what PEFT's config says of the LoRAs of a file.

    Args:
        source: The files.
        metadata: The metadata of the weights.

    Returns:
        The config, and the component that it tells, None if it tells none.

    Raises:
        InvalidLoraFileError: The config is malformed, or of an adapter that is no plain LoRA.
    """
    if source.config_path is None:
        return parse_header_config(metadata, source.name), None
    if source.config_path.stat().st_size > _MAX_CONFIG_BYTES:
        raise InvalidLoraFileError(
            f"{source.name} has an {PEFT_CONFIG_NAME} of more than {_MAX_CONFIG_BYTES >> 20} MiB"
        )
    try:
        text = source.config_path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidLoraFileError(
            f"{source.name} has an {PEFT_CONFIG_NAME} that is no text"
        ) from error
    return parse_peft_config(text, source.name)
