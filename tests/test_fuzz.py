"""Random numbers, extreme ones among them, against plain formulas in float64: no nan where they have none.

A draw is a batch of features: states and a head, or logits. Logits reach ±1e4, entries of the vocabulary are masked
with −inf, there are two tokens or hundreds, responses of one token beside long ones. `TOKPREF_DRAWS=2000` draws more.
"""
import math
import os
import random
from functools import partial

import pytest
import torch

from tokpref import LOSSES, TokenStats
from tokpref.engine.forward import Features
from tokpref.engine.gradients import scored_twice
from tokpref.engine.head import Head
from tokpref.engine.in_place import Wants
from tokpref.engine.one_pass import PairFeatures, loss_of_features, needs_all_pairs

DRAWS = int(os.environ.get("TOKPREF_DRAWS", 100))
TYPES = {       # largest errors of statistics and losses, and of gradients, whose products are rounded to the type
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-5, 6e-4),
    torch.bfloat16: (1e-5, 0.1),
    torch.float16: (1e-5, 0.02),
}
ALL = Wants(kl=True, reverse_kl=True, entropy=True)


def lengths_of(rng: random.Random, pairs: int) -> list[int]:
    "Lengths of 2B responses: often 1, now and then long."
    return [rng.choice([1, 1, 2, 3, 5, rng.randint(1, 60)]) for _ in range(2 * pairs)]


def made_up(rng: random.Random, dtype: torch.dtype) -> PairFeatures:
    "Features of policy and reference, with a head or without, and tokens that the policy can say."
    torch.manual_seed(rng.randrange(2**31))
    pairs, vocab, width = rng.choice([1, 1, 2, 4]), rng.choice([2, 3, 17, 50, 257]), rng.randint(1, 8)
    lengths = lengths_of(rng, pairs)
    count = sum(lengths)
    size = rng.choice([0.1, 1.0, 10.0, 100.0, 1e4])     # of the largest logits
    banned = torch.rand(vocab) < rng.choice([0, 0, 0.3])
    banned[rng.randrange(vocab)] = False
    bias = torch.zeros(vocab, dtype=dtype).masked_fill(banned, -math.inf) if banned.any() else None
    targets = torch.multinomial((~banned).double(), count, replacement=True)
    def one(with_head: bool) -> Features:
        if not with_head:
            logits = (torch.randn(count, vocab, dtype=torch.float64) * size).clamp(-1e4, 1e4)
            logits = logits.masked_fill(banned, -math.inf)
            return Features(torch.zeros(count, 0), None, logits.to(dtype).requires_grad_())
        hidden = torch.randn(count, width, dtype=torch.float64).to(dtype).requires_grad_()
        weight = (torch.randn(vocab, width, dtype=torch.float64) * size / (3 * width**0.5)).to(dtype).requires_grad_()
        return Features(hidden, Head(weight, bias, rng.choice([1.0, 1.0, 0.25]), rng.choice([None, None, 30.0])))
    with_head = rng.random() < 0.6
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    known = {"baseline": torch.randn(count, dtype=wide)}
    if rng.random() < 0.5: known["weights"] = torch.rand(count, dtype=wide) * (torch.rand(count) < 0.8)
    return PairFeatures(one(with_head), one(with_head), targets, lengths, known)


def plain_logits(features: Features) -> torch.Tensor:
    "[N, V] in float64, from the same numbers; a head in a half type rounds its products as it does everywhere."
    if features.head is None: return features.states.double()
    head = features.head
    if head.weight.dtype in (torch.float32, torch.float64):
        head = Head(head.weight.double(), None if head.bias is None else head.bias.double(), head.scale, head.softcap)
        return head.logits(features.hidden.double())
    return head.logits(features.hidden).double()


