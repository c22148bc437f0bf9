"""`tokpref` on the command line."""

from .commands import main, run_compare, run_data, run_evaluate, run_train
from .parser import make_parser
from .settings import parse_settings, read_config, read_yaml, train_settings

__all__ = ["main", "make_parser", "run_train", "run_compare", "run_evaluate", "run_data", "train_settings",
           "read_config", "read_yaml", "parse_settings"]
