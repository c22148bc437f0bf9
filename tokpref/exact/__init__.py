"""Small token MDPs with exact solutions."""

from .optima import (
    backup,
    objective,
    one_step_policy,
    reference_advantage,
    reference_values,
    sequence_optimum,
    soft_policy,
    soft_values,
)
from .population import (
    Fit,
    Forest,
    Pairs,
    fit,
    fit_many,
    join,
    population_loss,
    sequence_pairs,
    table_stats,
    token_pairs,
)
from .tree import (
    TokenTree,
    conditionals,
    edge_mass,
    kl_divergence,
    occupancy,
    occupancy_kl,
    random_tree,
    response_logps,
)

__all__ = ["Fit", "Forest", "Pairs", "TokenTree", "backup", "conditionals", "edge_mass", "fit", "fit_many", "join",
           "kl_divergence", "objective", "occupancy", "occupancy_kl", "one_step_policy", "population_loss",
           "random_tree", "reference_advantage", "reference_values", "response_logps", "sequence_optimum",
           "sequence_pairs", "soft_policy", "soft_values", "table_stats", "token_pairs"]
