"""``TemplateModel``: a "Diffusion Template", whose own ``model.py`` makes a LoRA of images."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Final, Self

from PIL import Image
from typing_extensions import override

from hyperlora.compute import ComputeConfig
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.safetensors_file import MAX_UPLOAD_HEADER_BYTES
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.config import LoraSampling
from hyperlora.pipelines.photo_model import SubjectPhotos
from hyperlora.pipelines.released.cards import ModelPart, ReleasedCard
from hyperlora.pipelines.released.hub_files import ReleasedFiles
from hyperlora.pipelines.released.recognize import TEMPLATE_FILE, Recognition
from hyperlora.pipelines.released.released_model import ReleasedModel, ReleasedOptions
from hyperlora.pipelines.released.template_sandbox import (
    SandboxLimits,
    require_consent,
    run_template,
)

_KNOWN_BASES: Final = {
    "zimage": ("Tongyi-MAI/Z-Image", "z-image"),
    "kleinbase4b": ("black-forest-labs/FLUX.2-klein-base-4B", "flux-2-klein-base-4b"),
    "hidreamo1": ("HiDream-ai/HiDream-O1", "hidream-o1"),
}
"""Base and architecture by what stands in the name of a repository, without dashes."""
_GRAY: Final = (128, 128, 128)
_GRAY_SIZE: Final = (1024, 1024)


class TemplateModel(ReleasedModel[list[tuple[Image.Image, ...]]]):
    """A template, run in a process of its own for every subject.

    Args:
        name: The folder or hub id, for the card.
        model_dir: The folder with ``model.py`` and its weights.
        digest: The SHA-256 of ``model.py`` to which the user agreed.
        limits: Limits of time and memory of one run.
    """

    method: ClassVar[str] = "template"
    runs_in_own_process: ClassVar[bool] = True

    def __init__(
        self, name: str, model_dir: Path, digest: str, limits: SandboxLimits | None = None
    ) -> None:
        super().__init__(make_template_card(name))
        self.model_dir, self.digest, self.limits = model_dir, digest, limits

    @classmethod
    @override
    def from_files(
        cls,
        files: ReleasedFiles,
        recognition: Recognition,
        options: ReleasedOptions,
        compute: ComputeConfig | None = None,
    ) -> Self:
        """Fetch the code, ask for consent, then fetch the weights; it runs on the CPU."""
        model_dir = files.fetch(TEMPLATE_FILE).parent
        digest = require_consent(model_dir, files.origin, options.trust_remote_code)
        for path in recognition.files:
            files.fetch(path)
        return cls(files.name, model_dir, digest)

    @cached_property
    @override
    def layout(self) -> LoraLayout:
        """The layout of the LoRA of one image; known once the template ran on a gray one."""
        return self._run([Image.new("RGB", _GRAY_SIZE, _GRAY)]).layout

    @override
    def encode_subjects(self, subjects: Sequence[SubjectPhotos]) -> list[tuple[Image.Image, ...]]:
        """Take the images as they are; the template encodes them itself."""
        if not subjects or not all(subject.images for subject in subjects):
            raise InvalidArgumentError("every subject needs at least one image")
        return [subject.images for subject in subjects]

    @override
    def generate_from_features(
        self, features: list[tuple[Image.Image, ...]], sampling: LoraSampling | None = None
    ) -> LoraWeights:
        """Run the template on the images of each subject; ``sampling`` is ignored."""
        return LoraWeights.stack([self._run(images) for images in features])

    @override
    def generate_negative(self, features: list[tuple[Image.Image, ...]]) -> LoraWeights:
        """Run the template on gray images of the same sizes."""
        grays = [
            tuple(Image.new("RGB", image.size, _GRAY) for image in images) for images in features
        ]
        return self.generate_from_features(grays)

    @override
    def list_warnings(self, features: list[tuple[Image.Image, ...]]) -> list[tuple[str, ...]]:
        """Have no doubts; nothing is known of what the template expects."""
        return [() for _ in features]

    @override
    def compute_fingerprint(self) -> str:
        """Hash the code, and names and sizes of its weights."""
        hasher = hashlib.sha256(self.digest.encode())
        for path in sorted(self.model_dir.glob("**/*.safetensors")):
            hasher.update(f"{path.relative_to(self.model_dir)} {path.stat().st_size}".encode())
        return hasher.hexdigest()[:16]

    def _run(self, images: Sequence[Image.Image]) -> LoraWeights:
        """The LoRA of the images of one subject, over the layout that the template returned."""
        data = run_template(self.model_dir, self.digest, images, self.limits)
        weights = load_lora(data, max_header_bytes=MAX_UPLOAD_HEADER_BYTES).weights
        layout = LoraLayout(weights.layout.targets, weights.layout.rank, self.facts.base)
        if len(images) == 1:
            vars(self).setdefault("layout", layout)  # spares a run on a gray image
        return LoraWeights(layout, weights.down, weights.up)


def make_template_card(name: str) -> ReleasedCard:
    """Make the card of a template from the name of its repository.

    Args:
        name: The folder or hub id.

    Returns:
        The facts; base and licenses of unknown repositories are unknown.
    """
    compact_name = Path(name).name.replace("-", "").lower()
    base, architecture = next(
        (facts for key, facts in _KNOWN_BASES.items() if key in compact_name), ("unknown", "")
    )
    return ReleasedCard(
        kind="template",
        variant="",
        purpose="content of images" if "contentref" in compact_name else "style of images",
        base=base,
        architecture=architecture,
        resolution=1024,
        parts=(ModelPart("network", name, "unknown: see the repository", None),),
        negative_rule="gray",
    )
