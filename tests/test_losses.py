"""What every loss of the list must do with any batch, and each loss against a version of it in plain Python numbers."""
import functools
import math
from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from tokpref.losses import LOSSES, BaselineHead, bregman_risk
from tokpref.losses.batches import check_layout, message_of, padded, random_stats, rows, stats_of, token_lists
from tokpref.losses.bregman import GENERATORS, clamp_limit
from tokpref.losses.dpo import DIVERGENCES
from tokpref.losses.types import TokenStats

OPTIONS = {
    "dpo": [{"f_divergence": name} for name in DIVERGENCES] + [{"label_smoothing": 0.2}],
    "ipo": [{}, {"average": True}],
    "adpo": [{"window": 1}, {"window": 3}, {"segments": 2}],
    "tdpo2": [{}, {"alpha": 2.0}],
    "bpo": [{"generator": name} for name in GENERATORS] + [{"lam": 0.0}, {"lam": -0.9}, {"lam": 3.0, "scale": 2.0}],
    "tbpo_a": [{}, {"generator": "logistic"}, {"lam": 1.2}],
    "tbpo_q": [{}, {"baseline_clip": None}],
}
CASES = [(name, options) for name in LOSSES for options in OPTIONS.get(name, [{}])]
LEAVES = ("logps", "kl", "baseline")


@pytest.fixture
def pair():
    return random_stats([3, 5, 1, 4], seed=1), random_stats([2, 7, 6, 4], seed=2)


@pytest.fixture
def weighted():
    return random_stats([3, 5, 1, 4], seed=1, weights=True), random_stats([2, 7, 6, 4], seed=2, weights=True)


def every_case(test):
    return pytest.mark.parametrize(
        "name, options", CASES, ids=[f"{name} {options}" if options else name for name, options in CASES]
    )(test)


# Any loss

@every_case
def test_the_layout_of_a_batch_does_not_matter(name, options, pair, weighted):
    for sides in (pair, weighted) if name != "simpo" else (pair,):
        check_layout(functools.partial(LOSSES[name], **options), *sides)


@every_case
def test_padding_may_hold_what_is_no_number(name, options, pair):
    def spoilt(stats):
        fields = {key: value for key, value in vars(stats).items() if value is not None and key != "mask"}
        return replace(stats, **{key: value.masked_fill(~stats.mask, math.nan) for key, value in fields.items()})
    plain = LOSSES[name](*pair, **options)
    assert_close(LOSSES[name](*map(spoilt, pair), **options).losses, plain.losses)


@every_case
def test_gradients_are_those_of_finite_differences(name, options, pair):
    inputs = [getattr(side, leaf).clone().requires_grad_() for side in pair for leaf in LEAVES]
    if name == "tdpo2": inputs[1].requires_grad_(False)      # the KL of the chosen response carries no gradient there

    def losses(*values):
        sides = (replace(side, **dict(zip(LEAVES, part, strict=True)))
                 for side, part in zip(pair, (values[:3], values[3:]), strict=True))
        beta = {"beta": 0.3} if "beta" in LOSSES[name].options else {}
        return LOSSES[name](*sides, **beta, **options).losses
    assert gradcheck(losses, inputs, fast_mode=True)


@every_case
def test_far_out_numbers_stay_numbers(name, options):
    for size in (1e3, -1e3):
        wide, none = torch.full((1, 3), 1e3).double(), torch.zeros(1, 3).double()
        far = stats_of([[size] * 3], kl=wide, reverse_kl=wide, baseline=torch.full((1, 3), size).double())
        near = stats_of([[0.0] * 3], kl=none, reverse_kl=none, baseline=none)
        far = replace(far, logps=far.logps.float(), ref_logps=far.ref_logps.float(), kl=far.kl.float())
        logps = far.logps.requires_grad_()
        losses = LOSSES[name](replace(far, logps=logps), near, **options).losses
        slope, = torch.autograd.grad(losses.sum(), logps)
        assert losses.isfinite().all() and slope.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_that_does_not_pair_up_is_refused(name, pair):
    options = OPTIONS.get(name, [{}])[0]
    said = message_of(lambda: LOSSES[name](rows(pair[0], [0]), pair[1], **options))
    assert said == "chosen has 1 rows and rejected 4: row i of both must be one pair"


