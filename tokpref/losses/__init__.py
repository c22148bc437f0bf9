"""Every loss of the family, and `LOSSES`, the list of them by name. Nothing here imports transformers."""

from .adpo import adpo_loss
from .bregman import bpo_loss, bregman_risk
from .dpo import dpo_loss, ipo_loss, simpo_loss
from .more import (
    apo_down_loss,
    apo_zero_loss,
    cpo_loss,
    dpo_norm_loss,
    dpop_loss,
    hinge_loss,
    kto_pairs_loss,
    orpo_loss,
    robust_loss,
    sft_loss,
)
from .registry import LOSSES, check_loss
from .tbpo import BaselineHead, tbpo_loss
from .tdpo import tdpo_loss
from .types import LossSpec, PairLoss, TokenStats

__all__ = ["LOSSES", "BaselineHead", "LossSpec", "PairLoss", "TokenStats", "adpo_loss", "apo_down_loss",
           "apo_zero_loss", "bpo_loss", "bregman_risk", "check_loss", "cpo_loss", "dpo_loss", "dpo_norm_loss",
           "dpop_loss", "hinge_loss", "ipo_loss", "kto_pairs_loss", "orpo_loss", "robust_loss", "sft_loss",
           "simpo_loss", "tbpo_loss", "tdpo_loss"]
