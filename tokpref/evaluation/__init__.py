"""Every number by which policies are compared."""

from .sampling import (Samples, encode_prompt, sample, sample_kl, Estimate, estimate, score_samples, expected_reward,
    reward_kl_point, frontier, reward_kl_frontier, reward_at, boltzmann_frontier, best_of_n, preference_table,
    preference_metrics, predictive_entropy, distinct_n, bleu, self_bleu, diversity, WinRate, win_rate,
    length_controlled)

__all__ = ["Samples", "encode_prompt", "sample", "sample_kl", "Estimate", "estimate", "score_samples",
           "expected_reward", "reward_kl_point", "frontier", "reward_kl_frontier", "reward_at", "boltzmann_frontier",
           "best_of_n", "preference_table", "preference_metrics", "predictive_entropy", "distinct_n", "bleu",
           "self_bleu", "diversity", "WinRate", "win_rate", "length_controlled"]
