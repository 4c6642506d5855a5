"""``PeopleConfig``: everything that decides which people a command invents."""

from dataclasses import dataclass

from hyperlora.errors import InvalidArgumentError
from hyperlora.seeds import validate_seed


@dataclass(frozen=True, kw_only=True)
class PeopleConfig:
    """Settings of invented people, which a folder records. The number of people is none of them.

    Attributes:
        base: Base model, a folder or hub id.
        images_per_person: Images that are drawn of each person besides the reference.
        model: Model from photos to LoRAs that keeps the identity; None for the bundled one.
        ip_adapter: IP-Adapter that keeps it instead.
        face_pack: Face pack that compares faces; None for that of the bundle.
        min_similarity: Cosine of face embeddings below which an image is dropped.
        min_images: Images that must agree, or the person is dropped; None for half of them.
        prompts: Prompts of references, in turn; empty for the built-in attributes.
        scenes: Scenes of images, in turn; empty for those of the model's card, or the built-in
            ones.
        steps: Denoising steps; None for the family's default.
        guidance_scale: Classifier-free guidance; None for the family's default.
        seed: Seed of all people.
        dtype: Precision of the base.
    """

    base: str
    images_per_person: int = 8
    model: str | None = None
    ip_adapter: str | None = None
    face_pack: str | None = None
    min_similarity: float = 0.4
    min_images: int | None = None
    prompts: tuple[str, ...] = ()
    scenes: tuple[str, ...] = ()
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Check that the settings are in range and fit together.

        Raises:
            InvalidArgumentError: They do not.
        """
        validate_seed(self.seed)
        if self.images_per_person < 1:
            raise InvalidArgumentError(
                f"--images-per-person of at least 1 expected, got {self.images_per_person}"
            )
        if not -1 <= self.min_similarity <= 1:  # refuses NaN too
            raise InvalidArgumentError(
                f"--min-similarity is a cosine from -1 to 1, got {self.min_similarity}"
            )
        if not 1 <= self.num_required_images <= self.images_per_person:
            raise InvalidArgumentError(
                f"--min-images from 1 to --images-per-person {self.images_per_person} expected, "
                f"got {self.min_images}"
            )
        if self.model is not None and self.ip_adapter is not None:
            raise InvalidArgumentError(
                "--model and --ip-adapter both keep the identity: give one of them"
            )

    @property
    def num_required_images(self) -> int:
        """Images that must agree with the reference."""
        return -(-self.images_per_person // 2) if self.min_images is None else self.min_images
