"""Configuration of contrastive training. Does not import torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from core.errors import check_numbers


class ContrastiveLoss(Enum):
    info_nce = "info_nce"
    """Cross-entropy of a pair's logit among all captions, and among all images; the mean of both (Radford et al. 2021,
    arXiv 2103.00020, figure 3).
    """
    siglip = "siglip"
    """A binary decision for each image and caption whether they are a pair (Zhai et al. 2023, arXiv 2303.15343)."""

    @property
    def first(self) -> FirstLogits:
        """The initial log-scale and bias."""
        match self:
            case ContrastiveLoss.info_nce:
                return FirstLogits(math.log(1 / 0.07), None)
            case ContrastiveLoss.siglip:
                return FirstLogits(math.log(10), -10.0)


@dataclass(frozen=True)
class FirstLogits:
    """Initial values of the parameters that turn cosines into logits. InfoNCE has no bias: it would change no
    softmax.
    """

    log_scale: float
    bias: float | None


@dataclass(frozen=True)
class ContrastiveConfig:
    """Used by training.objective=contrastive."""

    loss: ContrastiveLoss = ContrastiveLoss.info_nce
    feature_size: int = 64
    """Size of the features of images and captions, which are compared."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=("feature_size",))
