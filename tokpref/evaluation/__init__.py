"""Every number by which policies are compared."""

from .divergence import sample_kl
from .diversity import bleu, distinct_n, diversity, predictive_entropy, self_bleu
from .estimate import Estimate, clustered_estimate, estimate
from .frontier import (
    best_of_n,
    boltzmann_frontier,
    expected_reward,
    frontier,
    reward_at,
    reward_kl_frontier,
    reward_kl_point,
    score_samples,
)
from .judging import WinRate, length_controlled, win_rate
from .pairs import preference_metrics, preference_table
from .sampling import Samples, encode_prompt, sample

__all__ = ["Estimate", "estimate", "clustered_estimate", "Samples", "encode_prompt", "sample", "sample_kl",
           "score_samples", "expected_reward", "reward_kl_point", "frontier", "reward_kl_frontier", "reward_at",
           "boltzmann_frontier", "best_of_n", "preference_table", "preference_metrics", "predictive_entropy",
           "distinct_n", "bleu", "self_bleu", "diversity", "WinRate", "win_rate", "length_controlled"]