@pytest.mark.parametrize("name", LOSSES)
def test_what_a_loss_needs_is_asked_for(name, pair):
    spec, options = LOSSES[name], OPTIONS.get(name, [{}])[0]
    asked = (("ref_logps", spec.reference), ("kl", spec.kl), ("baseline", spec.baseline),
             ("entropy", spec.entropy), ("reverse_kl", spec.reverse_kl))
    for field, needed in asked:
        without = [replace(side, **{field: None}) for side in pair]
        call = functools.partial(spec, *without, **options)
        if needed: assert f"TokenStats.{field}" in message_of(call)
        else: assert call().losses.isfinite().all()


@pytest.mark.parametrize("name", [name for name, spec in LOSSES.items() if "beta" in spec.options])
@pytest.mark.parametrize("beta", [0, -1, math.inf, math.nan])
def test_beta_is_a_positive_number(name, beta, pair):
    options = OPTIONS.get(name, [{}])[0]
    assert "beta must be a positive number" in message_of(lambda: LOSSES[name](*pair, **{**options, "beta": beta}))


@pytest.mark.parametrize("name", LOSSES)
def test_a_constant_added_to_all_scores_changes_nothing(name):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 4, 6, 8, generator=generator).double()
    tokens = torch.randint(8, (2, 4, 6), generator=generator)
    shift, ref = torch.randn(2, 4, 6, 1, generator=generator).double(), torch.full((8,), 1 / 8).double()

    def statistics(scores, tokens):
        table = scores.log_softmax(-1)
        logps = table.gather(-1, tokens[..., None])[..., 0]
        return TokenStats(logps, ref.log()[tokens], tokens >= 0, kl=(ref * (ref.log() - table)).sum(-1),
                          reverse_kl=(table.exp() * (table - ref.log())).sum(-1), baseline=torch.zeros_like(logps))
    before, after = (
        LOSSES[name](*map(statistics, x, tokens), **OPTIONS.get(name, [{}])[0]).losses for x in (scores, scores + shift)
    )
    assert_close(before, after)


# DPO, IPO, SimPO

def minus_log_sigmoid(u):
    return math.log(1 + math.exp(-u))


def of_pairs(pair, of_pair, means=False):
    "[B] of a function of the two log-ratios, summed or averaged in Python."
    sums = ([sum(tokens) / (len(tokens) if means else 1) for tokens in token_lists(side)] for side in pair)
    return torch.tensor([of_pair(w, r) for w, r in zip(*sums, strict=True)], dtype=torch.float64)


SLOPES = {
    "reverse_kl": lambda d: d,
    "forward_kl": lambda d: -math.exp(-d),
    "js": lambda d: math.log(2 * math.exp(d) / (1 + math.exp(d))),
    "alpha": lambda d: (math.exp(-0.5 * d) - 1) / -0.5,
}


@pytest.mark.parametrize("divergence", SLOPES)
def test_dpo_in_plain_numbers(divergence, pair, weighted):
    slope = SLOPES[divergence]
    for sides in (pair, weighted):
        wanted = of_pairs(sides, lambda w, r: minus_log_sigmoid(0.1 * (slope(w) - slope(r))))
        assert_close(LOSSES["dpo"](*sides, f_divergence=divergence).losses, wanted)
    smoothed = of_pairs(pair, lambda w, r: 0.8 * minus_log_sigmoid(w - r) + 0.2 * minus_log_sigmoid(r - w))
    assert_close(LOSSES["dpo"](*pair, beta=1.0, label_smoothing=0.2).losses, smoothed)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rewards_are_zero_where_policy_and_reference_agree(divergence):
    same = stats_of([[0.0, 0.0]])
    result = LOSSES["dpo"](same, same, f_divergence=divergence)
    assert result.chosen_rewards == 0 and result.rejected_rewards == 0


