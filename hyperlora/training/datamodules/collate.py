"""Several subjects as one batch, in the order in which ``injected`` shares LoRAs among samples."""

from typing import Any

import torch


def collate_subjects(items: list[dict[str, Any]]) -> dict[str, Any]:
    """``photos`` [batch, views, 3, h, w] or ``tokens`` [batch, views, tokens, width]; ``captions`` and ``latents`` or
    ``images`` [targets * batch, c, h, w] with target j of subject i at j * batch + i, and of each its ``labels``
    ({attribute: [targets * batch]}) if there are any; ``subject`` [batch]."""
    targets = range(len(items[0]["captions"]))
    batch: dict[str, Any] = {
        "captions": [item["captions"][j] for j in targets for item in items],
        "subject": torch.tensor([item["subject"] for item in items]),
    }
    for name in {"photos", "tokens"} & items[0].keys():
        batch[name] = torch.stack([item[name] for item in items])
    for name in {"latents", "images"} & items[0].keys():
        batch[name] = torch.stack([item[name][j] for j in targets for item in items])
    if "labels" in items[0]:
        labels = [item["labels"][j] for j in targets for item in items]
        batch["labels"] = {k: torch.tensor([of[k] for of in labels]) for k in labels[0]}
    return batch
