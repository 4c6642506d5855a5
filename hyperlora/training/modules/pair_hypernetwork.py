"""Train a network that makes LoRAs from before/after pairs, through the frozen edit base."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from hyperlora.diffusion.diffusion_base import PromptCache, load_diffusion_base
from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.diffusion.losses import compute_denoising_loss, compute_edit_region_weights
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.encoders.attribute_classifier import load_image_encoder
from hyperlora.errors import InvalidArgumentError
from hyperlora.features import ImageFeatures
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.pair_hypernetwork import PairHypernetwork
from hyperlora.pipelines.pair_to_lora import PairToLora
from hyperlora.pipelines.prompt_lora import set_instruction_texts
from hyperlora.training.auxiliary_losses import AttributeLoss
from hyperlora.training.optimizers import make_adamw_cosine, make_muon_cosine


class PairHypernetworkTraining(L.LightningModule):
    """L = ‖G(+Δ; B) - B'‖² + ``reverse_weight`` ‖G(-Δ; B') - B‖² + ``delta_l2_weight`` ‖Δ‖² + ``instruction_loss_weight`` C(words)

    with Δ = H(A, A') (2411.19156, §3.3). The first norms are the edit base's denoising loss, with what it is shown
    beside the noise before the semicolon; ``use_denoising_loss`` false leaves them out. The last one is ``InstructionVocabulary.loss``: of
    a network with ``words``, which learns from the instructions what a change is called.

    Batches: ``pairs`` [batch, views, 2, 3, h, w] in [0, 1], A and A' of each, or what the frozen encoder says about
    them, ``tokens`` [batch, views, 2, tokens, width]; ``before`` and ``after`` [batch, c, h, w], latents of B and B'
    (or ``images`` [batch, 2, 3, h, w] in [0, 1], encoded here); ``instructions``, batch strings, shown to the base with
    probability ``instruction_prob`` and else left empty, and, if known, ``undoing``, those of the way back.
    With probability ``swap_prob`` a sample's two sides change places (random exchange). ``encoder`` is a released
    reader's folder or a timm id with ``encoder_options``; it learns too unless ``freeze_encoder``.
    Places that the edit changes count up to ``edit_region_weight`` times more than the rest. ``start_from`` is the folder of
    a released ``PairToLora`` that training goes on from (the second of the paper's two stages).
    ``network["words"]["build_vocabulary"]`` may be a JSON file. With ``freeze_instruction_head`` the part that finds words stays as it
    is. ``attribute_classifier`` and ``attribute_loss_weight`` are ``TextToImageTraining``'s; ``labels`` of a batch are then those before and after.
    With ``use_muon`` the words' hidden matrices learn by ``Muon``.
    Every validation logs the loss with the pair's own LoRA, with another pair's and with none, and of undoing.
    """

    def __init__(
        self,
        base: str,
        encoder: str,
        output_dir: str,
        preset: str = "attention+mlp",
        rank: int = 4,
        network: dict[str, Any] | None = None,
        encoder_options: dict[str, Any] | None = None,
        base_options: dict[str, Any] | None = None,
        freeze_encoder: bool = False,
        freeze_instruction_head: bool = False,
        gradient_checkpointing: bool = False,
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
        card: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not use_denoising_loss and not instruction_loss_weight:
            raise InvalidArgumentError(
                "nothing to learn from: denoising is off and telling is 0; give one of them"
            )
        self.save_hyperparameters()
        # a plain attribute in a tuple: the frozen base is no part of the checkpoint
        self._base = (load_diffusion_base(base, **(base_options or {})),)
        self.prompt_cache: PromptCache = {}
        if start_from is not None:
            self.model = PairToLora.from_pretrained(start_from, base=self.base).requires_grad_(True)
        else:
            denoiser_name = next(iter(self.base.modules))
            layout = make_layout({denoiser_name: self.base.denoiser}, preset, rank, self.base.id)
            image_encoder = load_image_encoder(encoder, encoder_options)
            self.model = PairToLora(
                image_encoder,
                PairHypernetwork(layout, image_encoder.width, **_load_vocabulary(network or {})),
                card,
            )
        self.model.encoder.requires_grad_(not freeze_encoder)
        if self.model.network.instruction_head is not None:
            self.model.network.instruction_head.requires_grad_(not freeze_instruction_head)
        set_instruction_texts(self.model.network, self.base)
        self.attribute_loss = AttributeLoss(attribute_classifier, attribute_loss_weight)
        if gradient_checkpointing:
            self.base.denoiser.enable_gradient_checkpointing()

    @property
    def base(self) -> Any:
        return self._base[0]

    def on_fit_start(self) -> None:
        self.base.pipeline.to(self.device)
        self.attribute_loss.to(self.device)
        set_instruction_texts(
            self.model.network, self.base
        )  # again: a checkpoint holds those of the base it was trained with

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.model.encoder.eval()  # statistics of batch norms stay as they were learned
        batch_size, num_pairs = batch["tokens" if "tokens" in batch else "pairs"].shape[:2]
        swap_mask = torch.rand(batch_size, device=self.device) < self.hparams["swap_prob"]
        num_views = int(torch.randint(1, min(num_pairs, self.hparams["max_views"]) + 1, ()))
        pair_features = _swap_features(*self._encode_pairs(batch, num_views), swap_mask)
        if (
            self.model.network.instruction_head is not None
        ):  # what is usual is learned with words alone, in large batches
            self.model.network.instruction_head.input_norm.train(
                not self.hparams["use_denoising_loss"]
            )
        loss = torch.zeros((), device=self.device)
        if instruction_loss_weight := self.hparams["instruction_loss_weight"]:
            instruction_losses, _ = self._compute_instruction_loss(batch, swap_mask, *pair_features)
            self.log("train/words", instruction_loss := instruction_losses.mean(), prog_bar=True)
            loss = loss + instruction_loss_weight * instruction_loss
        if self.hparams["use_denoising_loss"]:
            weights = self.model.generate_from_features(*pair_features)
            loss = loss + self._compute_edit_loss(batch, swap_mask, weights)
            loss = loss + self.hparams["delta_l2_weight"] * weights.compute_mean_squared_norm()
        return loss

    def _compute_edit_loss(
        self, batch: dict[str, Any], swap_mask: Tensor, weights: LoraWeights
    ) -> Tensor:
        """Both directions' denoising losses."""
        before, after = self._get_edit_latents(batch)
        swap_latents = swap_mask.view(-1, 1, 1, 1)
        before, after = (
            torch.where(swap_latents, after, before),
            torch.where(swap_latents, before, after),
        )
        use_instruction = (torch.rand(len(swap_mask)) < self.hparams["instruction_prob"]).tolist()
        instruction_flags = zip(
            batch["instructions"], use_instruction, swap_mask.tolist(), strict=True
        )
        instructions = [w if keep and not s else "" for w, keep, s in instruction_flags]
        labels_before, labels_after = _swap_labels(batch.get("labels"), swap_mask)
        loss = self._compute_denoising_loss(
            weights, before, after, instructions, self.attribute_loss.make_loss_fn(labels_after)
        )
        self.log("train/loss", loss, prog_bar=True)
        if self.hparams["reverse_weight"]:
            reverse_loss = self._compute_denoising_loss(
                -weights,
                after,
                before,
                [""] * len(instructions),
                self.attribute_loss.make_loss_fn(labels_before),
            )
            self.log("train/reverse", reverse_loss, prog_bar=True)
            loss = loss + self.hparams["reverse_weight"] * reverse_loss
        return loss

    def _compute_instruction_loss(
        self, batch: dict[str, Any], swap_mask: Tensor, before: ImageFeatures, after: ImageFeatures
    ) -> tuple[Tensor, Tensor]:
        """The loss of what is said of each change, and whether it is right, [n]; 0 of the way back where the words for
        it are not known."""
        undo_instructions = batch.get("undoing")
        instruction_pairs = zip(
            batch["instructions"],
            undo_instructions or batch["instructions"],
            swap_mask.tolist(),
            strict=True,
        )
        instruction_head = self.model.network.instruction_head
        assert instruction_head is not None
        target = instruction_head.vocabulary.encode(
            [undo if turned else do for do, undo, turned in instruction_pairs]
        ).to(self.device)
        logits = instruction_head.forward_logits(
            self.model.network.fuse_pair(before, after)
        ).float()
        is_known = torch.ones_like(swap_mask) if undo_instructions is not None else ~swap_mask
        return instruction_head.vocabulary.compute_loss(
            logits, target
        ) * is_known, instruction_head.vocabulary.is_correct(logits, target) & is_known

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        pair_features = self._encode_pairs(batch, 1)
        if self.hparams["instruction_loss_weight"]:
            no_swap = torch.zeros(
                batch_size := len(batch["instructions"]), dtype=torch.bool, device=self.device
            )
            instruction_losses, is_correct = self._compute_instruction_loss(
                batch, no_swap, *pair_features
            )
            self.log("val/words", instruction_losses.mean(), prog_bar=True, batch_size=batch_size)
            self.log("val/said", is_correct.float().mean(), prog_bar=True, batch_size=batch_size)
        if not self.hparams["use_denoising_loss"]:
            return
        own_loras = self.model.generate_from_features(*pair_features)
        before, after = self._get_edit_latents(batch)
        shuffled_loras = own_loras[torch.arange(len(own_loras), device=self.device).roll(1)]
        cases = {
            "base": (own_loras * 0.0, before, after),
            "own": (own_loras, before, after),
            "shuffled": (shuffled_loras, before, after),
            "reverse": (-own_loras, after, before),
        }
        devices = [self.device] if self.device.type == "cuda" else []
        for name, (weights, input_latents, target_latents) in cases.items():
            with torch.random.fork_rng(devices):
                torch.manual_seed(batch_idx)  # the same noise for all, and every time
                loss = self._compute_denoising_loss(
                    weights, input_latents, target_latents, [""] * len(own_loras)
                )
            self.log(f"val/{name}", loss, prog_bar=True, batch_size=len(own_loras), sync_dist=True)

    def _encode_pairs(
        self, batch: dict[str, Any], num_views: int
    ) -> tuple[ImageFeatures, ImageFeatures]:
        """Of the first ``num_views`` pairs, the pictures before and after."""
        if "tokens" in batch:
            before, after = batch["tokens"][:, :num_views].float().unbind(2)
            return ImageFeatures(before), ImageFeatures(after)
        before, after = batch["pairs"][:, :num_views].unbind(2)
        return self.model.encoder(before), self.model.encoder(after)

    def _get_edit_latents(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Latents of B and B'."""
        if "before" in batch:
            return batch["before"].float(), batch["after"].float()
        # in float32: bfloat16 would round away the little noise of early timesteps
        before, after = (self.base.encode_images(batch["images"][:, i]).float() for i in (0, 1))
        return before, after

    def _compute_denoising_loss(
        self,
        weights: LoraWeights,
        input_latents: Tensor,
        target_latents: Tensor,
        instructions: list[str],
        aux_loss_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        with inject_lora(self.base.denoiser, weights):
            return compute_denoising_loss(
                self.base.denoiser,
                self.base.noise_schedule,
                target_latents,
                shift=self.hparams["timestep_shift"],
                cond_latents=input_latents / self.base.pipeline.vae.config.scaling_factor,
                weight=compute_edit_region_weights(
                    input_latents, target_latents, self.hparams["edit_region_weight"]
                ),
                aux_loss_fn=aux_loss_fn,
                aux_loss_weight=1.0,
                **self.base.encode_prompts(instructions, self.prompt_cache),
            ).mean()

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            self.model.save_pretrained(self.hparams["output_dir"])

    def configure_optimizers(self) -> dict[str, Any]:
        if not self.hparams["use_muon"]:
            return make_adamw_cosine(self, self.model.parameters(), self.hparams["lr"])
        matrices = (
            self.model.network.instruction_head.get_hidden_matrices()
            if self.model.network.instruction_head
            else []
        )
        matrix_ids = {id(parameter) for parameter in matrices}
        other_params = [
            parameter for parameter in self.model.parameters() if id(parameter) not in matrix_ids
        ]
        return make_muon_cosine(self, matrices, other_params, self.hparams["lr"])


def _load_vocabulary(network: dict[str, Any]) -> dict[str, Any]:
    """``network`` with the vocabulary of its words read, if that is a file. Raises ``InvalidArgumentError`` for one that is not
    there or holds something else."""
    head_options = network.get("words") or {}
    path = head_options.get("vocabulary")
    if not isinstance(path, str):
        return network
    try:
        vocabulary = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(
            f"vocabulary {path!r} is no JSON file with choices and mixtures of prompts: `python -m data_builder edits` "
            "writes one beside its pictures"
        ) from error
    return network | {"words": head_options | {"vocabulary": vocabulary}}


def _swap_features(
    before: ImageFeatures, after: ImageFeatures, swap_mask: Tensor
) -> tuple[ImageFeatures, ImageFeatures]:
    """The samples ``swap_mask`` [n] with their sides changed."""
    swap_tokens = swap_mask.view(-1, 1, 1, 1)
    tokens_before, tokens_after = before.tokens, after.tokens
    return ImageFeatures(torch.where(swap_tokens, tokens_after, tokens_before)), ImageFeatures(
        torch.where(swap_tokens, tokens_before, tokens_after)
    )


AttributeLabels = dict[str, Tensor]


def _swap_labels(
    labels: Sequence[AttributeLabels] | None, swap_mask: Tensor
) -> tuple[AttributeLabels | None, AttributeLabels | None]:
    """Labels before and after, if there are any, the samples ``swap_mask`` [n] having changed places."""
    if labels is None:
        return None, None
    before, after = labels
    labels_before = {k: torch.where(swap_mask, after[k], before[k]) for k in before}
    return labels_before, {k: torch.where(swap_mask, before[k], after[k]) for k in before}