def test_ipo_in_plain_numbers(pair, weighted):
    for sides in (pair, weighted):
        for average in (False, True):
            wanted = of_pairs(sides, lambda w, r: (w - r - 2.5) ** 2, means=average)
            assert_close(LOSSES["ipo"](*sides, beta=0.2, average=average).losses, wanted)


def test_simpo_in_plain_numbers(pair):
    bare = [TokenStats(side.logps, torch.zeros_like(side.logps), side.mask) for side in pair]
    wanted = of_pairs(bare, lambda w, r: minus_log_sigmoid(2.5 * (w - r) - 0.3), means=True)
    assert_close(LOSSES["simpo"](*pair, beta=2.5, gamma=0.3).losses, wanted)


@pytest.mark.parametrize("options, said", [
    (dict(label_smoothing=0.5), "label_smoothing must be a number in [0, 0.5), got 0.5"),
    (dict(f_divergence="forward-kl"), "unknown f_divergence 'forward-kl'; did you mean 'forward_kl'?"),
    (dict(alpha=0.3), "alpha=0.3 would be ignored: f_divergence is 'reverse_kl', only 'alpha' reads it"),
    (dict(f_divergence="alpha", alpha=1), "alpha=1 is singular"),
    (dict(f_divergence="alpha", alpha=math.nan), "alpha must be a finite number"),
])
def test_dpo_refuses(options, said, pair):
    assert said in message_of(lambda: LOSSES["dpo"](*pair, **options))


def test_an_average_over_no_token_is_refused(pair, weighted):
    chosen, rejected = pair
    hollow = replace(chosen, mask=chosen.mask & torch.tensor([True, False, True, False])[:, None])
    for name, options in (("ipo", {"average": True}), ("simpo", {})):
        call = functools.partial(LOSSES[name], hollow, rejected, **options)
        assert "rows [1, 3] have no response token" in message_of(call)
    assert "takes no token weights" in message_of(lambda: LOSSES["simpo"](*weighted))
    assert "gamma must be" in message_of(lambda: LOSSES["simpo"](*pair, gamma=-1))


# BPO

WRITTEN = {
    "logistic": lambda z, lam, s: math.log(1 + math.exp(z)),
    "kliep": lambda z, lam, s: math.exp(z) - 1 + z,
    "lsif": lambda z, lam, s: math.exp(2 * z) - 2 * math.exp(-z) + 1,
    "ba": lambda z, lam, s: (lam * math.exp((1 + lam) * z) - (1 + lam) * math.exp(-lam * z) + 1) / lam,
    "sba": lambda z, lam, s: WRITTEN["ba"](z, lam, s) / (s * (1 + lam)),
}


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("lam, scale", [(1.0, 4.0), (-0.9, 4.0), (-0.5, 4.0), (0.7, 4.0), (1.2, 4.0), (3.0, 2.0)])
def test_bpo_in_plain_numbers(generator, lam, scale, pair, weighted):
    options = {key: value for key, value in (("lam", lam), ("scale", scale)) if key in GENERATORS[generator].reads}
    for sides in (pair, weighted):
        wanted = of_pairs(sides, lambda w, r: WRITTEN[generator](0.3 * (r - w), lam, scale))
        assert_close(LOSSES["bpo"](*sides, beta=0.3, generator=generator, **options).losses, wanted)


@pytest.mark.parametrize("options, said", [
    (dict(generator="lsfi"), "unknown generator 'lsfi'; did you mean 'lsif'?"),
    (dict(generator="ba", lam=-1.0), "lam must be a number above -1, got -1.0"),
    (dict(lam=math.nan), "lam must be a number above -1, got nan"),
    (dict(scale=0.0), "scale must be a positive number, got 0.0"),
    (dict(generator="lsif", lam=2.0), "lam=2.0 would be ignored: generator 'lsif' does not read it"),
    (dict(generator="logistic", lam=0.5), "lam=0.5 would be ignored: generator 'logistic' does not read it"),
    (dict(generator="ba", scale=2.0), "scale=2.0 would be ignored: generator 'ba' does not read it"),
])
def test_bpo_refuses(options, said, pair):
    assert said in message_of(lambda: LOSSES["bpo"](*pair, **options))


