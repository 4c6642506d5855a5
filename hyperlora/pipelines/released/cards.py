"""The facts about released networks that their files do not hold: one table."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from hyperlora.errors import ModelLoadError
from hyperlora.finetuning.config import RefineConfig
from hyperlora.lora.io.negative_lora import NEGATIVE_LORA_KEY, NegativeRule
from hyperlora.lora.io.prompt_prefix import PROMPT_PREFIX_KEY
from hyperlora.pipelines.model_card import ModelCard

ReleasedKind = Literal["hyperlora-sdxl", "i2l-v1", "template", "lorweb"]
"""How a released network is built."""

_ANTELOPE_LICENSE: Final = "insightface antelopev2: non-commercial research only"
_CC_BY_NC: Final = "CC BY-NC 4.0"
_SDXL: Final = "stabilityai/stable-diffusion-xl-base-1.0"
_QWEN_IMAGE: Final = "Qwen/Qwen-Image"


@dataclass(frozen=True)
class ModelPart:
    """One part that takes part in making a LoRA, with its license.

    Attributes:
        role: What it is: ``network``, ``encoder``, ``face pack`` or ``base``.
        name: Its hub id or common name.
        license: Its license, in the words of its owner.
        is_commercial: Whether commercial use is allowed; None if unknown.
    """

    role: Literal["network", "encoder", "face pack", "base"]
    name: str
    license: str
    is_commercial: bool | None


@dataclass(frozen=True)
class ReleasedCard:
    """The facts about one variant of a released network.

    Attributes:
        kind: How the network is built.
        variant: The variant, as ``ORG/NAME:VARIANT`` names it; empty for a network without any.
        purpose: What it is for, a few words.
        base: The hub id of the base that its LoRAs are for.
        good_bases: Checkpoints with which the authors or users report good images.
        architecture: The modelspec name of the base's family.
        resolution: Pixels per side of the base's images.
        parts: Network, encoders and face pack, with their licenses.
        trigger_phrase: Words that a prompt must begin with; empty if none are needed.
        strength: The recommended factor of the LoRA.
        negative_rule: The LoRA on the negative branch of guidance.
        download_bytes: Bytes of the network and its encoders.
        num_inference_steps: Denoising steps of the authors' examples; None if they name none.
        guidance_scale: Their classifier-free guidance, likewise.
        shift: Their shift of the noise schedule (``FlowMatchEulerDiscreteScheduler``), likewise.
        refine_config: Their settings to fine-tune a LoRA that the network made.
        refine_prompt: The prompt of the photos meanwhile, without the trigger phrase.
    """

    kind: ReleasedKind
    variant: str
    purpose: str
    base: str
    architecture: str
    resolution: int
    parts: tuple[ModelPart, ...]
    good_bases: tuple[str, ...] = ()
    trigger_phrase: str = ""
    strength: float = 1.0
    negative_rule: NegativeRule = "same"
    download_bytes: int = 0
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    shift: float | None = None
    refine_config: RefineConfig = field(default_factory=RefineConfig)
    refine_prompt: str = "an image"

    @property
    def is_commercial(self) -> bool | None:
        """Whether every part allows commercial use; None if it is unknown of one."""
        values = [part.is_commercial for part in self.parts]
        if False in values:
            return False
        return None if None in values else True

    @property
    def commercial_use(self) -> Literal["yes", "no", "unknown"]:
        """``is_commercial`` as a word."""
        if self.is_commercial is None:
            return "unknown"
        return "yes" if self.is_commercial else "no"

    @property
    def network_license(self) -> str:
        """The license of the network, and so of its LoRAs."""
        return next(part.license for part in self.parts if part.role == "network")

    def list_parts(self, *roles: str) -> Sequence[ModelPart]:
        """List the parts with one of the given roles."""
        return [part for part in self.parts if part.role in roles]

    def make_model_card(self) -> ModelCard:
        """Make the card that every model from photos has; its strength is not folded in."""
        return ModelCard(
            trigger_phrase=self.trigger_phrase.rstrip(", "),
            license=self.network_license,
            architecture=self.architecture,
            resolution=self.resolution,
        )

    def make_metadata(self) -> dict[str, str]:
        """Make the keys that a file has besides those of ``LoraMetadata``."""
        keys: dict[str, str] = {"hyperlora.commercial_use": self.commercial_use}
        if face_packs := self.list_parts("face pack"):
            keys["hyperlora.face_pack"] = face_packs[0].name
            keys["hyperlora.face_pack_license"] = face_packs[0].license
        if self.trigger_phrase:
            keys[PROMPT_PREFIX_KEY] = self.trigger_phrase
        if self.negative_rule != "same":
            keys[NEGATIVE_LORA_KEY] = self.negative_rule
        return keys | self.list_settings()

    def list_settings(self) -> dict[str, str]:
        """List the authors' settings of a drawing that are known, by their keys in a file."""
        settings = {
            "hyperlora.num_inference_steps": self.num_inference_steps,
            "hyperlora.guidance_scale": self.guidance_scale,
            "hyperlora.shift": self.shift,
        }
        return {key: f"{value:g}" for key, value in settings.items() if value is not None}

    def list_notes(self) -> tuple[str, ...]:
        """List what a user of its LoRAs must know: licenses, then trigger phrase and strength."""
        if not self.trigger_phrase:
            return (self.format_notice(),)
        advice = (
            f"begin every prompt with {self.trigger_phrase!r}, and use the LoRA at a "
            f"strength of about {self.strength:g}"
        )
        return self.format_notice(), advice

    def format_notice(self) -> str:
        """Format the licenses of all parts as one sentence."""
        parts = "; ".join(f"{part.role} {part.name}: {part.license}" for part in self.parts)
        use = {
            True: "commercial use is allowed",
            False: "for non-commercial use only",
            None: "whether commercial use is allowed is unknown",
        }[self.is_commercial]
        return f"licenses: {parts}; {use}"


