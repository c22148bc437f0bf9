"""Preference optimisation of language models, token by token.

Losses need torch alone and are imported at once; what needs transformers is imported when it is first asked for.
"""

from importlib import import_module

from .losses import *
from .losses import __all__ as _losses

__version__ = "0.1.0"

_LAZY = {
    "engine": ["BatchLoss", "pair_loss", "pair_stats", "response_stats", "split_pairs", "token_stats"],
    "data": ["PreferenceCollator", "load_preferences", "load_texts", "prepare"],
    "training": ["PreferenceConfig", "PreferenceTrainer"],
    "evaluation": ["preference_metrics", "sample", "sample_kl"],
    "experiments.compare": ["compare"],
}
_HOME = {name: module for module, names in _LAZY.items() for name in names}
__all__ = [*_losses, *_HOME]


def __getattr__(name: str):
    if name not in _HOME: raise AttributeError(f"module 'tokpref' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *_HOME])
