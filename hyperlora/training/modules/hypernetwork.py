"""Train a hypernetwork through the frozen base, with one LoRA per subject."""

from typing import Final

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from hyperlora.compute import fork_rng
from hyperlora.diffusion.conditions import Conditions
from hyperlora.diffusion.diffusion_base import make_unet_encoder
from hyperlora.diffusion.losses import AuxLoss, compute_denoising_loss
from hyperlora.encoders.attribute_classifier import load_image_encoder
from hyperlora.features import ImageFeatures
from hyperlora.models.hypernetwork import Hypernetwork
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.image_to_lora_base import ImageEncoder
from hyperlora.pipelines.model_card import ModelCard
from hyperlora.training.auxiliary_losses import AttributeLoss
from hyperlora.training.batches import SubjectBatch
from hyperlora.training.memory import make_checked_network
from hyperlora.training.modules.frozen_base import load_training_base
from hyperlora.training.modules.options import Options
from hyperlora.training.modules.pretrained_model import PretrainedModelTraining
from hyperlora.training.optimizers import make_adamw_cosine

UNET_ENCODER: Final = "unet"
"""Name of the encoder that takes features of the base's own UNet."""


class HypernetworkTraining(PretrainedModelTraining):
    """Train on denoising images of a subject with the LoRA predicted from its photos.

    L = ‖ε̂ - ε‖² + ``code_loss_weight`` ‖θ̂ - θ‖² + ``delta_l2_weight`` ‖ΔW‖²
    (2307.06949, eq. 3; 2506.06105 for the last term), θ the codes fitted beforehand.

    Validation logs the denoising loss of unseen subjects without LoRA (``val/loss_base``), with
    their own (``val/loss_own``) and with another subject's (``val/loss_shuffled``). A network
    that learns has own < base < shuffled.

    Args:
        base: Folder or hub id of the pipeline that stays frozen.
        encoder: ``unet`` (features of the base's UNet), the folder of a released
            ``AttributeClassifier``, or a timm id. It stays frozen.
        output_dir: Folder that receives the ``ImageToLora`` when training ends.
        preset: Target modules: ``attention``, ``attention+mlp`` or ``attention+conv``.
        text_encoders: Whether the CLIP text encoders are adapted, too.
        rank: Of the LoRAs.
        hypernetwork: Arguments of ``Hypernetwork``.
        encoder_options: Arguments of the encoder.
        base_options: Arguments of ``load_training_base``.
        gradient_checkpointing: Whether the denoiser recomputes activations to save memory.
        shard_base: Whether several devices share one base, each with a part of its weights.
        code_targets: File with ``codes`` [num_subjects, ...] fitted to the first subjects
            (``data-builder fit-lidb-targets``); None for no regression.
        code_loss_weight: Weight of the regression to them.
        delta_l2_weight: Weight of the mean squared norm of ΔW.
        timestep_shift: s of ``compute_denoising_loss``: above 1, noisier timesteps come more often.
        attribute_classifier: Folder of a classifier of latents for the auxiliary loss. Prompt and
            photos determine all attributes of a target.
        attribute_loss_weight: Weight of its cross-entropy with the labels of the batch.
        start_from: Folder of an ``ImageToLora`` whose hypernetwork training continues.
        max_views: Largest number of reference photos in a step, which is drawn at random.
        lr: Peak learning rate of AdamW.
        card: Fields of the released ``ModelCard``.
    """

    model: ImageToLora

    def __init__(
        self,
        base: str,
        encoder: str,
        output_dir: str,
        preset: str = "attention",
        text_encoders: bool = False,
        rank: int = 4,
        hypernetwork: Options | None = None,
        encoder_options: Options | None = None,
        base_options: Options | None = None,
        gradient_checkpointing: bool = False,
        shard_base: bool = False,
        code_targets: str | None = None,
        code_loss_weight: float = 0.0,
        delta_l2_weight: float = 1e-3,
        timestep_shift: float = 1.0,
        attribute_classifier: str | None = None,
        attribute_loss_weight: float = 0.0,
        start_from: str | None = None,
        max_views: int = 8,
        lr: float = 3e-4,
        card: Options | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.base = load_training_base(base, **(base_options or {}))
        self.shards_base = shard_base
        layout = self.base.make_layout(preset, rank, text_encoders=text_encoders)
        image_encoder: ImageEncoder
        if encoder == UNET_ENCODER:
            image_encoder = make_unet_encoder(self.base, **(encoder_options or {}))
        else:
            image_encoder = load_image_encoder(encoder, encoder_options)
        if start_from is None:
            options = hypernetwork or {}
            network = make_checked_network(
                lambda: Hypernetwork(layout, image_encoder.width, **options)
            )
        else:
            pretrained = ImageToLora.from_pretrained(start_from, base=self.base)
            network = pretrained.hypernetwork.requires_grad_(True)
            network.layout.check_compatible(layout)
        self.model = ImageToLora(
            image_encoder.requires_grad_(False),
            network,
            ModelCard.from_dict({"architecture": self.base.architecture} | (card or {})),
        )
        self.attribute_loss = AttributeLoss(attribute_classifier, attribute_loss_weight)
        self.code_targets = load_file(code_targets)["codes"] if code_targets else None
        if gradient_checkpointing:
            self.enable_gradient_checkpointing()

    def training_step(self, batch: SubjectBatch, batch_idx: int) -> Tensor:
        """Compute the loss with a LoRA from a random number of reference photos.

        Args:
            batch: Photos and targets of n subjects.
            batch_idx: Not used.

        Returns:
            Loss, a scalar.
        """
        self.model.encoder.eval()
        features = self._encode_photos(batch)  # tokens [n, num_views, num_tokens, width]
        max_views = min(features.tokens.shape[1], self.hparams["max_views"])
        num_views = int(torch.randint(1, max_views + 1, ()))
        codes = self.model.hypernetwork.predict_codes(ImageFeatures(features.tokens[:, :num_views]))
        weights = self.model.hypernetwork.decode_codes(codes)
        with self.base.inject_lora(weights):
            denoising_loss = self._compute_denoising_loss(
                batch, self.attribute_loss.make_aux_loss(batch.labels)
            )
        delta_l2 = weights.compute_mean_squared_norm()
        loss = denoising_loss + self.hparams["delta_l2_weight"] * delta_l2
        metrics = {"train/loss": denoising_loss, "train/delta_norm": delta_l2.detach().sqrt()}
        self.log_dict(metrics, prog_bar=True)
        if self.code_targets is not None and self.hparams["code_loss_weight"] > 0:
            code_loss = self._compute_code_loss(codes, self.code_targets, batch.subject_ids)
            self.log("train/code_loss", code_loss)
            loss = loss + self.hparams["code_loss_weight"] * code_loss
        return loss

    def _compute_code_loss(
        self, codes: Tensor, code_targets: Tensor, subject_ids: Tensor
    ) -> Tensor:
        """Compute the squared error of the codes of subjects that have targets, per subject."""
        has_target = subject_ids < len(code_targets)  # [n]
        target_codes = code_targets.to(codes)[subject_ids[has_target]]
        squared_error = F.mse_loss(codes[has_target], target_codes, reduction="sum")
        return squared_error / len(codes)

    def validation_step(self, batch: SubjectBatch, batch_idx: int) -> None:
        """Log the denoising loss of one photo's LoRA and of its controls, with the same noise.

        Args:
            batch: Photos and targets of n subjects.
            batch_idx: Seed of the noise.
        """
        features = ImageFeatures(self._encode_photos(batch).tokens[:, :1])
        own_loras = self.model.hypernetwork(features)
        controls = {
            "base": own_loras * 0.0,
            "own": own_loras,
            "shuffled": own_loras.shuffle_batch(),
        }
        for name, weights in controls.items():
            with fork_rng(self.device), self.base.inject_lora(weights):
                torch.manual_seed(batch_idx)
                loss = self._compute_denoising_loss(batch)
            self.log(
                f"val/loss_{name}",
                loss,
                prog_bar=True,
                batch_size=len(own_loras),
                sync_dist=True,
            )

    def _encode_photos(self, batch: SubjectBatch) -> ImageFeatures:
        """Return the features of all photos, tokens [n, num_views, num_tokens, width]."""
        if batch.tokens is not None:
            return ImageFeatures(batch.tokens)
        assert batch.photos is not None, "a SubjectBatch needs photos or tokens"
        return self.model.encode_photos(batch.photos).image

    def _compute_denoising_loss(
        self, batch: SubjectBatch, aux_loss: AuxLoss | None = None
    ) -> Tensor:
        """Compute the mean loss of the targets; the denoiser has its LoRAs already."""
        latents = batch.latents
        if latents is None:
            assert batch.images is not None, "a SubjectBatch needs latents or images"
            latents = self.base.encode_images(batch.images)  # [t * n, c, h, w]
        return compute_denoising_loss(
            self.base.predict,
            self.base.noise_scheduler,
            latents.float(),  # bfloat16 would round away the little noise of early timesteps
            self._encode_captions(batch),
            shift=self.hparams["timestep_shift"],
            aux_loss=aux_loss,
        ).mean()

    def _encode_captions(self, batch: SubjectBatch) -> Conditions:
        """Return the conditions of the targets; LoRAs of text encoders change them every time."""
        if self.hparams["text_encoders"]:
            return self.base.encode_prompts(batch.captions, requires_grad=True)
        return batch.conditions or self.base.encode_prompts(batch.captions)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make AdamW for the hypernetwork, with one cosine cycle."""
        return make_adamw_cosine(self, self.model.hypernetwork.parameters(), self.hparams["lr"])
