"""The older name of `tokpref.experiments.pretrained`."""

from ..models import Precision, autocast, load_model, load_tokenizer, lora, pick_precision
from .judges import wins
from .pretrained import *
from .pretrained import __all__ as _names

__all__ = [*_names, "Precision", "autocast", "load_model", "load_tokenizer", "lora", "pick_precision", "wins"]
