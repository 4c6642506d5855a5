"""``ValidationPortraits``: images of held-out subjects while a hypernetwork is trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import lightning as L
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor

from hyperlora.data.contact_sheet import draw_contact_sheet
from hyperlora.data.images import to_image
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.encoders.identity_similarity import IdentitySimilarity
from hyperlora.errors import HyperloraError
from hyperlora.features import ImageFeatures
from hyperlora.lora.weights import LoraWeights
from hyperlora.training.batches import SubjectBatch
from hyperlora.training.modules.hypernetwork import HypernetworkTraining

COLUMNS: Final = ("base", "own", "shuffled")
"""The images beside each photo: without LoRA, with the subject's own, with another subject's."""
_TITLES: Final = ("photo", "without LoRA", "own LoRA", "another's LoRA")


class ValidationPortraits(L.Callback):
    """Generate images of held-out subjects during validation, and score their identity.

    A row shows a subject's photo, and images of one prompt and seed without LoRA, with the
    subject's own and with another subject's. The sheet is written to ``portraits/`` in the run's
    folder, and to TensorBoard or Weights & Biases if the trainer logs there.

    ``val/identity_own`` and its controls ``val/identity_base`` and ``val/identity_shuffled`` are
    means over the subjects. A network that learns has own above both.

    Args:
        num_subjects: Rows, at most as many as there are subjects of validation.
        every_n_validations: Validations from one sheet to the next; the first one has a sheet.
        prompt: With ``{trigger}`` for the trigger phrase of the model.
        num_inference_steps: Denoising steps; None for the pipeline's own default.
        guidance_scale: Of classifier-free guidance; None for the pipeline's own default.
        seed: Of all images.
        identity: Folder of a classifier with an identity scale (``IdentitySimilarity``). Without
            it, the score is the cosine of the mean features of the model's own image encoder.
    """

    def __init__(
        self,
        num_subjects: int = 4,
        every_n_validations: int = 1,
        prompt: str = "a photo of {trigger}",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        identity: str | None = None,
    ) -> None:
        self.num_subjects, self.every_n_validations = num_subjects, every_n_validations
        self.prompt, self.seed = prompt, seed
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        self.identity = IdentitySimilarity.from_pretrained(identity) if identity else None
        self._num_validations, self._is_possible = 0, True
        self._photos: list[Tensor] = []  # [views, 3, size, size] each
        self._base_image: Image.Image | None = None  # the base is frozen: one image for all

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the photos of the last validation.

        Args:
            trainer: The running trainer.
            pl_module: Not used.
        """
        self._photos = []
        if not trainer.sanity_checking:
            self._num_validations += 1

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: SubjectBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect photos, and draw the sheet once there are enough of them.

        This is during validation, when the module holds averaged weights.

        Args:
            trainer: The running trainer.
            pl_module: A ``HypernetworkTraining``.
            outputs: Not used.
            batch: With photos of held-out subjects.
            batch_idx: Its number.
            dataloader_idx: Not used.
        """
        is_due = self._is_possible and (self._num_validations - 1) % self.every_n_validations == 0
        is_complete = len(self._photos) == self.num_subjects
        if trainer.sanity_checking or not is_due or is_complete or batch.photos is None:
            return
        assert isinstance(pl_module, HypernetworkTraining)
        if missing := [n for n in ("vae", "text_encoder") if _lacks(pl_module, n)]:
            rank_zero_warn(f"no portraits are drawn: the base was loaded without {missing[0]}")
            self._is_possible = False
            return
        self._photos += batch.photos[: self.num_subjects - len(self._photos)]
        is_last = batch_idx + 1 == trainer.num_val_batches[dataloader_idx]
        if len(self._photos) == self.num_subjects or is_last:
            try:
                self._draw(trainer, pl_module, self._photos)
            except HyperloraError as error:  # of sampling, on which training does not depend
                rank_zero_warn(f"no portraits are drawn: {error}")
                self._is_possible = False

    @torch.no_grad()
    def _draw(
        self, trainer: L.Trainer, module: HypernetworkTraining, photos: Sequence[Tensor]
    ) -> None:
        """Generate, score, write and log the portraits of subjects."""
        stacked_photos = torch.stack([views[:1] for views in photos])  # [n, 1, 3, size, size]
        own_loras = module.model.forward(stacked_photos)
        loras: dict[str, LoraWeights | None] = {
            "base": None,
            "own": own_loras,
            "shuffled": own_loras.shuffle_batch(),
        }
        datamodule = getattr(trainer, "datamodule", None)
        resolution = None if datamodule is None else datamodule.hparams.get("resolution")
        grid: list[list[Image.Image]] = []
        scores: dict[str, list[float]] = {name: [] for name in COLUMNS}
        for i, views in enumerate(photos):
            images = [self._generate(module, loras[name], i, resolution) for name in COLUMNS]
            grid.append([to_image(views[0].cpu()), *images])
            pixels = torch.stack([pil_to_tensor(image) for image in images]).to(views) / 255
            for name, score in zip(COLUMNS, self._score(module, views, pixels), strict=True):
                scores[name].append(score)
        for name, values in scores.items():
            mean = sum(values) / len(values)
            module.log(f"val/identity_{name}", mean, batch_size=len(values), sync_dist=True)
        if trainer.is_global_zero:
            sheet = draw_contact_sheet(_TITLES, grid, cell_size=256)
            path = Path(trainer.default_root_dir) / f"portraits/step-{trainer.global_step:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            sheet.save(path)
            log_image(trainer.loggers, "val/portraits", sheet, trainer.global_step)

    def _generate(
        self,
        module: HypernetworkTraining,
        loras: LoraWeights | None,
        index: int,
        resolution: int | None,
    ) -> Image.Image:
        """Generate one image: of one subject at a time, so that bases of any size can."""
        if loras is None and self._base_image is not None:
            return self._base_image
        trigger = module.model.trigger_phrase
        (image,) = generate_images(
            module.base,
            [self.prompt.format(trigger=trigger)],
            None if loras is None else loras[index],
            seeds=[self.seed],
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            width=resolution,
            height=resolution,
        )
        if loras is None:
            self._base_image = image
        return image

    def _score(self, module: HypernetworkTraining, photos: Tensor, images: Tensor) -> list[float]:
        """Score images [n, 3, h, w] against the photos [views, 3, h, w] of a subject."""
        if self.identity is not None:
            return self.identity.to(photos.device)(photos, images).tolist()
        encoder = module.model.encoder
        photo_embeds = _pool(encoder(photos[:, None]))  # [views, width]
        image_embeds = _pool(encoder(images[:, None]))  # [n, width]
        return (image_embeds @ photo_embeds.mT).mean(1).tolist()


def log_image(loggers: Sequence[Logger], name: str, image: Image.Image, step: int) -> None:
    """Log an image to those of the loggers that take images.

    Args:
        loggers: Of a trainer.
        name: Of the series of images.
        image: The image.
        step: Optimizer steps.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, pil_to_tensor(image), step)
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [image], step=step)


def _lacks(module: HypernetworkTraining, component: str) -> bool:
    return getattr(module.base.pipeline, component, None) is None


def _pool(features: ImageFeatures) -> Tensor:
    """Mean of the tokens [n, 1, tokens, width], of unit length: [n, width]."""
    return F.normalize(features.tokens[:, 0].mean(1).float(), dim=-1)
