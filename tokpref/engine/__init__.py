"""From two models and a batch to statistics, losses and gradients."""

from .head import Head, split_head
from .stats import response_stats, split_pairs, token_stats
from .in_place import pick_chunk_size
from .packing import (Packed, pack_rows, pack_pairs, takes_blocks, packed_inputs, split_by_tokens, segment_attention,
    without_ddp, packing_obstacle, takes_segments)
from .one_pass import BatchLoss, pair_loss, pair_stats
from .obstacles import engine_obstacles
from .reference import (add_ref_logps, data_digest, model_digest, cached_ref_logps)

__all__ = ["Head", "pick_chunk_size", "split_head", "response_stats", "split_pairs",
           "token_stats", "Packed", "pack_rows", "pack_pairs", "takes_blocks", "packed_inputs", "split_by_tokens",
           "segment_attention", "without_ddp", "packing_obstacle", "takes_segments", "BatchLoss", "pair_loss",
           "pair_stats", "engine_obstacles", "add_ref_logps", "data_digest", "model_digest", "cached_ref_logps"]
