"""Losses to compare with, sums of losses, and what a loss says that it reads."""

import functools
import math

import pytest
import torch
from torch.testing import assert_close

from tokpref import LOSSES, TokenStats, check_loss
from tokpref.losses.more import MORE_LOSSES
from tokpref.losses.registry import mixes_pairs
from tokpref.losses.sums import parse_sum, sum_name
from tokpref.losses.types import LossSpec, PairLoss

def sides(pairs=5, tokens=6, dtype=torch.float64):
    "Chosen and rejected statistics with padding, and everything that a loss can ask for."
    generator = torch.Generator().manual_seed(0)
    rand = lambda: torch.rand(pairs, tokens, generator=generator, dtype=dtype)
    made = []
    for lengths in ([6, 3, 1, 5, 2], [2, 6, 4, 1, 3]):      # no pair has two of one length
        mask = torch.arange(tokens) < torch.tensor(lengths)[:, None]
        values = [rand().masked_fill(~mask, 0.0) for _ in range(6)]
        made.append(TokenStats(-2 * values[0], -2 * values[1], mask, kl=values[2], baseline=values[3],
                               entropy=values[4], reverse_kl=values[5]))
    return made


def sums(stats): return [stats.log_ratio.sum(-1), stats.logps.sum(-1), stats.lengths]


# As TRL 1.16 computes them (trl/trainer/dpo_trainer.py), from sums over responses

def of_trl(name, chosen, rejected, beta, flip_rate=0.1):
    (w, _, tw), (rejected_ratio, _, tl) = sums(chosen), sums(rejected)
    margin, log_sigma, smoothing = beta * (w - rejected_ratio), torch.nn.functional.logsigmoid, flip_rate
    return {
        "hinge": (1 - margin).relu(),
        "robust": (-(1 - smoothing) * log_sigma(margin) + smoothing * log_sigma(-margin)) / (1 - 2 * smoothing),
        "apo_zero": 1 - torch.sigmoid(beta * w) + torch.sigmoid(beta * rejected_ratio),
        "apo_down": torch.sigmoid(beta * w) + 1 - torch.sigmoid(margin),
        "dpo_norm": -log_sigma(beta * (w / tw - rejected_ratio / tl)),
    }[name]


@pytest.mark.parametrize("name", ["hinge", "robust", "apo_zero", "apo_down", "dpo_norm"])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_losses_that_trl_has_too_are_the_same(name, beta):
    for options in ({}, {"flip_rate": 0.3}) if name == "robust" else ({},):
        assert_close(LOSSES[name](*sides(), beta=beta, **options).losses, of_trl(name, *sides(), beta, **options))


def plain_numbers(name, w, r, beta, penalty=50.0, alpha=1.0):
    "Of one pair in Python numbers; a side is its log-ratio, log-probability, tokens and reverse KL, each a sum."
    (ratio, logp, tokens, kl), (other_ratio, other_logp, other_tokens, other_kl) = w, r
    log_sigma = lambda x: -math.log1p(math.exp(-x))
    sigma = lambda x: 1 / (1 + math.exp(-x))
    mean, other_mean, point = logp / tokens, other_logp / other_tokens, beta * (kl + other_kl) / 2
    odds = lambda log_p: log_p - math.log(1 - math.exp(log_p))
    return {
        "dpop": lambda: -log_sigma(beta * (ratio - other_ratio - penalty * max(0.0, -ratio))),
        "kto_pairs": lambda: 2 - sigma(beta * ratio - point) - sigma(point - beta * other_ratio),
        "orpo": lambda: -mean - beta * log_sigma(odds(mean) - odds(other_mean)),
        "cpo": lambda: -log_sigma(beta * (logp - other_logp)) - alpha * mean,
        "sft": lambda: -mean,
    }[name]()


@pytest.mark.parametrize("name, more", [("dpop", {}), ("dpop", {"penalty": 3.0}), ("kto_pairs", {}), ("orpo", {}),
                                        ("cpo", {}), ("cpo", {"alpha": 0.3}), ("sft", {})])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_other_losses_in_plain_numbers(name, more, beta):
    chosen, rejected = sides()
    numbers = [torch.stack([*sums(side), side.reverse_kl.sum(-1)], 1).tolist() for side in (chosen, rejected)]
    wanted = [plain_numbers(name, w, r, beta, **more) for w, r in zip(*numbers, strict=True)]
    options = {"beta": beta} if "beta" in LOSSES[name].options else {}
    assert_close(LOSSES[name](chosen, rejected, **options, **more).losses, torch.tensor(wanted, dtype=torch.float64))


def test_what_a_pair_is_measured_against_takes_no_gradient():
    chosen, rejected = sides()
    for side in (chosen, rejected): side.logps.requires_grad_(), side.reverse_kl.requires_grad_()
    LOSSES["kto_pairs"](chosen, rejected).losses.sum().backward()
    assert chosen.logps.grad.any() and chosen.reverse_kl.grad is None and rejected.reverse_kl.grad is None


