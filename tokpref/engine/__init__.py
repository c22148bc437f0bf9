"""From two models and a batch to statistics, losses and gradients."""

from .attention import packed_attention, packed_inputs
from .head import Head, split_head
from .obstacles import engine_obstacles
from .one_pass import BatchLoss, pair_loss, pair_stats
from .packing import Packed, pack_pairs, pack_rows, split_by_tokens
from .reference import add_ref_logps, cached_ref_logps
from .stats import response_stats, split_pairs, token_stats
from .trial import packing_obstacle

__all__ = ["BatchLoss", "Head", "Packed", "add_ref_logps", "cached_ref_logps", "engine_obstacles", "pack_pairs",
           "pack_rows", "packed_attention", "packed_inputs", "packing_obstacle", "pair_loss", "pair_stats",
           "response_stats", "split_by_tokens", "split_head", "split_pairs", "token_stats"]
