"""``ReleasedModel``: a network from photos to LoRAs that others released."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

from hyperlora.compute import ComputeConfig
from hyperlora.data.images import ImageSource
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.errors import LayoutMismatchError
from hyperlora.finetuning.config import RefineConfig
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.layout import get_base_layer, list_layers, make_target
from hyperlora.pipelines.photo_model import FeaturesT, PhotoModel
from hyperlora.pipelines.released.cards import ReleasedCard
from hyperlora.pipelines.released.hub_files import ReleasedFiles
from hyperlora.pipelines.released.recognize import Recognition


@dataclass(frozen=True, kw_only=True)
class ReleasedOptions:
    """Where the parts of a released network come from.

    Attributes:
        revision: Branch, tag or commit of the repository; None for its main branch.
        offline: Whether only files that are here already are used.
        face_pack: Folder of a face pack, or its name in insightface's own folder; None for the one
            that the network was trained with.
        encoder: Folder or hub id of the image encoder; None for the one of the network's card.
        trust_remote_code: SHA-256 of the code of the repository that may run; None for none.
    """

    revision: str | None = None
    offline: bool = False
    face_pack: str | None = None
    encoder: str | None = None
    trust_remote_code: str | None = None


class ReleasedModel(PhotoModel[FeaturesT]):
    """A network from photos to LoRAs that others released, for their base.

    A subclass sets ``method`` to its kind.

    Args:
        facts: Base, trigger phrase, strength and licenses, from the table.
        compute: Device and precision of the networks; None for the CPU.

    Attributes:
        facts: The same.
        device: Where the networks compute.
    """

    method: ClassVar[str]

    def __init__(self, facts: ReleasedCard, compute: ComputeConfig | None = None) -> None:
        self.facts, self.card = facts, facts.make_model_card()
        self.device = compute.torch_device if compute else torch.device("cpu")

    @classmethod
    @abstractmethod
    def from_files(
        cls,
        files: ReleasedFiles,
        recognition: Recognition,
        options: ReleasedOptions,
        compute: ComputeConfig | None = None,
    ) -> Self:
        """Open the network; only what is needed is fetched.

        Args:
            files: The files of the repository.
            recognition: Kind, variant and files of the network.
            options: Where the other parts come from.
            compute: Device and precision of the networks; None for the CPU.

        Returns:
            The model.

        Raises:
            ModelLoadError: A file is missing, damaged or of another network.
            InvalidArgumentError: An extra is not installed.
        """

    @property
    def refine_config(self) -> RefineConfig:
        """The authors' settings of refinement."""
        return self.facts.refine_config

    @property
    def refine_prompt(self) -> str:
        """The prompt of the photos while a LoRA is refined, with the trigger phrase first."""
        return self.facts.trigger_phrase + self.facts.refine_prompt

    @property
    def encoder_provenance(self) -> tuple[str, str]:
        """The names and the licenses of the image encoders."""
        encoders = self.facts.list_parts("encoder")
        names = ", ".join(part.name for part in encoders)
        return names, ", ".join(dict.fromkeys(part.license for part in encoders))

    def make_metadata(
        self, title: str, images: Sequence[ImageSource], **extra: str
    ) -> LoraMetadata:
        """Make the file metadata, with the licenses of all parts and the recommended strength.

        Args:
            title: The name of the LoRA.
            images: The photos that it is generated from.
            **extra: Further keys of the file.

        Returns:
            The metadata, without what only the weights determine.

        Raises:
            InvalidImageError: A path of ``images`` cannot be read.
        """
        metadata = super().make_metadata(title, images, **self.facts.make_metadata(), **extra)
        return replace(metadata, recommended_strength=self.facts.strength)

    def check_base(self, base: DiffusionBase) -> None:
        """Check that a base has every target in the shape of the LoRAs; its id may differ.

        Args:
            base: A base of the same architecture, e.g. a fine-tuned one.

        Raises:
            LayoutMismatchError: A target is missing or has another shape.
        """
        targets = {
            f"{component}.{path}": make_target(f"{component}.{path}", get_base_layer(layer))
            for component, module in base.modules.items()
            for path, layer in list_layers(module)
        }
        for target in self.layout.targets:
            if targets.get(target.name) != target:
                raise LayoutMismatchError(
                    f"{base.id!r} is no base of this network, which is for {self.layout.base!r}: "
                    f"it has no {target.name} of {target.in_features} to {target.out_features}"
                )