def plain_stats(pairs: PairFeatures) -> dict[str, torch.Tensor]:
    "All statistics of N positions by their definitions."
    logps, ref_logps = (plain_logits(f).log_softmax(-1) for f in (pairs.policy, pairs.reference))
    def expected(p, a, b):
        "Σ p (a − b) with 0 · anything = 0, for gradients too."
        there = p > 0
        return (p * (a.masked_fill(~there, 0) - b.masked_fill(~there, 0))).sum(-1)
    p, q = logps.exp(), ref_logps.exp()
    at = pairs.targets[:, None]
    return {"logps": logps.gather(1, at)[:, 0], "ref_logps": ref_logps.gather(1, at)[:, 0].detach(),
            "kl": expected(q.detach(), ref_logps.detach(), logps), "reverse_kl": expected(p, logps, ref_logps).detach(),
            "entropy": -expected(p, logps, torch.zeros_like(logps)).detach()}


def largest_number(pairs: PairFeatures, wanted: dict[str, torch.Tensor]) -> float:
    "Of the logits and log-probabilities that all the rest is made of: what a rounding error is a share of."
    logits = [plain_logits(f).detach() for f in (pairs.policy, pairs.reference)]
    values = [*logits, wanted["logps"].detach(), wanted["ref_logps"]]
    return max(float(x.masked_fill(x.isinf(), 0).abs().max()) for x in values)


def sizes(pairs: PairFeatures) -> list[float]:
    "How large a position's gradients can be: those of probabilities that are 0 or 1 are rounding errors of this."
    head = pairs.policy.head
    return [1.0] if head is None else [float(x.detach().abs().max()) for x in (head.weight, pairs.policy.hidden)]


def gradients(loss: torch.Tensor, pairs: PairFeatures) -> list[torch.Tensor]:
    inputs = [pairs.policy.states] + ([pairs.policy.head.weight] if pairs.policy.head else [])
    found = torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def off(found: torch.Tensor, wanted: torch.Tensor, size: float = 0.0) -> float:
    "The worst error as a share of the largest entry, or of `size`. Infinite where only the reference is finite."
    found, wanted = found.detach().double(), wanted.detach().double()
    there = wanted.isfinite()
    if (found[there].isfinite() != True).any(): return math.inf     # noqa: E712
    if not there.any(): return 0.0
    largest = max(float(wanted[there].abs().max()), size, 1e-30)
    return float((found - wanted)[there].abs().max()) / largest


def report(worst: dict, kind: str) -> None:
    print(f"\n{kind}, {DRAWS} draws a type, worst error as a share of the largest entry")
    for (dtype, what), error in sorted(worst.items(), key=str): print(f"  {str(dtype):16s} {what:12s} {error:.0e}")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_statistics_and_their_gradients(dtype):
    worst: dict = {}
    for seed in range(DRAWS):
        rng = random.Random(seed)
        pairs = made_up(rng, dtype)
        wanted = plain_stats(pairs)
        found = scored_twice(pairs.policy, pairs.reference, pairs.targets, ALL, rng.choice([None, 1, 2, 7]))
        largest = largest_number(pairs, wanted)
        for name in wanted:
            error = off(found[name], wanted[name], largest)
            worst[dtype, name] = max(worst.get((dtype, name), 0), error)
            assert error < TYPES[dtype][0], (seed, name, error)
        slopes = {name: torch.randn(len(pairs.targets), dtype=torch.float64) for name in ("logps", "kl")}
        of = lambda values: sum((values[name].double() * slope).sum() for name, slope in slopes.items())  # noqa: B023
        totals = of(found), of(wanted)
        both = *(gradients(total, pairs) for total in totals), sizes(pairs)
        for i, (a, b, size) in enumerate(zip(*both, strict=True)):
            error = off(a, b, size)
            worst[dtype, f"gradient {i}"] = max(worst.get((dtype, f"gradient {i}"), 0), error)
            rounding = 4 * torch.finfo(torch.float32).eps * largest      # of logits that large, and so of probabilities
            assert error < TYPES[dtype][1] + rounding, (seed, "gradient", i, error)
    report(worst, "statistics")


# Losses, as the engine calls them: in one pass and in two steps

def options_of(rng: random.Random, name: str) -> dict:
    "β from 1e-3 to 1e3; what else the loss reads, at random."
    spec, options = LOSSES[name], {}
    if "beta" in spec.options: options["beta"] = 10 ** rng.uniform(-3, 3)
    if name == "adpo": options["window"] = rng.choice([1, 2, 7])
    if name in ("bpo", "tbpo_q", "tbpo_a", "tbpo_a_k3"):
        options["generator"] = rng.choice(["logistic", "kliep", "lsif", "ba", "sba"])
    return options


