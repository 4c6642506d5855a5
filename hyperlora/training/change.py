"""Train a network that makes LoRAs from before/after pairs, through the frozen edit base."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from hyperlora.adapters import injected, layout_of
from hyperlora.encoders import photo_encoder
from hyperlora.lora import LoraWeights
from hyperlora.models import ChangeNetwork
from hyperlora.objectives import denoising_loss, edit_weight
from hyperlora.pipelines import PairToLora, load_base
from hyperlora.training.optimizers import adamw_one_cycle
from hyperlora.training.reader import Misreading


class ChangeTraining(L.LightningModule):
    """L = ‖G(+Δ; B) - B'‖² + ``reverse`` ‖G(-Δ; B') - B‖² + ``output_l2`` ‖Δ‖²,   Δ = H(A, A')     (2411.19156, §3.3)

    Both norms are the edit base's denoising loss, with what it is shown beside the noise before the semicolon.
    Batches: ``pairs`` [batch, views, 2, 3, h, w] in [0, 1], A and A' of each; ``before`` and ``after``
    [batch, c, h, w], latents of B and B' (or ``images`` [batch, 2, 3, h, w] in [0, 1], encoded here);
    ``instructions``, batch strings, shown to the base with probability ``instructed`` and else left empty.
    With probability ``exchange`` a sample's two sides change places (random exchange). ``encoder`` is a released
    reader's folder or a timm id with ``encoder_options``; it learns too unless ``freeze_encoder``.
    Places that the edit changes count up to ``change_weight`` times more than the rest. ``start_from`` is the folder of
    a released ``PairToLora`` that training goes on from (the second of the paper's two stages).
    ``reader`` and ``reading_weight`` are ``BaseModel``'s; ``labels`` of a batch are then those before and after.
    Every validation logs the loss with the pair's own LoRA, with another pair's and with none, and of undoing.
    """

    def __init__(
        self,
        base: str,
        encoder: str,
        out: str,
        preset: str = "attention+mlp",
        rank: int = 4,
        network: dict[str, Any] | None = None,
        encoder_options: dict[str, Any] | None = None,
        base_options: dict[str, Any] | None = None,
        freeze_encoder: bool = False,
        gradient_checkpointing: bool = False,
        start_from: str | None = None,
        reverse: float = 1.0,
        exchange: float = 0.5,
        instructed: float = 0.0,
        change_weight: float = 4.0,
        timestep_shift: float = 1.0,
        output_l2: float = 1e-4,
        reader: str | None = None,
        reading_weight: float = 0.0,
        max_views: int = 4,
        lr: float = 6e-4,
        card: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        # a plain attribute in a tuple: the frozen base is no part of the checkpoint
        self._base = (load_base(base, **(base_options or {})),)
        if start_from is not None:
            self.model = PairToLora.from_pretrained(start_from, base=self.base).requires_grad_(True)
        else:
            component = next(iter(self.base.modules))
            layout = layout_of({component: self.base.denoiser}, preset, rank, self.base.id)
            vision = photo_encoder(encoder, encoder_options)
            self.model = PairToLora(vision, ChangeNetwork(layout, vision.width, **(network or {})), card)
        self.model.encoder.requires_grad_(not freeze_encoder)
        self.misreading = Misreading(reader, reading_weight)
        if gradient_checkpointing:
            self.base.denoiser.enable_gradient_checkpointing()

    @property
    def base(self) -> Any:
        return self._base[0]

    def on_fit_start(self) -> None:
        self.base.pipeline.to(self.device)
        self.misreading.to(self.device)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        self.model.encoder.eval()  # statistics of batch norms stay as they were learned
        pairs, before, after, words = self._sides(batch)
        n = len(pairs)
        swapped = torch.rand(n, device=self.device) < self.hparams["exchange"]
        pairs = torch.where(swapped.view(-1, 1, 1, 1, 1, 1), pairs.flip(2), pairs)
        place = swapped.view(-1, 1, 1, 1)
        before, after = torch.where(place, after, before), torch.where(place, before, after)
        views = int(torch.randint(1, min(pairs.shape[1], self.hparams["max_views"]) + 1, ()))
        shown = (torch.rand(n) < self.hparams["instructed"]).tolist()
        texts = [w if keep and not s else "" for w, keep, s in zip(words, shown, swapped.tolist(), strict=True)]
        weights = self.model.forward(pairs[:, :views])
        first, second = _exchanged(batch.get("labels"), swapped)
        loss = self._denoising(weights, before, after, texts, self.misreading.of(second))
        logs = {"train/loss": loss}
        if self.hparams["reverse"]:
            undone = self._denoising(-weights, after, before, [""] * n, self.misreading.of(first))
            logs["train/reverse"] = undone
            loss = loss + self.hparams["reverse"] * undone
        self.log_dict(logs, prog_bar=True)
        return loss + self.hparams["output_l2"] * weights.squared_norm()

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        pairs, before, after, _ = self._sides(batch)
        own = self.model.forward(pairs[:, :1])
        other = own[torch.arange(len(own), device=self.device).roll(1)]
        cases = {
            "base": (own * 0.0, before, after), "own": (own, before, after), "shuffled": (other, before, after),
            "reverse": (-own, after, before),
        }  # fmt: skip
        devices = [self.device] if self.device.type == "cuda" else []
        for name, (weights, seen, wanted) in cases.items():
            with torch.random.fork_rng(devices):
                torch.manual_seed(batch_index)  # the same noise for all, and every time
                loss = self._denoising(weights, seen, wanted, [""] * len(own))
            self.log(f"val/{name}", loss, prog_bar=True, batch_size=len(own), sync_dist=True)

    def _sides(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        if "before" in batch:
            return batch["pairs"], batch["before"].float(), batch["after"].float(), batch["instructions"]
        # in float32: bfloat16 would round away the little noise of early timesteps
        before, after = (self.base.encode_images(batch["images"][:, i]).float() for i in (0, 1))
        return batch["pairs"], before, after, batch["instructions"]

    def _denoising(
        self, weights: LoraWeights, seen: Tensor, wanted: Tensor, texts: list[str],
        also: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        with injected(self.base.denoiser, weights):
            return denoising_loss(
                self.base.denoiser,
                self.base.noise_schedule,
                wanted,
                shift=self.hparams["timestep_shift"],
                beside=seen / self.base.pipeline.vae.config.scaling_factor,
                weight=edit_weight(seen, wanted, self.hparams["change_weight"]),
                also=also,
                sure=1.0,
                **self.base.encode_prompts(texts),
            ).mean()

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            self.model.save_pretrained(self.hparams["out"])

    def configure_optimizers(self) -> dict[str, Any]:
        return adamw_one_cycle(self, self.model.parameters(), self.hparams["lr"])


Labels = dict[str, Tensor]


def _exchanged(labels: Sequence[Labels] | None, swapped: Tensor) -> tuple[Labels | None, Labels | None]:
    """Labels before and after, if there are any, the samples ``swapped`` [n] having changed places."""
    if labels is None:
        return None, None
    before, after = labels
    first = {k: torch.where(swapped, after[k], before[k]) for k in before}
    return first, {k: torch.where(swapped, before[k], after[k]) for k in before}