@pytest.mark.parametrize("name", [*MORE_LOSSES, "dpo+0.1*sft", "tdpo1+0.5*kto_pairs"])
def test_gradients_are_those_of_finite_differences(name):
    chosen, rejected = sides()
    given = [x.requires_grad_() for side in (chosen, rejected) for x in (side.logps, side.kl)]

    def losses(chosen_logps, chosen_kl, rejected_logps, rejected_kl):
        new = [TokenStats(logps, side.ref_logps, side.mask, kl=kl, reverse_kl=side.reverse_kl)
               for side, logps, kl in ((chosen, chosen_logps, chosen_kl), (rejected, rejected_logps, rejected_kl))]
        return LOSSES[name](*new).losses
    assert torch.autograd.gradcheck(losses, given)


@pytest.mark.parametrize("name", MORE_LOSSES)
def test_what_a_pair_pays_is_its_own_affair(name):
    assert not mixes_pairs(LOSSES[name])


@pytest.mark.parametrize("name, start", [
    ("dpo_norm", math.log(2)), ("robust", math.log(2)), ("hinge", 1.0), ("apo_zero", 1.0), ("apo_down", 1.0),
    ("kto_pairs", 1.0), ("dpop", math.log(2)),
])
def test_values_where_policy_and_reference_are_one(name, start):
    chosen, rejected = (TokenStats(s.logps, s.logps, s.mask, reverse_kl=torch.zeros_like(s.logps)) for s in sides())
    assert_close(LOSSES[name](chosen, rejected).losses, torch.full((5,), start, dtype=torch.float64))


def test_odds_near_one_stay_finite():
    logps = torch.zeros(1, 3, requires_grad=True)
    sure = TokenStats(logps, None, torch.ones(1, 3).bool())
    unsure = TokenStats(torch.full((1, 3), -5.0), None, torch.ones(1, 3).bool())
    loss = LOSSES["orpo"](sure, unsure).losses.sum()
    loss.backward()
    assert loss.isfinite() and logps.grad.isfinite().all()


@pytest.mark.parametrize("name, options, said", [
    ("robust", {"flip_rate": 0.5}, r"flip_rate must be a number in \[0, 0.5\), got 0.5"),
    ("robust", {"label_smoothing": 0.1}, "option 'label_smoothing' is not used by this loss"),
    ("dpop", {"penalty": -1}, "penalty must be a number in"),
    ("hinge", {"beta": 0}, "beta must be a positive number"),
    ("sft", {"beta": 0.1}, "option 'beta' is not used by this loss"),
    ("dpo+sfd", {}, "unknown loss 'sfd' in 'dpo.sfd'; did you mean 'sft'?"),
    ("dpo+", {}, "'dpo.' is no sum of losses: write it like 'dpo.0.1.sft'"),
    ("dpo+0*sft", {}, "the weight of 'sft' must be a positive number, got 0.0"),
    ("dpo+dpo", {}, "has 'dpo' twice"),
    ("dpo+0.1*sft", {"window": 2}, "option 'window' is not used by this loss"),
])
def test_what_a_loss_cannot_take_is_said(name, options, said):
    with pytest.raises(ValueError, match=said): check_loss(name, options)


# Sums

def test_a_sum_adds_losses_and_gradients():
    parts = [sides(), sides()]
    for pair in parts:
        for side in pair: side.logps.requires_grad_()
    options = {"beta": 0.3, "simpo.beta": 1.5}
    total = LOSSES["dpo + 0.5*simpo + 1e-1*sft"](*parts[0], **options)
    terms = [LOSSES["dpo"](*parts[1], beta=0.3), LOSSES["simpo"](*parts[1], beta=1.5), LOSSES["sft"](*parts[1])]
    assert_close(total.losses, terms[0].losses + 0.5 * terms[1].losses + 0.1 * terms[2].losses)
    (total.mean()).backward(), (terms[0].mean() + 0.5 * terms[1].mean() + 0.1 * terms[2].mean()).backward()
    for ours, theirs in zip(*parts, strict=True): assert_close(ours.logps.grad, theirs.logps.grad)
    assert_close(total.chosen_rewards, terms[0].chosen_rewards)
    for name, term in zip(("dpo", "simpo", "sft"), terms, strict=True):
        assert_close(total.metrics[f"loss/{name}"], term.losses.detach())


