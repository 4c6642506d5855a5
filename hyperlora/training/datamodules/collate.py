"""Several subjects as one batch, in the order in which ``inject_lora`` shares LoRAs among samples."""

from typing import Any

import torch


def collate_subjects(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """``load_photos`` [batch, views, 3, h, w] or ``tokens`` [batch, views, tokens, width]; ``captions`` and ``latents`` or
    ``images`` [targets * batch, c, h, w] with target j of subject i at j * batch + i, and of each its ``labels``
    ({attribute: [targets * batch]}) if there are any; ``subject`` [batch]."""
    target_indices = range(len(samples[0]["captions"]))
    batch: dict[str, Any] = {
        "captions": [item["captions"][j] for j in target_indices for item in samples],
        "subject": torch.tensor([item["subject"] for item in samples]),
    }
    for key in {"photos", "tokens"} & samples[0].keys():
        batch[key] = torch.stack([item[key] for item in samples])
    for key in {"latents", "images"} & samples[0].keys():
        batch[key] = torch.stack([item[key][j] for j in target_indices for item in samples])
    if "labels" in samples[0]:
        sample_labels = [item["labels"][j] for j in target_indices for item in samples]
        batch["labels"] = {
            attribute: torch.tensor([label_dict[attribute] for label_dict in sample_labels])
            for attribute in sample_labels[0]
        }
    return batch