@pytest.mark.parametrize("generator, lam", [("kliep", 1.0), ("lsif", 1.0), ("ba", 3.0), ("sba", -0.9), ("sba", 0.0),
                                            ("sba", 10.0)])
def test_the_clamp_stops_value_and_gradient(generator, lam):
    limit = clamp_limit(lam)
    far = torch.tensor([-1e4, -limit * 0.9, limit * 0.9, 1e4], requires_grad=True)
    risk = bregman_risk(far, generator, lam)
    slope, = torch.autograd.grad(risk.sum(), far)
    assert risk.isfinite().all() and slope.isfinite().all()
    assert ((slope != 0) == torch.tensor([False, True, True, False])).all()


def test_bpo_widens_half_types(pair):
    z16 = torch.tensor([20.0], dtype=torch.float16)
    assert (2 * z16).exp().isinf().all() and bregman_risk(z16, "lsif").isfinite().all()
    assert_close(bregman_risk(z16.bfloat16(), "lsif"), bregman_risk(z16.float(), "lsif"))
    half = [TokenStats(side.logps.half() * 50, side.ref_logps.half() * 50, side.mask) for side in pair]
    for generator in GENERATORS:
        losses = LOSSES["bpo"](*half, beta=1.0, generator=generator).losses
        assert losses.dtype == torch.float32 and losses.isfinite().all()
    logps, real = torch.zeros(1, 4000).half(), torch.ones(1, 4000, dtype=torch.bool)
    long = TokenStats(logps, torch.full_like(logps, -20.0), real)
    assert long.log_ratio.sum(-1).isinf().all()      # 80000 is past the end of float16
    assert_close(LOSSES["bpo"](long, long).losses, torch.zeros(1))


# The batches themselves

def test_the_checks_of_a_layout_find_what_they_look_for(pair):
    dpo = LOSSES["dpo"]

    def broken(change):
        def loss(chosen, rejected):
            result = dpo(chosen, rejected)
            return replace(result, losses=change(result, chosen))
        return loss
    faults = {
        "reads the padding": lambda result, chosen: result.losses + 1e-6 * chosen.logps.sum(-1),
        "width": lambda result, chosen: result.losses * chosen.mask.shape[1],
        "other pairs": lambda result, chosen: result.losses - result.losses.mean(),
    }
    for fault, change in faults.items():
        with pytest.raises(AssertionError): check_layout(broken(change), *pair)
        assert fault
    with pytest.raises(AssertionError, match="no error was raised"): message_of(lambda: dpo(*pair))


def test_rows_and_columns_of_a_batch(weighted):
    stats = weighted[0]
    wide = padded(stats, 1, 2)
    assert wide.mask.shape == (4, stats.mask.shape[1] + 3) and torch.equal(wide.lengths, stats.lengths)
    assert_close(wide.log_ratio.sum(-1), stats.log_ratio.sum(-1))
    assert wide.logps[0, 0] == 1e4
    assert_close(rows(stats, [2, 0]).kl_terms, stats.kl_terms[[2, 0]])
    assert_close(stats_of([[0.2, -0.1]]).log_ratio, torch.tensor([[0.2, -0.1]]).double())
    assert_close([sum(x) for x in token_lists(stats, "kl_terms")], stats.kl_terms.sum(-1).tolist())


# TDPO

@pytest.mark.parametrize("name, options, weight", [
    ("tdpo1", {}, 1.0), ("tdpo2", {"alpha": 0.0}, 0.0), ("tdpo2", {}, 0.5), ("tdpo2", {"alpha": 2.0}, 2.0)])
