"""The LoRA on the negative branch of guidance: what a header asks for, and where its file lies."""

from pathlib import Path
from typing import Final, Literal, cast

from hyperlora.lora.io.metadata import LoraMetadata

NegativeRule = Literal["same", "off", "gray"]
"""The LoRA on the negative branch of guidance: the same, none, or that of a gray image."""
NEGATIVE_LORA_KEY: Final = "hyperlora.negative_lora"
"""The key of the rule in the metadata of a file; without it the rule is ``same``."""
NEGATIVE_SHA256_KEY: Final = "hyperlora.negative_lora_sha256"
"""The key of the SHA-256 of the file for the negative branch, where one was made too."""

NEGATIVE_SUFFIX: Final = "-negative"
"""The end of the name of that file, before ``.safetensors``."""


def get_negative_rule(metadata: LoraMetadata) -> NegativeRule:
    """Return the rule in the metadata of a file; an unknown one counts as ``same``."""
    rule = metadata.extra.get(NEGATIVE_LORA_KEY, "same")
    return cast("NegativeRule", rule) if rule in ("off", "gray") else "same"


def make_negative_path(path: Path) -> Path:
    """Make the path of the file for the negative branch: ``me-negative.safetensors``."""
    return path.with_name(f"{path.stem}{NEGATIVE_SUFFIX}{path.suffix}")


def describe_negative_rule(name: str, rule: NegativeRule, has_file: bool) -> str:
    """Describe in one sentence what is applied on the negative branch.

    Args:
        name: The name of the LoRA.
        rule: Its rule.
        has_file: Whether the LoRA of a gray image is at hand.

    Returns:
        The sentence; empty if the negative branch has the same LoRA by rule.
    """
    if rule == "off":
        return f"{name}: no LoRA on the negative branch of guidance, as its header asks"
    if rule == "gray" and has_file:
        return f"{name}: the negative branch of guidance has its own LoRA, as the header asks"
    if rule == "gray":
        return (
            f"{name} asks for its own LoRA on the negative branch of guidance, whose file "
            f"{name}-negative.safetensors is not here: "
            "the same LoRA is used, so details may be weaker"
        )
    return ""
