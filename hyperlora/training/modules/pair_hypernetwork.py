"""Train a network from before/after pairs to LoRAs, through the frozen edit base."""

import json
from pathlib import Path

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from hyperlora.compute import fork_rng
from hyperlora.diffusion.conditions import Conditions
from hyperlora.diffusion.diffusion_base import PromptCache
from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.diffusion.losses import compute_denoising_loss, compute_edit_region_weights
from hyperlora.encoders.attribute_classifier import load_image_encoder
from hyperlora.errors import InvalidArgumentError
from hyperlora.features import ImageFeatures
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.pair_hypernetwork import PairHypernetwork
from hyperlora.pipelines.model_card import ModelCard
from hyperlora.pipelines.pair_to_lora import PairToLora
from hyperlora.pipelines.prompt_lora import set_instruction_texts
from hyperlora.training.auxiliary_losses import AttributeLoss
from hyperlora.training.batches import PairBatch
from hyperlora.training.memory import make_checked_network
from hyperlora.training.modules.edit_targets import (
    EditTarget,
    swap_features,
    swap_labels,
    swap_sides,
)
from hyperlora.training.modules.frozen_base import load_training_base
from hyperlora.training.modules.options import Options
from hyperlora.training.modules.pretrained_model import PretrainedModelTraining
from hyperlora.training.optimizers import make_adamw_cosine, make_muon_cosine


