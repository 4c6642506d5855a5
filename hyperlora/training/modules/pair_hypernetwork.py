"""Train a network that makes LoRAs from before/after pairs, through the frozen edit base."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from hyperlora.diffusion.diffusion_base import Texts, load_base
from hyperlora.diffusion.lora_injection import injected
from hyperlora.diffusion.losses import denoising_loss, edit_weight
from hyperlora.diffusion.target_modules import layout_of
from hyperlora.encoders.attribute_classifier import photo_encoder
from hyperlora.errors import BadRequest
from hyperlora.features import ImageFeatures
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.pair_hypernetwork import ChangeNetwork
from hyperlora.pipelines.pair_to_lora import PairToLora
from hyperlora.pipelines.prompt_lora import learn_words
from hyperlora.training.auxiliary_losses import Misreading
from hyperlora.training.optimizers import adamw_one_cycle, muon_one_cycle


class ChangeTraining(L.LightningModule):
    """L = ‖G(+Δ; B) - B'‖² + ``reverse`` ‖G(-Δ; B') - B‖² + ``output_l2`` ‖Δ‖² + ``telling`` C(words)

    with Δ = H(A, A') (2411.19156, §3.3). The first norms are the edit base's denoising loss, with what it is shown
    beside the noise before the semicolon; ``denoising`` false leaves them out. The last one is ``Vocabulary.loss``: of
    a network with ``words``, which learns from the instructions what a change is called.

    Batches: ``pairs`` [batch, views, 2, 3, h, w] in [0, 1], A and A' of each, or what the frozen encoder says about
    them, ``tokens`` [batch, views, 2, tokens, width]; ``before`` and ``after`` [batch, c, h, w], latents of B and B'
    (or ``images`` [batch, 2, 3, h, w] in [0, 1], encoded here); ``instructions``, batch strings, shown to the base with
    probability ``instructed`` and else left empty, and, if known, ``undoing``, those of the way back.
    With probability ``exchange`` a sample's two sides change places (random exchange). ``encoder`` is a released
    reader's folder or a timm id with ``encoder_options``; it learns too unless ``freeze_encoder``.
    Places that the edit changes count up to ``change_weight`` times more than the rest. ``start_from`` is the folder of
    a released ``PairToLora`` that training goes on from (the second of the paper's two stages).
    ``network["words"]["vocabulary"]`` may be a JSON file. With ``freeze_words`` the part that finds words stays as it
    is. ``reader`` and ``reading_weight`` are ``BaseModel``'s; ``labels`` of a batch are then those before and after.
    With ``muon`` the words' hidden matrices learn by ``Muon``.
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
        freeze_words: bool = False,
        gradient_checkpointing: bool = False,
        start_from: str | None = None,
        reverse: float = 1.0,
        exchange: float = 0.5,
        instructed: float = 0.0,
        change_weight: float = 4.0,
        timestep_shift: float = 1.0,
        output_l2: float = 1e-4,
        denoising: bool = True,
        telling: float = 0.0,
        reader: str | None = None,
        reading_weight: float = 0.0,
        max_views: int = 4,
        lr: float = 6e-4,
        muon: bool = False,
        card: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not denoising and not telling:
            raise BadRequest("nothing to learn from: denoising is off and telling is 0; give one of them")
        self.save_hyperparameters()
        # a plain attribute in a tuple: the frozen base is no part of the checkpoint
        self._base = (load_base(base, **(base_options or {})),)
        self.texts: Texts = {}
        if start_from is not None:
            self.model = PairToLora.from_pretrained(start_from, base=self.base).requires_grad_(True)
        else:
            component = next(iter(self.base.modules))
            layout = layout_of({component: self.base.denoiser}, preset, rank, self.base.id)
            vision = photo_encoder(encoder, encoder_options)
            self.model = PairToLora(
                vision, ChangeNetwork(layout, vision.width, **_with_vocabulary(network or {})), card
            )
        self.model.encoder.requires_grad_(not freeze_encoder)
        if self.model.network.wording is not None:
            self.model.network.wording.requires_grad_(not freeze_words)
        learn_words(self.model.network, self.base)
        self.misreading = Misreading(reader, reading_weight)
        if gradient_checkpointing:
            self.base.denoiser.enable_gradient_checkpointing()

    @property
    def base(self) -> Any:
        return self._base[0]

    def on_fit_start(self) -> None:
        self.base.pipeline.to(self.device)
        self.misreading.to(self.device)
        learn_words(self.model.network, self.base)  # again: a checkpoint holds those of the base it was trained with

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        self.model.encoder.eval()  # statistics of batch norms stay as they were learned
        n, most = batch["tokens" if "tokens" in batch else "pairs"].shape[:2]
        swapped = torch.rand(n, device=self.device) < self.hparams["exchange"]
        views = int(torch.randint(1, min(most, self.hparams["max_views"]) + 1, ()))
        seen = _exchanged(*self._seen(batch, views), swapped)
        if self.model.network.wording is not None:  # what is usual is learned with words alone, in large batches
            self.model.network.wording.usual.train(not self.hparams["denoising"])
        loss = torch.zeros((), device=self.device)
        if telling := self.hparams["telling"]:
            mistold, _ = self._mistold(batch, swapped, *seen)
            self.log("train/words", told := mistold.mean(), prog_bar=True)
            loss = loss + telling * told
        if self.hparams["denoising"]:
            weights = self.model.from_features(*seen)
            loss = loss + self._through_base(batch, swapped, weights)
            loss = loss + self.hparams["output_l2"] * weights.squared_norm()
        return loss

    def _through_base(self, batch: dict[str, Any], swapped: Tensor, weights: LoraWeights) -> Tensor:
        """Both directions' denoising losses."""
        before, after = self._sides(batch)
        place = swapped.view(-1, 1, 1, 1)
        before, after = torch.where(place, after, before), torch.where(place, before, after)
        shown = (torch.rand(len(swapped)) < self.hparams["instructed"]).tolist()
        words = zip(batch["instructions"], shown, swapped.tolist(), strict=True)
        texts = [w if keep and not s else "" for w, keep, s in words]
        first, second = _labels(batch.get("labels"), swapped)
        loss = self._denoising(weights, before, after, texts, self.misreading.of(second))
        self.log("train/loss", loss, prog_bar=True)
        if self.hparams["reverse"]:
            undone = self._denoising(-weights, after, before, [""] * len(texts), self.misreading.of(first))
            self.log("train/reverse", undone, prog_bar=True)
            loss = loss + self.hparams["reverse"] * undone
        return loss

    def _mistold(
        self, batch: dict[str, Any], swapped: Tensor, before: ImageFeatures, after: ImageFeatures
    ) -> tuple[Tensor, Tensor]:
        """The loss of what is said of each change, and whether it is right, [n]; 0 of the way back where the words for
        it are not known."""
        back = batch.get("undoing")
        ways = zip(batch["instructions"], back or batch["instructions"], swapped.tolist(), strict=True)
        wording = self.model.network.wording
        assert wording is not None
        meant = wording.vocabulary.meant([undo if turned else do for do, undo, turned in ways]).to(self.device)
        said = wording.said(self.model.network.joined(before, after)).float()
        known = torch.ones_like(swapped) if back is not None else ~swapped
        return wording.vocabulary.loss(said, meant) * known, wording.vocabulary.right(said, meant) & known

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        seen = self._seen(batch, 1)
        if self.hparams["telling"]:
            forward = torch.zeros(n := len(batch["instructions"]), dtype=torch.bool, device=self.device)
            mistold, right = self._mistold(batch, forward, *seen)
            self.log("val/words", mistold.mean(), prog_bar=True, batch_size=n)
            self.log("val/said", right.float().mean(), prog_bar=True, batch_size=n)
        if not self.hparams["denoising"]:
            return
        own = self.model.from_features(*seen)
        before, after = self._sides(batch)
        other = own[torch.arange(len(own), device=self.device).roll(1)]
        cases = {
            "base": (own * 0.0, before, after), "own": (own, before, after), "shuffled": (other, before, after),
            "reverse": (-own, after, before),
        }  # fmt: skip
        devices = [self.device] if self.device.type == "cuda" else []
        for name, (weights, shown, wanted) in cases.items():
            with torch.random.fork_rng(devices):
                torch.manual_seed(batch_index)  # the same noise for all, and every time
                loss = self._denoising(weights, shown, wanted, [""] * len(own))
            self.log(f"val/{name}", loss, prog_bar=True, batch_size=len(own), sync_dist=True)

    def _seen(self, batch: dict[str, Any], views: int) -> tuple[ImageFeatures, ImageFeatures]:
        """Of the first ``views`` pairs, the pictures before and after."""
        if "tokens" in batch:
            before, after = batch["tokens"][:, :views].float().unbind(2)
            return ImageFeatures(before), ImageFeatures(after)
        before, after = batch["pairs"][:, :views].unbind(2)
        return self.model.encoder(before), self.model.encoder(after)

    def _sides(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Latents of B and B'."""
        if "before" in batch:
            return batch["before"].float(), batch["after"].float()
        # in float32: bfloat16 would round away the little noise of early timesteps
        before, after = (self.base.encode_images(batch["images"][:, i]).float() for i in (0, 1))
        return before, after

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
                **self.base.encode_prompts(texts, self.texts),
            ).mean()

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            self.model.save_pretrained(self.hparams["out"])

    def configure_optimizers(self) -> dict[str, Any]:
        if not self.hparams["muon"]:
            return adamw_one_cycle(self, self.model.parameters(), self.hparams["lr"])
        hidden = self.model.network.wording.hidden_matrices() if self.model.network.wording else []
        known = {id(parameter) for parameter in hidden}
        others = [parameter for parameter in self.model.parameters() if id(parameter) not in known]
        return muon_one_cycle(self, hidden, others, self.hparams["lr"])


def _with_vocabulary(network: dict[str, Any]) -> dict[str, Any]:
    """``network`` with the vocabulary of its words read, if that is a file. Raises ``BadRequest`` for one that is not
    there or holds something else."""
    words = network.get("words") or {}
    file = words.get("vocabulary")
    if not isinstance(file, str):
        return network
    try:
        vocabulary = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise BadRequest(
            f"vocabulary {file!r} is no JSON file with choices and mixtures of prompts: `python -m data_builder edits` "
            "writes one beside its pictures"
        ) from error
    return network | {"words": words | {"vocabulary": vocabulary}}


def _exchanged(before: ImageFeatures, after: ImageFeatures, swapped: Tensor) -> tuple[ImageFeatures, ImageFeatures]:
    """The samples ``swapped`` [n] with their sides changed."""
    place = swapped.view(-1, 1, 1, 1)
    one, other = before.tokens, after.tokens
    return ImageFeatures(torch.where(place, other, one)), ImageFeatures(torch.where(place, one, other))


Labels = dict[str, Tensor]


def _labels(labels: Sequence[Labels] | None, swapped: Tensor) -> tuple[Labels | None, Labels | None]:
    """Labels before and after, if there are any, the samples ``swapped`` [n] having changed places."""
    if labels is None:
        return None, None
    before, after = labels
    first = {k: torch.where(swapped, after[k], before[k]) for k in before}
    return first, {k: torch.where(swapped, before[k], after[k]) for k in before}