WITHOUT_WEIGHTS = {"simpo"}


def plain_values(pairs: PairFeatures) -> dict[str, torch.Tensor]:
    "All that a loss may read, [N] in float64."
    return plain_stats(pairs) | {k: x.double() for k, x in pairs.known.items()}


def plain_loss(name: str, options: dict, pairs: PairFeatures, values: dict[str, torch.Tensor]) -> torch.Tensor:
    "The losses [B] in float64 from plain statistics; rows are cut out one by one."
    rows = [range(sum(pairs.lengths[:i]), sum(pairs.lengths[:i + 1])) for i in range(len(pairs.lengths))]
    def side(first: int) -> TokenStats:
        mine = rows[first::2]
        fill = lambda x: torch.nn.utils.rnn.pad_sequence([x[list(row)] for row in mine], batch_first=True)
        fields = {k: fill(x) for k, x in values.items()}
        return TokenStats(**fields, mask=fill(torch.ones(len(pairs.targets), dtype=torch.bool)))
    return LOSSES[name](side(0), side(1), **options).losses


def too_sure(pairs: PairFeatures, values: dict[str, torch.Tensor]) -> bool:
    "Whether float32 can't tell a response's mean probability from 1: the log-odds end where its numbers do."
    weighted = values["logps"].detach() * values.get("weights", torch.ones(len(values["logps"])))
    return any(float(part.mean()) > -1e-6 for part in weighted.split(pairs.lengths))


def reach_of(name: str, options: dict, pairs: PairFeatures, values: dict[str, torch.Tensor]) -> float:
    "How large the numbers are that a loss adds up, and how large a change of all of them by their size makes it."
    largest = largest_number(pairs, values)
    leaves = {k: x.detach().clone().requires_grad_() for k, x in values.items() if k not in ("weights", "entropy")}
    total = plain_loss(name, options, pairs, {**values, **leaves}).sum()
    slopes = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    steep = sum(float(slope.abs().sum()) for slope in slopes if slope is not None)
    return largest * max(options.get("beta", 1.0) * max(pairs.lengths), steep)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_losses_of_features(dtype):
    worst: dict = {}
    for seed in range(DRAWS):
        rng = random.Random(10_000 + seed)
        pairs, name = made_up(rng, dtype), rng.choice(list(LOSSES))
        options = options_of(rng, name)
        if name in WITHOUT_WEIGHTS: pairs.known.pop("weights", None)
        loss = partial(LOSSES[name], **options)
        wants = Wants(LOSSES[name].kl, LOSSES[name].reverse_kl, LOSSES[name].entropy)
        one_pass = not needs_all_pairs(loss, torch.device("cpu"))
        found = loss_of_features(pairs, loss, wants, one_pass=one_pass, chunk_size=rng.choice([None, 1, 3, 500]))
        values = plain_values(pairs)
        wanted = plain_loss(name, options, pairs, values)
        if not (wanted.isfinite() & (wanted.abs() < 1e30)).all(): continue      # float32 does not reach there
        if name == "orpo" and dtype != torch.float64 and too_sure(pairs, values):
            assert found.pairs.losses.isfinite().all(), (seed, name, options)
            continue
        reach = reach_of(name, options, pairs, values)
        error = off(found.pairs.losses, wanted, reach)
        worst[dtype, name] = max(worst.get((dtype, name), 0), error)
        assert error < TYPES[dtype][0], (seed, name, options, error, found.pairs.losses, wanted)
        ours, theirs = gradients(found.loss, pairs), gradients(wanted.mean(), pairs)
        for i, (a, b, size) in enumerate(zip(ours, theirs, sizes(pairs), strict=True)):
            assert a.isfinite().all() or not b.isfinite().all(), (seed, name, options, "gradient", i)
            if reach > 100: continue        # a saturated sigmoid makes of a rounding error any gradient
            error = off(a, b, size * options.get("beta", 1.0))
            assert error < 2 * TYPES[dtype][1], (seed, name, options, "gradient", i, error)
    report(worst, "losses")
