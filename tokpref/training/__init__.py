"""Any loss on your model and your data."""

from .trainer import (BASELINE_FILE, PreferenceConfig, check_loss, check_models, disable_dropout, pair_metrics,
    load_baseline_head, model_card, PreferenceTrainer)

__all__ = ["BASELINE_FILE", "PreferenceConfig", "check_loss", "check_models", "disable_dropout", "pair_metrics",
           "load_baseline_head", "model_card", "PreferenceTrainer"]
