"""Every loss of the family, and `LOSSES`, the list of them by name. Nothing here imports transformers."""

from .types import LOSSES, LossSpec, PairLoss, TokenStats
from .dpo import dpo_loss, ipo_loss, simpo_loss     # the order of the chapters is the order of LOSSES
from .adpo import adpo_loss
from .tdpo import tdpo_loss
from .bregman import bpo_loss, bregman_risk
from .tbpo import BaselineHead, tbpo_loss

__all__ = ["LOSSES", "BaselineHead", "LossSpec", "PairLoss", "TokenStats", "adpo_loss", "bpo_loss", "bregman_risk", "dpo_loss",
           "ipo_loss", "simpo_loss", "tbpo_loss", "tdpo_loss"]