class PairHypernetworkTraining(PretrainedModelTraining):
    """Train a LoRA Δ = H(A, A') of a pair on making the same edit elsewhere, B to B'.

    L = ‖G(Δ; B) - B'‖² + ``reverse_weight`` ‖G(-Δ; B') - B‖² + ``delta_l2_weight`` ‖ΔW‖²
    + ``instruction_loss_weight`` C (LoRA of Change, 2411.19156, §3.3).

    G(Δ; B) is the edit base with the LoRA Δ and the input image B; the first two norms are its
    denoising losses. C is ``InstructionVocabulary.compute_loss`` of the predicted instruction.

    Validation logs the denoising loss without LoRA (``val/loss_base``), with the pair's own
    (``val/loss_own``), with another pair's (``val/loss_shuffled``) and of undoing
    (``val/loss_reverse``); with an instruction loss also its value and the accuracy.

    Args:
        base: Folder or hub id of the InstructPix2Pix pipeline that stays frozen.
        encoder: Folder of a released ``AttributeClassifier``, or a timm id.
        output_dir: Folder that receives the ``PairToLora`` when training ends.
        preset: Target modules: ``attention``, ``attention+mlp`` or ``attention+conv``.
        rank: Of the LoRAs.
        network: Arguments of ``PairHypernetwork``. ``instruction_head.vocabulary`` may be the
            path of a JSON file.
        encoder_options: Arguments of the encoder.
        base_options: Arguments of ``load_training_base``.
        freeze_encoder: Whether the encoder stays as it is.
        freeze_instruction_head: Whether the instruction head stays as it is.
        gradient_checkpointing: Whether the denoiser recomputes activations to save memory.
        shard_base: Whether several devices share one base, each with a part of its weights.
        start_from: Folder of a ``PairToLora`` to continue from (the paper's second stage).
        reverse_weight: Weight of undoing the edit with -Δ.
        swap_prob: Probability of swapping the two sides of a sample (the paper's exchange).
        instruction_prob: Probability of giving the base the instruction as well; it is empty else.
        edit_region_weight: Loss weight that is added where the edit changes the latents.
        timestep_shift: s of ``compute_denoising_loss``: above 1, noisier timesteps come more often.
        delta_l2_weight: Weight of the mean squared norm of ΔW.
        use_denoising_loss: Whether the base is used at all; without it the instruction head is
            trained alone.
        instruction_loss_weight: Weight of C.
        attribute_classifier: Folder of a classifier of latents for the auxiliary loss.
        attribute_loss_weight: Weight of its cross-entropy with the labels of B', at every noise
            level.
        max_views: Largest number of example pairs in a step, which is drawn at random.
        lr: Peak learning rate.
        use_muon: Whether the hidden matrices of the instruction head are trained by ``Muon``.
        card: Fields of the released ``ModelCard``.

    Raises:
        InvalidArgumentError: There is no loss, or the vocabulary file cannot be read.
    """

    model: PairToLora

    def __init__(
        self,
        base: str,
        encoder: str,
        output_dir: str,
        preset: str = "attention+mlp",
        rank: int = 4,
        network: Options | None = None,
        encoder_options: Options | None = None,
        base_options: Options | None = None,
        freeze_encoder: bool = False,
        freeze_instruction_head: bool = False,
        gradient_checkpointing: bool = False,
        shard_base: bool = False,
        start_from: str | None = None,
        reverse_weight: float = 1.0,
        swap_prob: float = 0.5,
        instruction_prob: float = 0.0,
        edit_region_weight: float = 4.0,
        timestep_shift: float = 1.0,
        delta_l2_weight: float = 1e-4,
        use_denoising_loss: bool = True,
        instruction_loss_weight: float = 0.0,
        attribute_classifier: str | None = None,
        attribute_loss_weight: float = 0.0,
        max_views: int = 4,
        lr: float = 6e-4,
        use_muon: bool = False,
        card: Options | None = None,
    ) -> None:
        super().__init__()
        if not use_denoising_loss and not instruction_loss_weight:
            raise InvalidArgumentError(
                "use_denoising_loss is false and instruction_loss_weight is 0: there is no loss to "
                "train on; give one of them"
            )
        self.save_hyperparameters()
        self.base = load_training_base(base, **(base_options or {}))
        self.shards_base = shard_base
        self.prompt_cache: PromptCache = {}
        if start_from is not None:
            self.model = PairToLora.from_pretrained(start_from, base=self.base).requires_grad_(True)
        else:
            layout = self.base.make_layout(preset, rank)
            image_encoder = load_image_encoder(encoder, encoder_options)
            options = load_vocabulary(network or {})
            self.model = PairToLora(
                image_encoder,
                make_checked_network(
                    lambda: PairHypernetwork(layout, image_encoder.width, **options)
                ),
                ModelCard.from_dict({"architecture": self.base.architecture} | (card or {})),
            )
        self.model.encoder.requires_grad_(not freeze_encoder)
        if self.model.network.instruction_head is not None:
            self.model.network.instruction_head.requires_grad_(not freeze_instruction_head)
        set_instruction_texts(self.model.network, self.base)
        self.attribute_loss = AttributeLoss(attribute_classifier, attribute_loss_weight)
        if gradient_checkpointing:
            self.enable_gradient_checkpointing()

    def on_fit_start(self) -> None:
        """Move the base to the device and take the text embeddings from it.

        A checkpoint that was loaded holds those of the base it was trained with.
        """
        super().on_fit_start()
        set_instruction_texts(self.model.network, self.base)

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Compute the loss with a random number of example pairs, some with their sides swapped.

        Args:
            batch: Example pairs and target pairs of n edits.
            batch_idx: Not used.

        Returns:
            Loss, a scalar.
        """
        self.model.encoder.eval()  # frozen statistics of batch norms
        n, num_pairs = batch.encoder_input.shape[:2]
        swap_mask = torch.rand(n, device=self.device) < self.hparams["swap_prob"]  # [n]
        num_views = int(torch.randint(1, min(num_pairs, self.hparams["max_views"]) + 1, ()))
        pair_features = swap_features(*self._encode_pairs(batch, num_views), swap_mask)
        if self.model.network.instruction_head is not None:
            # input statistics are only learned where batches are large: without the base
            self.model.network.instruction_head.input_norm.train(
                not self.hparams["use_denoising_loss"]
            )
        loss = torch.zeros((), device=self.device)
        if instruction_loss_weight := self.hparams["instruction_loss_weight"]:
            instruction_losses, _ = self._compute_instruction_loss(batch, swap_mask, *pair_features)
            instruction_loss = instruction_losses.mean()
            self.log("train/instruction_loss", instruction_loss, prog_bar=True)
            loss = loss + instruction_loss_weight * instruction_loss
        if self.hparams["use_denoising_loss"]:
            weights = self.model.generate_from_features(*pair_features)
            loss = loss + self._compute_edit_loss(batch, swap_mask, weights)
            loss = loss + self.hparams["delta_l2_weight"] * weights.compute_mean_squared_norm()
        return loss

    def _compute_edit_loss(
        self, batch: PairBatch, swap_mask: Tensor, weights: LoraWeights
    ) -> Tensor:
        """Compute the denoising losses of making the edit and of undoing it."""
        before, after = swap_sides(*self._get_edit_latents(batch), swap_mask)
        image_before, image_after = self._get_input_images(batch, swap_mask, before, after)
        labels_before, labels_after = swap_labels(batch, swap_mask)
        use_instruction = (torch.rand(len(swap_mask)) < self.hparams["instruction_prob"]).tolist()
        instructions = [
            instruction if is_used and not is_swapped else ""
            for instruction, is_used, is_swapped in zip(
                batch.instructions, use_instruction, swap_mask.tolist(), strict=True
            )
        ]
        aux_loss = self.attribute_loss.make_aux_loss(labels_after, weight=1.0)
        forward = EditTarget(before, after, aux_loss, image_before)
        loss = self._compute_denoising_loss(weights, forward, instructions)
        self.log("train/loss", loss, prog_bar=True)
        if self.hparams["reverse_weight"]:
            aux_loss = self.attribute_loss.make_aux_loss(labels_before, weight=1.0)
            reverse = EditTarget(after, before, aux_loss, image_after)
            reverse_loss = self._compute_denoising_loss(-weights, reverse, [""] * len(instructions))
            self.log("train/reverse_loss", reverse_loss, prog_bar=True)
            loss = loss + self.hparams["reverse_weight"] * reverse_loss
        return loss

    def _compute_instruction_loss(
        self, batch: PairBatch, swap_mask: Tensor, before: ImageFeatures, after: ImageFeatures
    ) -> tuple[Tensor, Tensor]:
        """Compute loss and correctness of the predicted instructions.

        Args:
            batch: Where ``undo_instructions`` are not known, swapped samples have no loss.
            swap_mask: Samples whose sides are swapped, [n].
            before: Features of A (A' where swapped).
            after: Features of A' (A where swapped).

        Returns:
            Loss [n] and whether the prediction is right [n].
        """
        instructions = [
            undo_instruction if is_swapped else instruction
            for instruction, undo_instruction, is_swapped in zip(
                batch.instructions,
                batch.undo_instructions or batch.instructions,
                swap_mask.tolist(),
                strict=True,
            )
        ]
        network = self.model.network
        assert network.instruction_head is not None
        vocabulary = network.instruction_head.vocabulary
        targets = vocabulary.encode(instructions).to(self.device)
        pair_features = network.fuse_pair(before, after)
        logits = network.instruction_head.forward_logits(pair_features).float()  # [n, num_logits]
        is_known = (
            ~swap_mask if batch.undo_instructions is None else torch.ones_like(swap_mask)
        )  # [n]
        loss = vocabulary.compute_loss(logits, targets) * is_known
        return loss, vocabulary.is_correct(logits, targets) & is_known

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Log the losses of one pair's LoRA and of its controls, with the same noise.

        Args:
            batch: Example pairs and target pairs of n edits.
            batch_idx: Seed of the noise.
        """
        pair_features, n = self._encode_pairs(batch, 1), len(batch.instructions)
        if self.hparams["instruction_loss_weight"]:
            no_swap = torch.zeros(n, dtype=torch.bool, device=self.device)
            losses, is_correct = self._compute_instruction_loss(batch, no_swap, *pair_features)
            metrics = {
                "val/instruction_loss": losses.mean(),
                "val/instruction_acc": is_correct.float().mean(),
            }
            self.log_dict(metrics, prog_bar=True, batch_size=n, sync_dist=True)
        if not self.hparams["use_denoising_loss"]:
            return
        own_loras = self.model.generate_from_features(*pair_features)
        before, after = self._get_edit_latents(batch)
        no_swap = torch.zeros(n, dtype=torch.bool, device=self.device)
        image_before, image_after = self._get_input_images(batch, no_swap, before, after)
        forward = EditTarget(before, after, input_images=image_before)
        reverse = EditTarget(after, before, input_images=image_after)
        cases = {
            "base": (own_loras * 0.0, forward),
            "own": (own_loras, forward),
            "shuffled": (own_loras.shuffle_batch(), forward),
            "reverse": (-own_loras, reverse),
        }
        for name, (weights, target) in cases.items():
            with fork_rng(self.device):
                torch.manual_seed(batch_idx)
                loss = self._compute_denoising_loss(weights, target, [""] * n)
            self.log(f"val/loss_{name}", loss, prog_bar=True, batch_size=n, sync_dist=True)

    def _encode_pairs(
        self, batch: PairBatch, num_views: int
    ) -> tuple[ImageFeatures, ImageFeatures]:
        """Encode both sides of the first pairs, tokens [n, num_views, num_tokens, width] each."""
        before, after = batch.encoder_input[:, :num_views].unbind(2)
        if batch.tokens is not None:
            return ImageFeatures(before.float()), ImageFeatures(after.float())
        return self.model.encoder(before), self.model.encoder(after)

    def _get_edit_latents(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Return the latents of B and B', [n, c, h, w] each.

        They are float32: bfloat16 would round away the little noise of early timesteps.
        """
        if batch.before is not None and batch.after is not None:
            return batch.before.float(), batch.after.float()
        assert batch.images is not None, "a PairBatch needs latents or images"
        before, after = batch.images.unbind(1)
        return self.base.encode_images(before).float(), self.base.encode_images(after).float()

    def _get_input_images(
        self, batch: PairBatch, swap_mask: Tensor, before: Tensor, after: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return both sides as images for a text encoder that sees them, else None."""
        if not self.base.family.encodes_images_in_prompts:
            return None, None
        if batch.images is not None:
            image_before, image_after = batch.images.unbind(1)
            return swap_sides(image_before, image_after, swap_mask)
        with torch.no_grad():
            return self.base.decode_latents(before), self.base.decode_latents(after)

    def _compute_denoising_loss(
        self, weights: LoraWeights, target: EditTarget, instructions: list[str]
    ) -> Tensor:
        """Compute the mean loss of one direction with LoRAs ``weights``."""
        conditions: Conditions = {
            **self.base.encode_prompts(instructions, self.prompt_cache, target.input_images),
            "image_latents": target.input_latents,
        }
        with inject_lora(self.base.denoiser, weights):
            return compute_denoising_loss(
                self.base.predict,
                self.base.noise_scheduler,
                target.target_latents,
                conditions,
                shift=self.hparams["timestep_shift"],
                weight=compute_edit_region_weights(
                    target.input_latents, target.target_latents, self.hparams["edit_region_weight"]
                ),
                aux_loss=target.aux_loss,
            ).mean()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make AdamW, or Muon for the instruction head's hidden matrices, with one cosine cycle."""
        parameters = list(self.model.parameters())
        if not self.hparams["use_muon"]:
            return make_adamw_cosine(self, parameters, self.hparams["lr"])
        head = self.model.network.instruction_head
        matrices = head.list_hidden_matrices() if head else []
        matrix_ids = {id(parameter) for parameter in matrices}
        other_params = [p for p in parameters if id(p) not in matrix_ids]
        return make_muon_cosine(self, matrices, other_params, self.hparams["lr"])


def load_vocabulary(network: Options) -> Options:
    """Replace the path of the instruction head's vocabulary by the content of the file."""
    head_options = network.get("instruction_head") or {}
    path = head_options.get("vocabulary")
    if not isinstance(path, str):
        return network
    try:
        vocabulary = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(
            f"vocabulary {path!r} is no JSON file with categories and color axes of prompts: "
            "`python -m data_builder draw-pairs` writes one beside its images"
        ) from error
    return network | {"instruction_head": head_options | {"vocabulary": vocabulary}}