_CLIP_L: Final = ModelPart("encoder", "openai/clip-vit-large-patch14", "MIT", True)
_ANTELOPE: Final = ModelPart("face pack", "antelopev2", _ANTELOPE_LICENSE, False)
_SIGLIP2: Final = ModelPart("encoder", "SigLIP2-G384", "Apache-2.0", True)
_DINOV3: Final = ModelPart("encoder", "DINOv3-7B", "DINOv3 License (Meta)", True)


def _make_hyperlora_card(variant: str, purpose: str) -> ReleasedCard:
    return ReleasedCard(
        kind="hyperlora-sdxl",
        variant=variant,
        purpose=purpose,
        base=_SDXL,
        architecture="stable-diffusion-xl-v1-base",
        resolution=1024,
        parts=(
            ModelPart("network", "bytedance-research/HyperLoRA", _CC_BY_NC, False),
            _CLIP_L,
            _ANTELOPE,
        ),
        good_bases=("RealVisXL 4.0", "LEOSAM HelloWorld XL 3.0", "CyberRealistic XL 1.1"),
        trigger_phrase="fcsks fxhks fhyks, ",
        strength=0.8,
        download_bytes=5_200_000_000,
        num_inference_steps=20,
        guidance_scale=5.0,
        refine_config=RefineConfig(
            num_steps=50, lr=1e-4, batch_size=4, is_on_top=False, resolution=768
        ),
        refine_prompt="a portrait photo of a person",
    )


def _make_i2l_card(
    variant: str, purpose: str, base: str, network: str, num_bytes: int
) -> ReleasedCard:
    is_z_image = variant == "z-image"
    return ReleasedCard(
        kind="i2l-v1",
        variant=variant,
        purpose=purpose,
        base=base,
        architecture="z-image" if is_z_image else "qwen-image",
        resolution=1024,
        parts=(ModelPart("network", network, "Apache-2.0", True), _SIGLIP2, _DINOV3),
        negative_rule="off" if is_z_image else "same",
        download_bytes=num_bytes,
        num_inference_steps=50,
        guidance_scale=4.0 if is_z_image else None,
        shift=8.0 if is_z_image else None,
    )


RELEASED_CARDS: Final[tuple[ReleasedCard, ...]] = (
    _make_hyperlora_card("fidelity", "identity of one person, closest to the photos"),
    _make_hyperlora_card("edit", "identity of one person, freer with prompts"),
    _make_i2l_card(
        "z-image",
        "style of images",
        "Tongyi-MAI/Z-Image",
        "DiffSynth-Studio/Z-Image-i2L",
        18_990_000_000,
    ),
    _make_i2l_card(
        "style",
        "style of images",
        _QWEN_IMAGE,
        "DiffSynth-Studio/Qwen-Image-i2L",
        20_570_000_000,
    ),
    ReleasedCard(
        kind="lorweb",
        variant="",
        purpose="the edit of a before/after pair",
        base="black-forest-labs/FLUX.1-Kontext-dev",
        architecture="flux-1-kontext-dev",
        resolution=1024,
        parts=(
            ModelPart("network", "hilamanor/lorweb", "NVIDIA License, research only", False),
            _CLIP_L,
            ModelPart(
                "base",
                "black-forest-labs/FLUX.1-Kontext-dev",
                "FLUX.1 [dev] Non-Commercial License",
                False,
            ),
        ),
        download_bytes=3_400_000_000,
        num_inference_steps=28,
        guidance_scale=2.5,
    ),
)
"""Every known network and variant."""


def find_card(kind: ReleasedKind, variant: str = "") -> ReleasedCard:
    """Find the facts about a network.

    Args:
        kind: How the network is built.
        variant: Its variant; the first of the kind if empty.

    Returns:
        The card.

    Raises:
        ModelLoadError: The table has no such variant.
    """
    cards = [card for card in RELEASED_CARDS if card.kind == kind]
    matches = [card for card in cards if variant in ("", card.variant)]
    if not matches:
        known = ", ".join(card.variant for card in cards) or "none"
        raise ModelLoadError(f"unknown variant {variant!r} of {kind}; known: {known}")
    return matches[0]