def test_a_sum_asks_for_what_its_terms_ask_for():
    fields = "reference", "kl", "baseline", "reverse_kl"
    asks = lambda name: {field for field in fields if getattr(LOSSES[name], field)}
    assert asks("sft+0.5*simpo") == set() and asks("sft+tdpo2") == {"reference", "kl"}
    assert asks("tbpo_q+kto_pairs") == {"reference", "baseline", "reverse_kl"}
    assert LOSSES["dpo+0.1*sft"].defaults() == LOSSES["dpo"].defaults()
    assert LOSSES["dpo+simpo"].defaults()["simpo.beta"] == 2.0 and "beta" not in LOSSES["dpo+simpo"].defaults()
    assert len(LOSSES["dpo+sft"].functions()) == 3


def test_the_options_in_force_are_the_given_ones_and_the_defaults_of_the_others():
    assert LOSSES["dpo"].values({"beta": 0.3}) == LOSSES["dpo"].defaults() | {"beta": 0.3}
    total = LOSSES["dpo+simpo+sft"]
    assert total.values({"beta": 0.3}) == {"beta": 0.3, "gamma": 1.0, **{
        name: value for name, value in LOSSES["dpo"].defaults().items() if name != "beta"}}
    found = total.values({"beta": 0.3, "simpo.beta": 2.5})
    assert (found["dpo.beta"], found["simpo.beta"]) == (0.3, 2.5) and "beta" not in found
    def plain(chosen, rejected, scale): return LOSSES["sft"](chosen, rejected)
    for options in (("beta",), ("scale",)):     # one that the function does not take, and one without a default
        spec = LossSpec(plain, source="here", options=options)
        assert spec.defaults() == {} and spec.values({"scale": 2}) == {"scale": 2}


def test_a_sum_with_a_loss_that_mixes_pairs_mixes_pairs(monkeypatch):
    def centred(chosen, rejected, beta=0.1):
        margin = chosen.log_ratio.sum(-1) - rejected.log_ratio.sum(-1)
        return PairLoss((margin - margin.mean()).square(), margin, -margin)
    monkeypatch.setitem(LOSSES, "centred", LossSpec(centred, source="here"))
    assert mixes_pairs(functools.partial(LOSSES["dpo+centred"], beta=0.5)) and not mixes_pairs(LOSSES["dpo+sft"])


def test_names_of_sums():
    for terms in ({"dpo": 1.0, "sft": 0.1}, {"tdpo2": 2.0}, {"tbpo_a_k3": 1e-7, "dpo": 1.0}):
        assert parse_sum(sum_name(terms)) == terms
    assert "dpo+0.1*sft" in LOSSES and "dpo+0.1*no" not in LOSSES and "dpo++sft" not in LOSSES and 3 not in LOSSES
    for wrong in ({"dpo": -1}, {"dpo": True}, {"dpo": math.nan}, {}):
        with pytest.raises(ValueError): sum_name(wrong)


# What a loss reads

def _looks(chosen, rejected, beta=0.1):
    "A loss that takes what it can get."
    seen = sum(getattr(chosen, name) is not None for name in ("kl", "entropy", "reverse_kl", "baseline"))
    return PairLoss(chosen.logps.sum(-1) * 0 + seen, chosen.logps.sum(-1), rejected.logps.sum(-1))


@pytest.mark.parametrize("asks", [{}, {"entropy": True}, {"entropy": True, "reverse_kl": True}, {"kl": True}])
def test_a_loss_sees_what_it_asks_for_and_nothing_else(asks):
    assert_close(LossSpec(_looks, source="here", **asks)(*sides()).losses, torch.full((5,), float(len(asks))).double())


def _needs_entropy(chosen, rejected, beta=0.1):
    return PairLoss(chosen.need("entropy").sum(-1), chosen.logps.sum(-1), rejected.logps.sum(-1))


def test_a_statistic_that_is_read_and_not_asked_for_is_named(monkeypatch):
    monkeypatch.setitem(LOSSES, "mine", LossSpec(_needs_entropy, source="here"))
    with pytest.raises(ValueError, match="needs TokenStats.entropy: .*entry of LOSSES asks for it with entropy=True"):
        check_loss("mine", {})
    monkeypatch.setitem(LOSSES, "mine", LossSpec(lambda c, r, beta=0.1: c.entropy.sum(-1), source="here"))
    with pytest.raises(ValueError, match="'mine' fails on two made-up rows .*LossSpec which statistics it reads"):
        check_loss("mine", {})
    monkeypatch.setitem(LOSSES, "mine", LossSpec(_needs_entropy, source="here", entropy=True))
    check_loss("mine", {})
    monkeypatch.setitem(LOSSES, "mine", LossSpec(lambda c, r, beta=0.1: c.logps, source="here"))
    with pytest.raises(ValueError, match="'mine' must return a PairLoss"): check_loss("mine", {})


def test_a_metric_has_one_number_a_pair():
    with pytest.raises(ValueError, match="metric 'x' has shape .* one number a pair"):
        PairLoss(torch.zeros(3), torch.zeros(3), torch.zeros(3), {"x": torch.zeros(())})