def test_tdpo_in_plain_numbers(name, options, weight, pair, weighted):
    for sides in (pair, weighted):
        (dw, dl), (kw, kl) = ([[sum(tokens) for tokens in token_lists(side, field)] for side in sides]
                              for field in ("log_ratio", "kl_terms"))
        numbers = list(zip(dw, dl, kw, kl, strict=True))
        wanted = [minus_log_sigmoid(0.7 * (w - r - weight * (b - a))) for w, r, a, b in numbers]
        found = LOSSES[name](*sides, beta=0.7, **options)
        assert_close(found.losses, torch.tensor(wanted, dtype=torch.float64))
        rewards = torch.tensor([0.7 * (w + a) for w, _, a, _ in numbers], dtype=torch.float64)
        assert_close(found.chosen_rewards, rewards)     # the KL counts once, whatever the version and its alpha


@pytest.mark.parametrize("name, arrives", [("tdpo1", True), ("tdpo2", False)])
def test_only_version_1_pushes_the_chosen_kl(name, arrives, pair):
    sides = [replace(side, kl=side.kl.clone().requires_grad_()) for side in pair]
    LOSSES[name](*sides).mean().backward()
    assert (sides[0].kl.grad is not None) == arrives and sides[1].kl.grad is not None


@pytest.mark.parametrize("call, said", [
    (lambda *pair: LOSSES["tdpo1"].fn(*pair, version=3), "version must be 1 (TDPO1) or 2 (TDPO2), got 3"),
    (lambda *pair: LOSSES["tdpo1"].fn(*pair, alpha=0.3, version=1), "alpha=0.3 would be ignored: TDPO1 has no alpha"),
    (lambda *pair: LOSSES["tdpo2"](*pair, alpha=-1), "alpha must be a number in [0, inf), got -1"),
    (lambda *pair: LOSSES["tdpo1"](*pair, alpha=0.3), "option 'alpha' is not used by this loss"),
])
def test_tdpo_refuses(call, said, pair):
    assert said in message_of(lambda: call(*pair))


# ADPO

def windows(w, r, k):
    longest = max(len(w), len(r))
    w, r = (side + [0.0] * (longest - len(side)) for side in (w, r))
    return [(sum(w[start:start + k]), sum(r[start:start + k])) for start in range(0, longest, k)]


