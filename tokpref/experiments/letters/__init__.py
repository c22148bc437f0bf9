"""A language of letters, small enough to list every response."""

from .language import ToyConfig, all_prompts, all_strings, string_rewards, to_text, toy_tokenizer
from .start import grammar_strings, pretrain, sample_pairs, toy_reward
from .tree import (
    exact_reference,
    improved_tree,
    mean_kl,
    mean_reward,
    optimal_logps,
    outcome_logps,
    outcome_rewards,
    policy_logps,
    policy_tree,
    toy_policy,
)

__all__ = [
    "ToyConfig", "all_prompts", "all_strings", "exact_reference", "grammar_strings", "improved_tree",
    "mean_kl", "mean_reward", "optimal_logps", "outcome_logps", "outcome_rewards", "policy_logps",
    "policy_tree", "pretrain", "sample_pairs", "string_rewards", "to_text", "toy_policy", "toy_reward",
    "toy_tokenizer",
]
