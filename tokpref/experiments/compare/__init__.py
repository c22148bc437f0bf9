"""Every loss from one start."""

from ...precision import autocast
from .baselines import BASELINES, Baseline
from .figures import comparison_figure, equal_kl_figure, history_figure
from .labels import VARIANTS, LossRun, parse_label
from .measure import PathCallback, held_out_metrics, measure
from .problem import Problem, RunConfig, Task
from .profiles import read_profiles
from .record import fingerprint, hardware, merge_records, own_settings, read_json, versions, write_json
from .resolve import resolve_losses, swept
from .run import TASKS, compare, find_task
from .stages import Preparation, Stage, StageWork
from .table import comparison_table, optimal_reward, paired_difference, path_band, read_path, summarise
from .train import run_arguments, threads_for, train_one

__all__ = ["VARIANTS", "BASELINES", "TASKS", "LossRun", "Baseline", "RunConfig", "Problem", "Task", "read_profiles",
           "Preparation", "Stage", "StageWork", "find_task", "resolve_losses", "compare", "merge_records",
           "comparison_table", "summarise", "optimal_reward", "read_path", "path_band", "paired_difference",
           "comparison_figure", "equal_kl_figure", "history_figure"]
