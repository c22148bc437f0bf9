"""Small token MDPs with exact solutions."""

from .tree import (TokenTree, random_tree, response_logps, edge_mass, conditionals, kl_divergence, occupancy,
    occupancy_kl, objective, sequence_optimum, backup, soft_values, soft_policy, reference_values,
    reference_advantage, one_step_policy, Pairs, sequence_pairs, token_pairs, table_stats, population_loss, Fit, fit)

__all__ = ["TokenTree", "random_tree", "response_logps", "edge_mass", "conditionals", "kl_divergence", "occupancy",
           "occupancy_kl", "objective", "sequence_optimum", "backup", "soft_values", "soft_policy",
           "reference_values", "reference_advantage", "one_step_policy", "Pairs", "sequence_pairs", "token_pairs",
           "table_stats", "population_loss", "Fit", "fit"]