def parts(w, r, m):
    m = min(m, len(w), len(r))
    w, r = ([sum(side[i * len(side) // m:(i + 1) * len(side) // m]) for i in range(m)] for side in (w, r))
    return list(zip(w, r, strict=True))


@pytest.mark.parametrize("option, cut", [("window", windows), ("segments", parts)])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 12])
def test_adpo_in_plain_numbers(option, cut, n, pair, weighted):
    for sides in (pair, weighted):
        units = [cut(w, r, n) for w, r in zip(*map(token_lists, sides), strict=True)]
        wanted = [sum(minus_log_sigmoid(0.7 * (w - r)) for w, r in of_pair) for of_pair in units]
        found = LOSSES["adpo"](*sides, beta=0.7, **{option: n})
        assert_close(found.losses, torch.tensor(wanted, dtype=torch.float64))


def test_parts_are_cut_as_the_formula_says():
    for length in range(1, 25):
        for count in range(1, length + 1):
            cuts = [i * length // count for i in range(count + 1)]
            one = torch.ones(1, length)     # a part of n tokens against nothing has the margin β n
            found = LOSSES["adpo"](stats_of(one), stats_of(0 * one), beta=0.1, segments=count).losses.item()
            margins = [0.1 * (b - a) for a, b in zip(cuts, cuts[1:], strict=False)]
            assert math.isclose(found, sum(map(minus_log_sigmoid, margins)))


@pytest.mark.parametrize("options, said", [
    ({}, "give exactly one of window (tokens per unit) and segments (units per response)"),
    ({"window": 2, "segments": 3}, "got window=2 and segments=3"),
    ({"window": 0}, "window must be a positive whole number, got 0"),
    ({"segments": 2.0}, "segments must be a positive whole number, got 2.0"),
    ({"window": True}, "window must be a positive whole number, got True"),
])
def test_adpo_refuses(options, said, pair):
    assert said in message_of(lambda: LOSSES["adpo"](*pair, **options))


def test_adpo_refuses_an_empty_response(pair):
    chosen, rejected = pair
    empty = replace(chosen, mask=chosen.mask & torch.tensor([True, True, False, True])[:, None])
    assert "rows [2] have no response token" in message_of(lambda: LOSSES["adpo"](empty, rejected, window=4))


# TBPO

RISKS = {
    "logistic": lambda z, lam, s: math.log(1 + math.exp(z)),
    "kliep": lambda z, lam, s: math.exp(z) - 1 + z,
    "lsif": lambda z, lam, s: math.exp(2 * z) - 2 * math.exp(-z) + 1,
    "ba": lambda z, lam, s: (lam * math.exp((1 + lam) * z) - (1 + lam) * math.exp(-lam * z) + 1) / lam,
    "sba": lambda z, lam, s: RISKS["ba"](z, lam, s) / (s * (1 + lam)) if lam else (math.exp(z) - 1 + z) / s,
}
TBPO_RISKS = [("logistic", {}), ("kliep", {}), ("lsif", {}), ("ba", {"lam": 0.7}), ("sba", {}),
              ("sba", {"lam": 1.2, "scale": 2.0})]


def tbpo_in_plain_numbers(sides, b, name, generator, *, lam, scale, clip):
    def weighed(side, t, value):
        return (1.0 if side.weights is None else float(side.weights[b, t])) * value

    def score(side, t):
        rho, kl = float(side.logps[b, t] - side.ref_logps[b, t]), float(side.kl[b, t])
        return weighed(side, t, {"tbpo_a": rho + kl, "tbpo_a_k3": math.expm1(rho), "tbpo_q": rho}[name])
    chosen, rejected = sides
    length = min(int(side.mask[b].sum()) for side in sides)
    gaps = [0.0] * length
    if name == "tbpo_q":
        gaps = [weighed(rejected, t, float(rejected.baseline[b, t])) - weighed(chosen, t, float(chosen.baseline[b, t]))
                for t in range(length)]
        if clip is not None:
            mean = sum(gaps) / length
            gaps = [max(-clip, min(clip, gap - mean)) for gap in gaps]
    margins = [score(rejected, t) - score(chosen, t) + gaps[t] for t in range(length)]
    return sum(RISKS[generator](0.3 * margin, lam, scale) for margin in margins) / length


@pytest.mark.parametrize("name, clip", [("tbpo_a", 10.0), ("tbpo_a_k3", 10.0), ("tbpo_q", 10.0), ("tbpo_q", 0.2),
                                        ("tbpo_q", None)])
@pytest.mark.parametrize("generator, options", TBPO_RISKS)
def test_tbpo_in_plain_numbers(name, clip, generator, options, pair, weighted):
    baseline = {"baseline_clip": clip} if name == "tbpo_q" else {}
    for sides in (pair, weighted):
        found = LOSSES[name](*sides, beta=0.3, generator=generator, **options, **baseline)
        settings = {"lam": options.get("lam", 0.0), "scale": options.get("scale", 4.0), "clip": clip}
        wanted = [tbpo_in_plain_numbers(sides, b, name, generator, **settings) for b in range(len(sides[0].mask))]
        assert_close(found.losses, torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("name, reads", [("tbpo_a", {"logps", "kl"}), ("tbpo_a_k3", {"logps"}),
                                         ("tbpo_q", {"logps", "baseline"})])
def test_tbpo_trains_shared_positions_only(name, reads, pair):
    shared = torch.minimum(*(side.lengths for side in pair))[:, None]
    leaves = [{key: getattr(side, key).clone().requires_grad_() for key in LEAVES} for side in pair]
    LOSSES[name](*(replace(side, **own) for side, own in zip(pair, leaves, strict=True))).losses.sum().backward()
    for own in leaves:
        assert {key for key, leaf in own.items() if leaf.grad is not None} == reads
        for key in reads - {"baseline"}:
            assert torch.equal(own[key].grad != 0, torch.arange(own[key].shape[1]) < shared)


@pytest.mark.parametrize("clip", [10.0, None])
def test_tbpo_q_reads_differences_of_its_baseline_only(clip, pair):
    moved = [replace(side, baseline=side.baseline + 3.0) for side in pair]
    found = [LOSSES["tbpo_q"](*sides, baseline_clip=clip).losses for sides in (pair, moved)]
    assert_close(*found)


def test_tbpo_logs_rewards_of_whole_responses(pair):
    terms = {"tbpo_a": lambda side: side.kl, "tbpo_q": lambda side: 0.0,
             "tbpo_a_k3": lambda side: torch.expm1(side.logps - side.ref_logps) - (side.logps - side.ref_logps)}
    for name, term in terms.items():
        result = LOSSES[name](*pair, beta=0.3)
        for side, rewards in zip(pair, (result.chosen_rewards, result.rejected_rewards), strict=True):
            per_token = (side.logps - side.ref_logps + term(side)).masked_fill(~side.mask, 0)
            assert_close(rewards, 0.3 * per_token.sum(-1))


@pytest.mark.parametrize("name, options, said", [
    ("tbpo_a", {"generator": "sab"}, "unknown generator 'sab'; did you mean 'sba'?"),
    ("tbpo_a", {"lam": -1.0}, "lam must be a number above -1, got -1.0"),
    ("tbpo_a", {"scale": 0.0}, "scale must be a positive number, got 0.0"),
    ("tbpo_q", {"baseline_clip": 0.0}, "baseline_clip must be a positive number, got 0.0"),
    ("tbpo_a", {"generator": "kliep", "lam": 1.0}, "lam=1.0 would be ignored: generator 'kliep' does not read it"),
    ("tbpo_a", {"generator": "ba", "scale": 2.0}, "scale=2.0 would be ignored: generator 'ba' does not read it"),
])
def test_tbpo_refuses(name, options, said, pair):
    assert said in message_of(lambda: LOSSES[name](*pair, **options))


def test_tbpo_refuses_an_option_of_another_variant(pair):
    from tokpref.losses import tbpo_loss
    assert "unknown variant 'b'" in message_of(lambda: tbpo_loss(*pair, variant="b"))
    said = message_of(lambda: tbpo_loss(*pair, variant="a_k3", baseline_clip=5.0))
    assert "baseline_clip=5.0 would be ignored: variant 'a_k3' has no learned baseline" in said


def test_the_baseline_head_starts_at_zero_and_sends_no_gradient_back():
    hidden = torch.randn(2, 3, 8, dtype=torch.bfloat16, requires_grad=True)
    found = BaselineHead(8, width=16)(hidden)
    assert found.dtype == torch.float32 and torch.equal(found, torch.zeros(2, 3))
    assert torch.autograd.grad(found.sum(), hidden, allow_unused=True) == (None,)
    assert isinstance(BaselineHead(8, None).layers, torch.nn.Linear) and BaselineHead(8, 0)(hidden).shape == (2, 3)
    assert BaselineHead(8).bfloat16()(hidden).dtype == torch.float32
    assert BaselineHead(8).double()(hidden).dtype == torch.float64


def test_the_baseline_head_learns_and_keeps_its_precision():
    torch.manual_seed(0)
    head, states = BaselineHead(8, width=16), torch.randn(32, 8)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(100):
        error = (head(states) - states[:, 0]).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    assert error < 0.1 < states[:, 0].square().mean()
    expected = head(states)
    with torch.autocast("cpu", dtype=torch.bfloat16): assert torch.equal(head(states), expected)


def test_tbpo_refuses_a_pair_without_a_shared_position(pair):
    chosen, rejected = pair
    empty = replace(chosen, mask=chosen.mask & torch.tensor([True, True, False, True])[:, None])
    assert "pairs [2] have an empty response" in message_of(lambda: LOSSES["tbpo_a"](empty, rejected))


def test_the_sampled_kl_does_not_overflow():
    far = TokenStats(torch.zeros(1, 1), torch.tensor([[-100.0]]), torch.ones(1, 1, dtype=torch.bool))
    assert torch.expm1(far.log_ratio).isinf().all()
    assert_close(LOSSES["tbpo_a_k3"](far, far).losses, torch.zeros(1))
