"""Who says which of two answers is better, and how far to believe it."""

from .comparisons import bootstrap_interval, comparisons_needed
from .endpoint import BETTER_ANSWER, BETTER_SUMMARY, EndpointJudge, read_verdict
from .length import length_study, single_answers
from .named import open_judge
from .reward_model import RewardJudge
from .verdicts import CachedJudge, longer_is_better, prompt_text, wins, words

__all__ = ["BETTER_ANSWER", "BETTER_SUMMARY", "CachedJudge", "EndpointJudge", "RewardJudge", "bootstrap_interval",
           "comparisons_needed", "length_study", "longer_is_better", "open_judge", "prompt_text", "read_verdict",
           "single_answers", "wins", "words"]
