"""A comparison out of any causal language model and any preference data."""

from .measure import MATCHED, PairMeasure, length_baseline, pair_accuracies
from .pairs import HubConfig, PairData, count_words, hold_out, load_pairs, made_up_pairs
from .prepare import PAIR_STAGES, prepare_pairs, text_rows
from .reading import (
    ENDINGS,
    PAIR_COLUMNS,
    answers_shown,
    measured_runs,
    pair_table,
    results_folder,
    run_heading,
    run_size,
    stored_result,
)
from .start import SFTConfig, StartConfig, accumulation, checkpointing, sft, sft_rows
from .suites import SUITES, run_suites

__all__ = ["ENDINGS", "MATCHED", "PAIR_COLUMNS", "PAIR_STAGES", "SUITES", "HubConfig", "PairData", "PairMeasure",
           "SFTConfig", "StartConfig", "accumulation", "answers_shown", "checkpointing", "count_words", "hold_out",
           "length_baseline", "load_pairs", "made_up_pairs", "measured_runs", "pair_accuracies", "pair_table",
           "prepare_pairs", "results_folder", "run_heading", "run_size", "run_suites", "sft", "sft_rows",
           "stored_result", "text_rows"]
