"""Any loss on your model and your data."""

from ..losses.registry import check_loss
from ..metrics import pair_metrics
from ..models import disable_dropout
from .card import model_card
from .config import PreferenceConfig, from_trl
from .setup import BASELINE_FILE, check_models, load_baseline_head
from .trainer import PreferenceTrainer

__all__ = ["PreferenceConfig", "PreferenceTrainer", "from_trl", "model_card", "load_baseline_head", "BASELINE_FILE",
           "check_models", "check_loss", "disable_dropout", "pair_metrics"]
