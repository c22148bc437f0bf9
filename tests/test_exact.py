"""What crosses chapters 4 and 8: which optimum each loss finds, on several languages, and what `fit` refuses."""
import pytest
import torch
from torch.testing import assert_close

from tokpref.exact import (
    TokenTree,
    conditionals,
    fit,
    kl_divergence,
    objective,
    occupancy,
    occupancy_kl,
    one_step_policy,
    random_tree,
    reference_advantage,
    response_logps,
    sequence_optimum,
    sequence_pairs,
    soft_policy,
    soft_values,
    table_stats,
    token_pairs,
)
from tokpref.losses import LOSSES

BETA, REACHED, AWAY = 0.5, 1e-8, 1e-3
TREES = [pytest.param(None, seed, id=f"equal-{seed}") for seed in (0, 1, 3)] + [pytest.param(2, 3, id="uneven-3")]


def distances(tree, fitted):
    "Occupancy-weighted KL from π_soft and from π_imp to the fit."
    targets = soft_policy(tree, BETA), one_step_policy(tree, BETA)
    return [abs(occupancy_kl(tree, target, fitted.log_policy).item()) for target in targets]


@pytest.mark.parametrize("end, seed", TREES)
@pytest.mark.parametrize("name, options, finds", [
    ("dpo", {}, "soft"), ("bpo", {}, "soft"), ("adpo", {"segments": 1}, "soft"), ("tdpo1", {}, "imp"),
    ("adpo", {"window": 1}, None), ("tdpo2", {}, None), ("tbpo_a", {}, None),
    ("tbpo_a", {"generator": "logistic"}, None), ("tbpo_q", {}, None), ("ipo", {}, None)])
def test_sequence_labels(end, seed, name, options, finds):
    tree = random_tree(end=end, seed=seed)
    fitted = fit(tree, LOSSES[name], BETA, options)
    to_soft, to_imp = distances(tree, fitted)
    assert fitted.gradient < 1e-11
    assert to_soft < REACHED if finds == "soft" else to_soft > AWAY
    assert to_imp < REACHED if finds == "imp" else to_imp > AWAY


@pytest.mark.parametrize("end, seed", TREES)
@pytest.mark.parametrize("name, options, finds_by_advantage, finds_by_soft_advantage", [
    ("tbpo_a", {}, "imp", None), ("tbpo_a", {"generator": "logistic"}, "imp", None), ("tdpo1", {}, "imp", None),
    ("tbpo_q", {"baseline_clip": None}, "imp", "soft"), ("adpo", {"window": 1}, None, "soft"),
    ("dpo", {}, None, "soft")])
def test_token_labels(end, seed, name, options, finds_by_advantage, finds_by_soft_advantage):
    tree = random_tree(end=end, seed=seed)
    q, v = soft_values(tree, BETA)
    for scores, finds in ((None, finds_by_advantage), (q - v[:, None], finds_by_soft_advantage)):
        to_soft, to_imp = distances(tree, fit(tree, LOSSES[name], BETA, options, token_pairs(tree, scores)))
        assert to_soft < REACHED if finds == "soft" else to_soft > 1e-5     # TBPO-A comes within 1e-4 of π_soft
        assert to_imp < REACHED if finds == "imp" else to_imp > AWAY


def test_one_sample_kl_finds_the_linear_policy():
    tree, beta = random_tree(seed=3), 4.0
    found = fit(tree, LOSSES["tbpo_a_k3"], beta, labels="token").log_policy
    assert_close(found.exp(), tree.ref_logps.exp() * (1 + reference_advantage(tree) / beta), rtol=0, atol=1e-8)


def test_tbpo_q_finds_log_z():
    tree = random_tree(seed=3)
    found = fit(tree, LOSSES["tbpo_q"], BETA, {"baseline_clip": None}, "token")
    log_z = (tree.ref_logps + reference_advantage(tree) / BETA).logsumexp(-1)
    gap = found.baseline - log_z
    for length in range(tree.depth):    # equal up to a constant per position, which no comparison can see
        at = [len(state) == length for state in tree.states]
        assert_close(gap[at], gap[at].mean().expand(sum(at)), rtol=0, atol=1e-7)


@pytest.mark.parametrize("end", [None, 0])
def test_optima_agree_with_brute_force(end):
    tree = random_tree(vocab=4, depth=3, end=end, seed=5)
    log_star, value = sequence_optimum(tree, BETA)
    assert_close(soft_policy(tree, BETA), conditionals(tree, log_star))
    assert_close(objective(tree, soft_policy(tree, BETA), BETA), value)
    imp = one_step_policy(tree, BETA)
    assert_close(reference_advantage(tree), BETA * (imp - tree.ref_logps + kl_divergence(tree.ref_logps, imp)[:, None]))
    between_laws = kl_divergence(response_logps(tree, imp), response_logps(tree, tree.ref_logps))
    assert_close(occupancy_kl(tree, imp, tree.ref_logps), between_laws)
    expected_length = response_logps(tree, imp).exp() @ tree.mask.sum(-1).double()
    assert_close(occupancy(tree, imp).sum(), expected_length)


def test_a_loss_gets_only_the_statistics_it_asks_for():
    tree = random_tree()
    chosen, rejected = table_stats(tree, tree.ref_logps, sequence_pairs(tree), kl=False, reference=False)
    assert chosen.kl is None and rejected.ref_logps is None and len(chosen.logps) == 27 ** 2


def test_a_tree_of_depth_one_is_a_bandit():
    tree = TokenTree(2, 1, rewards=torch.tensor([0.0, 1.0]))
    assert_close(soft_policy(tree, BETA), one_step_policy(tree, BETA))
    assert_close(soft_policy(tree, BETA)[0].exp(), torch.tensor([0.0, 2.0]).double().softmax(-1))


@pytest.mark.parametrize("build, message", [
    (lambda: TokenTree(1, 3), "vocab >= 2"), (lambda: TokenTree(3, 0), "depth >= 1"),
    (lambda: TokenTree(3, 3, end=3), "end must be"), (lambda: TokenTree(10, 9), "too many"),
    (lambda: TokenTree(2, 1, rewards=torch.zeros(3)), "rewards must have shape"),
    (lambda: TokenTree(2, 1, rewards=torch.tensor([0.0, float("nan")])), "rewards must be finite"),
    (lambda: TokenTree(2, 1, ref_logps=torch.zeros(1, 2)), "row 0 of ref_logps"),
    (lambda: soft_policy(random_tree(), 0.0), "beta must be"),
    (lambda: one_step_policy(random_tree(), -1.0), "beta must be"),
    (lambda: fit(random_tree(), LOSSES["dpo"], labels="tokens"), "did you mean 'token'"),
    (lambda: fit(random_tree(), LOSSES["dpo"], options={"window": 1}), "window")])
def test_bad_input_is_refused(build, message):
    with pytest.raises(ValueError, match=message): build()
