"""The loss of a batch."""

from typing import Any

import torch
from torch.nn.functional import cross_entropy, mse_loss

from dual_lora.lab.data.encode import IGNORED


def mean_loss(outputs: Any, labels: torch.Tensor, count: Any = None, smoothing: float = 0.0) -> torch.Tensor:
    """Summed cross-entropy of the labels that count, divided by ``count`` or by their number; of values the squared
    error. A value of NaN is no label.

    smoothing: share of each target that is spread evenly over the vocabulary.
    """
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
    if labels.is_floating_point():
        known = ~labels.isnan()
        total = mse_loss(logits.flatten().float()[known], labels[known], reduction="sum")
        return total / (count if count is not None else known.sum())
    if labels.dim() == 2:
        logits = logits[:, -labels.shape[1] :]  # without those of virtual tokens
        labels = labels[:, labels.shape[1] - logits.shape[1] + 1 :]  # the last positions, shifted by one
        logits = logits[:, :-1]
    total = cross_entropy(
        logits.flatten(0, -2).float(),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=smoothing,
    )
    return total / (count if count is not None else (labels != IGNORED).sum())
