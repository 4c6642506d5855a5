"""``ModelCard``: the facts about a released model that travel in its ``config.json``."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from PIL import Image

from hyperlora.data.images import ImageSource, compute_sha256
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.metadata import LoraMetadata


@dataclass(frozen=True)
class ModelCard:
    """License, trigger phrase and recommended settings of a released model.

    Attributes:
        trigger_phrase: The words for the subject in a prompt, e.g. ``sks person``.
        license: The license of the model and of the LoRAs it generates.
        architecture: The modelspec name of the base's family.
        resolution: Pixels per side of the images that the LoRAs are for.
        base: The base of a model whose encoder is the base's UNet: a hub id, or a path relative to
            the model's folder.
        strength: A factor of every generated LoRA, chosen on validation subjects.
        scenes: Prompts of the images that are generated while a LoRA is refined.
        num_inference_steps: Denoising steps: over LoRA latents for a diffusion over LoRAs, of the
            edited images for a model of edits. None for the pipeline's own default.
        guidance_scale: Classifier-free guidance of a diffusion over LoRAs.
    """

    trigger_phrase: str = ""
    license: str = ""
    architecture: str = ""
    resolution: int | None = None
    base: str = ""
    strength: float = 1.0
    scenes: tuple[str, ...] = ()
    num_inference_steps: int | None = None
    guidance_scale: float = 1.0

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read a card as ``to_dict`` writes it.

        Args:
            data: Values by the name of the field; missing fields take their defaults.

        Returns:
            The card.

        Raises:
            InvalidArgumentError: A key is no field of a card.
        """
        names = [field.name for field in fields(cls)]
        if unknown := sorted(set(data) - set(names)):
            raise InvalidArgumentError(
                f"unknown field {unknown[0]!r} of a model card; known: {', '.join(names)}"
            )
        return cls(**{**data, "scenes": tuple(data.get("scenes") or ())})

    def to_dict(self) -> dict[str, Any]:
        """List the fields that are not empty, in types that JSON has. Undone by ``from_dict``."""
        values = {k: v for k, v in asdict(self).items() if v not in (None, "", ())}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def make_metadata(
        self,
        title: str,
        references: Sequence[ImageSource],
        encoder: tuple[str, str],
        extra: Mapping[str, str],
    ) -> LoraMetadata:
        """Make the file metadata of a LoRA that the model generated.

        Args:
            title: The name of the LoRA.
            references: The images that the LoRA is made from. Paths and bytes are recorded by
                their SHA-256; PIL images have no file and are left out.
            encoder: The name and the license of the image encoder.
            extra: Further keys of the file, e.g. ``hyperlora.consent``.

        Returns:
            The metadata, without what only the weights determine.

        Raises:
            InvalidImageError: A path of the references cannot be read.
        """
        encoder_name, encoder_license = encoder
        return LoraMetadata(
            # file names may hold bytes that are not UTF-8
            title=title.encode("utf-8", "replace").decode(),
            architecture=self.architecture,
            resolution=(self.resolution, self.resolution) if self.resolution else None,
            trigger_phrase=self.trigger_phrase,
            license=self.license,
            encoder=encoder_name,
            encoder_license=encoder_license,
            reference_sha256=tuple(
                compute_sha256(source)
                for source in references
                if not isinstance(source, Image.Image)
            ),
            extra=extra,
        )
