"""Every loss from one start."""

from .labels import VARIANTS, LossRun, parse_label
from .problem import Problem, RunConfig, Task
from .profiles import read_profiles
from .record import fingerprint, hardware, merge_records, own_settings, read_json, versions, write_json
from .stages import Preparation, Stage, StageWork
from .run import (BASELINES, TASKS, Baseline, swept, resolve_losses,
    find_task, PathCallback, run_arguments, held_out_metrics, autocast, measure, train_one,
    compare, optimal_reward,
    summarise, comparison_table, read_path, path_band, paired_difference, comparison_figure, history_figure)

__all__ = ["VARIANTS", "BASELINES", "TASKS", "LossRun", "Baseline", "RunConfig", "parse_label", "swept",
           "resolve_losses", "Problem", "Task", "read_profiles", "Preparation", "Stage", "StageWork", "find_task", "PathCallback", "run_arguments",
           "held_out_metrics", "autocast", "measure", "train_one", "fingerprint", "own_settings", "write_json",
           "read_json", "versions", "hardware", "compare", "merge_records", "optimal_reward", "summarise",
           "comparison_table", "read_path", "path_band", "paired_difference", "comparison_figure", "history_figure"]
