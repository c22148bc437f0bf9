"""tokpref's own rows of the table, through its public functions only."""
import inspect
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from tokpref import LOSSES, token_stats
from tokpref.engine.one_pass import pair_loss
from tokpref.models import compile_layers

_LABELS = {"dpo": "DPO", "tdpo2": "TDPO2", "tbpo_a": "TBPO-A"}


def _loss(name: str, beta: float, alpha: float) -> partial:
    "An entry of LOSSES with its options set."
    options = {k: v for k, v in {"beta": beta, "alpha": alpha}.items() if k in LOSSES[name].options}
    return partial(LOSSES[name], **options)


def plain(policy: nn.Module, reference: nn.Module, batch: dict, loss: partial) -> Callable[[], Tensor]:
    "token_stats on the padded batch, then the loss: the head at response positions, in chunks, all statistics first."
    return lambda: loss(*token_stats(policy, reference, batch, kl=loss.func.kl)).mean()


def engine(policy: nn.Module, reference: nn.Module, batch: dict, loss: partial, **switches) -> Callable[[], Tensor]:
    "pair_loss with some of its parts switched off."
    return lambda: pair_loss(policy, reference, batch, loss, **switches).loss


def compiled(policy: nn.Module, reference: nn.Module, batch: dict, loss: partial) -> Callable[[], Tensor]:
    "pair_loss on models whose layers are compiled; they stay so."
    for model in (policy, reference): compile_layers(model)
    return engine(policy, reference, batch, loss)


def _variants() -> dict[str, tuple[str, dict]]:
    "name -> (what it is, switches of pair_loss), as far as this tokpref has them."
    has = inspect.signature(pair_loss).parameters
    variants = {"own": ("tokpref {}", {}), "own-entropy": ("tokpref {}, with entropy to log", {"entropy": True}),
                "own-roomy": ("tokpref {}, 256 MiB for scores", {"workspace": 256 * 2**20}),
                "own-recompute": ("tokpref {}, all statistics first", {"one_pass": False}),
                "own-unshared": ("tokpref {}, each prompt twice, padded", {"shared_prompt": False})}
    return {name: (label, switches) for name, (label, switches) in variants.items() if set(switches) <= set(has)}


def contenders(beta: float, alpha: float) -> dict[str, tuple[str, str, Callable]]:
    "name -> (label, family, build); the name ends in the loss."
    rows = {}
    for name, label in _LABELS.items():
        loss = _loss(name, beta, alpha)
        rows[f"own-compiled-{name}"] = f"tokpref {label}, layers compiled", name, partial(compiled, loss=loss)
        rows[f"own-plain-{name}"] = f"tokpref {label}, statistics then loss, padded", name, partial(plain, loss=loss)
        for variant, (words, switches) in _variants().items():
            rows[f"{variant}-{name}"] = words.format(label), name, partial(engine, loss=loss, **switches)
    return rows
