"""Evaluation against exact sums, against other programs, and against the other modules' idea of the same number."""
import itertools
import math
import os
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from tokpref import LOSSES, TokenStats
from tokpref import evaluation as ev
from tokpref.data import PreferenceCollator, prepare
from tokpref.metrics import pair_metrics

END, VOCAB, LONGEST = 1, 6, 3


def tiny(seed: int) -> LlamaForCausalLM:
    "A Llama over six tokens, in float64, sharp enough that its KLs are not small."
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=0,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture
def pair():
    return tiny(1), tiny(2)


def everything() -> list[list[int]]:
    "All responses of at most three tokens: ended, or cut off."
    body = [token for token in range(VOCAB) if token != END]
    ended = [[*start, END] for n in range(LONGEST) for start in itertools.product(body, repeat=n)]
    return ended + [list(start) for start in itertools.product(body, repeat=LONGEST)]


@torch.no_grad()
def law(model, prompt: list[int], responses: list[list[int]]) -> torch.Tensor:
    "log π(y|x) of each response by the plainest means."
    values = []
    for response in responses:
        logp = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        values.append(sum(logp[len(prompt) - 1 + t, token] for t, token in enumerate(response)))
    return torch.stack(values)


def listed(prompts: list[list[int]], responses: list[list[int]]) -> ev.Samples:
    "Every response to every prompt, prompt by prompt."
    rows = [(i, prompt, response) for i, prompt in enumerate(prompts) for response in responses]
    return ev.Samples(
        [p for _, p, _ in rows],
        [str(r) for _, _, r in rows],
        [p for _, p, _ in rows],
        [r for _, _, r in rows],
        [r[-1] != END for _, _, r in rows],
        [i for i, _, _ in rows],
    )


# KL

def test_kl_estimates_have_the_exact_kl_as_their_mean(pair):
    policy, reference = pair
    prompts, responses = [[3, 4, 2, 5], [2]], everything()[::-1]  # longest first: the engine gets them in another order
    numbers = ev.sample_kl(policy, reference, listed(prompts, responses), batch_size=50, progress=False)
    for i, prompt in enumerate(prompts):
        part = slice(i * len(responses), (i + 1) * len(responses))
        log_p, log_q = law(policy, prompt, responses), law(reference, prompt, responses)
        assert_close(log_p.exp().sum().item(), 1.0)
        exact, exact_forward = log_p.exp() @ (log_p - log_q), log_q.exp() @ (log_q - log_p)
        assert exact > 0.1 and (exact - exact_forward).abs() > 0.01
        assert_close(numbers["log_ratio"][part], log_p - log_q)
        assert_close(log_p.exp() @ numbers["log_ratio"][part], exact)
        assert_close(log_p.exp() @ numbers["kl"][part], exact)
        assert_close(log_q.exp() @ numbers["forward_kl"][part], exact_forward)
        spread = {name: log_p.exp() @ (numbers[name][part] - exact) ** 2 for name in ("kl", "log_ratio")}
        assert spread["kl"] < spread["log_ratio"]


def test_entropy_along_samples_adds_up_to_that_of_the_whole_law(pair):
    policy, _ = pair
    responses = everything()
    log_p = law(policy, [2, 3], responses)
    numbers = ev.sample_kl(policy, policy, listed([[2, 3]], responses), progress=False)
    assert_close(log_p.exp() @ numbers["entropy"], -(log_p.exp() @ log_p))
    assert_close(numbers["length"], torch.tensor([float(len(r)) for r in responses]).double())
    assert numbers["kl"].abs().max() < 1e-12


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_the_batch_a_sample_is_scored_in_changes_nothing(pair, batch_size):
    samples = listed([[2], [3, 4, 2, 5]], [[2, 3, END], [END], [5, 5], [4, END]])
    one, other = (ev.sample_kl(*pair, samples, batch_size=size, progress=False) for size in (2, batch_size))
    for name in one: assert_close(one[name], other[name])


def test_the_reference_of_an_adapter_is_the_model_without_it(model, tokenizer):
    import copy

    from peft import LoraConfig, get_peft_model
    reference = copy.deepcopy(model)
    policy = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False))
    samples = ev.sample(policy, tokenizer, ["abc", "d"], n=2, max_new_tokens=5, progress=False)
    one, other = (ev.sample_kl(policy, ref, samples, progress=False) for ref in (None, reference))
    for name in one: assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)
    assert one["kl"].max() > 0.01 and cast(Any, policy.get_base_model()).generation_config.max_new_tokens is None


def test_samples_that_are_not_the_models_own_are_pointed_out(pair, caplog):
    samples = listed([[2]], [[3, END]])
    ev.sample_kl(*pair, samples, progress=False)
    assert not caplog.records
    samples.top_p = 0.9
    ev.sample_kl(*pair, samples, progress=False)
    assert "top_p 0.9" in caplog.text


# Sampling

def test_no_hidden_top_k(model, tokenizer):
    model.transformer.wte.weight.data.mul_(1e-3)        # tied to the head: all 64 tokens nearly alike
    first = ev.sample(model, tokenizer, ["a"], n=1500, max_new_tokens=1, batch_size=1500, progress=False)
    assert len({ids[0] for ids in first.response_ids}) == 64
    narrow = ev.sample(model, tokenizer, ["a"], n=500, max_new_tokens=1, batch_size=500, top_p=0.5, progress=False)
    assert len({ids[0] for ids in narrow.response_ids}) <= 33


def test_the_same_seed_gives_the_same_samples_and_another_others(model, tokenizer):
    draw = lambda seed: (
        ev.sample(model, tokenizer, ["ab", "c"], n=4, max_new_tokens=8, seed=seed, progress=False).response_ids
    )
    state = torch.random.get_rng_state()
    assert draw(3) == draw(3) != draw(4)
    assert torch.equal(state, torch.random.get_rng_state())


def test_samples_keep_the_end_token_and_say_what_was_cut(model, tokenizer):
    with torch.no_grad(): model.transformer.wte.weight[1] *= 3      # make the end likelier, one way or the other
    samples = ev.sample(model, tokenizer, ["abc", "d", "efghi"], n=60, max_new_tokens=12, progress=False)
    assert any(samples.truncated) and not all(samples.truncated)
    for ids, cut in zip(samples.response_ids, samples.truncated, strict=True):
        assert ids.count(1) == (0 if cut else 1) and (len(ids) == 12 if cut else ids[-1] == 1)
    assert [len(group) for group in samples.groups()] == [60, 60, 60] and samples.prompts[60] == "d"
    assert not any("<end>" in text for text in samples.responses)


@pytest.mark.parametrize("ends", [7, [1, 7], [7, 9]])
def test_a_response_ends_where_the_generation_config_ends_a_turn(model, tokenizer, ends):
    draw = lambda: ev.sample(model, tokenizer, ["abc", "d"], n=100, max_new_tokens=16, progress=False)
    assert any(7 in ids[:-1] for ids in draw().response_ids), "without it, samples run on past token 7"
    model.generation_config.eos_token_id = ends
    samples, known = draw(), {1, 7} | set(ends if isinstance(ends, list) else [ends])
    for ids, cut in zip(samples.response_ids, samples.truncated, strict=True):
        assert not known & set(ids[:-1]) and cut == (ids[-1] not in known) and (len(ids) == 16 or not cut)
    assert any(ids[-1] == 7 for ids in samples.response_ids) and model.generation_config.eos_token_id == ends


def test_left_padding_changes_no_greedy_response(model, tokenizer):
    prompts = ["a", "abcdefgh", "zz", "hello there"]
    together = ev.sample(model, tokenizer, prompts, temperature=0, max_new_tokens=6, progress=False)
    alone = [
        ev.sample(model, tokenizer, [prompt], temperature=0, max_new_tokens=6, progress=False).response_ids[0]
        for prompt in prompts
    ]
    assert together.response_ids == alone


def test_what_was_borrowed_is_given_back_even_after_an_error(model, tokenizer, monkeypatch):
    model.train()
    own = model.generation_config
    monkeypatch.setattr(model, "generate", lambda **_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError): ev.sample(model, tokenizer, ["a"], progress=False)
    assert model.training and model.generation_config is own


def test_prompts_are_tokenised_as_in_training(tokenizer):
    rows = Dataset.from_list([{"prompt": "ab c", "chosen": "yes", "rejected": "no"}])
    assert ev.encode_prompt("ab c", tokenizer) == prepare(rows, tokenizer)[0][0]["prompt_ids"]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    try:
        say = lambda role, content: {"role": role, "content": content}
        chat = {
            "prompt": [say("user", "hi")],
            "chosen": [say("assistant", "yes")],
            "rejected": [say("assistant", "no")],
        }
        expected = prepare(Dataset.from_list([chat]), tokenizer)[0][0]["prompt_ids"]
        assert (
            ev.encode_prompt(chat["prompt"], tokenizer)
            == expected
            == tokenizer("u:hia:", add_special_tokens=False)["input_ids"]
        )
    finally: tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        ev.encode_prompt([{"role": "user", "content": "hi"}], tokenizer)


def test_template_arguments_of_training_reach_the_samples(model, tokenizer, monkeypatch):
    template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '' if think else 'no thinking ' }}a:{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    prompt, more = [{"role": "user", "content": "hi"}], {"think": True}
    drawn = ev.sample(model, tokenizer, [prompt], max_new_tokens=2, progress=False, chat_template_kwargs=more)
    assert (
        drawn.prompt_ids[0]
        == ev.encode_prompt(prompt, tokenizer, more)
        == tokenizer("u:hia:", add_special_tokens=False)["input_ids"]
    )
    assert len(ev.encode_prompt(prompt, tokenizer)) > len(drawn.prompt_ids[0])
    for bare in ("hi", [3, 4]):
        with pytest.raises(ValueError, match="chat_template_kwargs=.* would be ignored"):
            ev.sample(model, tokenizer, [bare], chat_template_kwargs=more)


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(prompts=[]), "list of prompts is empty"),
        (dict(prompts=["a", ""]), "prompt 1 is empty"),
        (dict(prompts=["a", []]), "prompt 1 is empty"),
        (dict(n=0), "n must be at least 1"),
        (dict(max_new_tokens=0), "max_new_tokens must be"),
        (dict(temperature=-1), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(top_p=1.5), "top_p"),
        (dict(batch_size=0), "batch_size"),
        (dict(temperature=0, n=2), "set n=1"),
        (dict(max_new_tokens=500), "128 positions"),
    ],
)
def test_sampling_settings_that_cannot_be_meant(model, tokenizer, bad, message):
    with pytest.raises(ValueError, match=message):
        ev.sample(model, tokenizer, **{"prompts": ["a"], "progress": False, **bad})


def test_samples_must_fit_together():
    with pytest.raises(ValueError, match="differ in length"): ev.Samples(["a"], ["b"], [[1]], [[2]], [False], [0, 1])
    with pytest.raises(ValueError, match="there are none"): ev.Samples([], [], [], [], [], [])
    with pytest.raises(ValueError, match="sample 0 has no prompt tokens or no response"):
        ev.Samples(["a"], [""], [[1]], [[]], [True], [0])


# Preference data

ROWS = [dict(prompt_ids=[4, 5], chosen_ids=[6, 7, 8, 1], rejected_ids=[9, 1], row=0),
        dict(prompt_ids=[4], chosen_ids=[10, 1], rejected_ids=[11, 12, 13, 1], row=1),
        dict(prompt_ids=[4, 4, 4], chosen_ids=[7, 1], rejected_ids=[8, 1], row=2)]
OPTIONS = {"adpo": {"segments": 2}}


@pytest.fixture
def reference():
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(2)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=128, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=1)
    ).eval()


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "adpo", "tdpo1", "tdpo2", "bpo", "tbpo_a", "tbpo_a_k3"])
def test_implicit_rewards_are_the_same_whatever_the_loss(model, reference, loss):
    metrics = ev.preference_metrics(
        model, reference, ROWS, PreferenceCollator(0), loss, 0.2, OPTIONS.get(loss), batch_size=2, progress=False
    )
    gaps = [
        law(m, row["prompt_ids"], [row["chosen_ids"]]) - law(m, row["prompt_ids"], [row["rejected_ids"]])
        for m in (model, reference)
        for row in ROWS
    ]
    margins = torch.cat(gaps[:3]) - torch.cat(gaps[3:])
    assert_close(metrics["implicit/margins"], 0.2 * margins.mean().item(), rtol=1e-4, atol=1e-6)
    assert metrics["implicit/accuracies"] == pytest.approx((margins > 0).double().mean().item())
    assert metrics["length/accuracies"] == pytest.approx(1 / 3) and metrics["pairs"] == 3
    assert all(math.isfinite(value) for value in metrics.values())


def test_metrics_equal_those_of_the_trainers_evaluation(model, reference, tokenizer, tmp_path):
    from tokpref.training import PreferenceConfig, PreferenceTrainer
    rows = Dataset.from_list([{k: v for k, v in row.items() if k != "row"} for row in ROWS] * 3)
    args = PreferenceConfig(
        output_dir=str(tmp_path), loss="tdpo2", beta=0.3, per_device_eval_batch_size=4, report_to=[], disable_tqdm=True
    )
    trainer = PreferenceTrainer(
        model=model, args=args, ref_model=reference, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )
    logged = trainer.evaluate()
    metrics = ev.preference_metrics(model, reference, list(rows), PreferenceCollator(0), "tdpo2", 0.3, progress=False)
    shared = [name for name in metrics if f"eval_{name}" in logged]
    assert len(shared) >= 11
    for name in shared: assert logged[f"eval_{name}"] == pytest.approx(metrics[name], rel=1e-4, abs=1e-5), name


def test_a_table_row_is_a_pair(model, reference):
    table = ev.preference_table(model, reference, ROWS, PreferenceCollator(0), batch_size=2, progress=False)
    alone = [ev.preference_table(model, reference, [row], PreferenceCollator(0), progress=False) for row in ROWS]
    for name in table: assert_close(table[name], torch.cat([one[name] for one in alone]), rtol=1e-4, atol=1e-5)


def test_columns_of_the_training_change_no_measured_log_ratio(model, reference):
    "Token weights belong to the loss, and log-probabilities that were kept may be those of another reference."
    more = [dict(row, **{f"{side}_{what}": [3.0] * len(row[f"{side}_ids"]) for side in ("chosen", "rejected")
                         for what in ("weights", "ref_logps")}) for row in ROWS]
    plain, given = (ev.preference_table(model, reference, rows, PreferenceCollator(0), progress=False)
                    for rows in (ROWS, more))
    for name in [name for name in plain if name.startswith("implicit")]: assert_close(given[name], plain[name])
    assert_close(given["rewards/margins"], 3 * plain["rewards/margins"])
    assert_close(plain["reverse_kl/margin"], plain["reverse_kl/chosen"] - plain["reverse_kl/rejected"])
    assert plain["reverse_kl/margin"].abs().max() > 1e-2


def test_a_baseline_head_is_asked_for_and_used(model, reference):
    from tokpref.losses import BaselineHead

    call = lambda loss, **more: ev.preference_metrics(
        model, reference, ROWS, PreferenceCollator(0), loss, progress=False, **more
    )
    with pytest.raises(ValueError, match="pass baseline="): call("tbpo_q")
    with pytest.raises(ValueError, match="has no baseline"): call("dpo", baseline=BaselineHead(32, 4))
    head = BaselineHead(32, 4)
    zero = call("tbpo_q", baseline=head)["loss"]
    torch.nn.init.normal_(head.layers[-1].weight)
    assert call("tbpo_q", baseline=head)["loss"] != zero


def test_a_policy_on_its_reference_is_never_right(model):
    metrics = ev.preference_metrics(model, model, ROWS, PreferenceCollator(0), progress=False)
    assert (
        metrics["implicit/accuracies"] == 0
        and metrics["loss"] == pytest.approx(math.log(2))
        and abs(metrics["kl/chosen"]) < 1e-5
    )


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(dataset=[]), "empty"),
        (dict(loss="ddpo"), "did you mean 'dpo'"),
        (dict(beta=0.0), "beta"),
        (dict(loss_options={"alpha2": 1}), "alpha2"),
        (dict(ref_model=None), "needs the reference"),
    ],
)
def test_metrics_that_cannot_be_had(model, reference, bad, message):
    args = {
        "model": model,
        "ref_model": reference,
        "dataset": ROWS,
        "collator": PreferenceCollator(0),
        "progress": False,
        **bad,
    }
    with pytest.raises(ValueError, match=message): ev.preference_metrics(**args)


# Rewards and frontiers

def test_the_error_is_over_prompts():
    values = torch.tensor([1.0, 1.0, 1.0, 5.0, 5.0, 5.0])
    assert ev.estimate(values, [[0, 1, 2], [3, 4, 5]]).se == pytest.approx(2.0)
    assert ev.estimate(values).se < 1.0 and math.isnan(ev.estimate(values[:1]).se)


def test_a_clustered_error_has_its_two_limits():
    x = torch.randn(24, generator=torch.Generator().manual_seed(0))
    by_value, by_four = ev.clustered_estimate(x, range(24)), ev.clustered_estimate(x, [i % 6 for i in range(24)])
    assert by_value.se == pytest.approx(ev.estimate(x).se) and by_value.value == pytest.approx(
        x.mean().item(), abs=1e-6
    )
    assert by_four.se == pytest.approx(ev.estimate(x, [list(range(i, 24, 6)) for i in range(6)]).se) and by_four.n == 6
    doubled = ev.clustered_estimate(torch.cat([x, x]), [*range(24), *range(24)])
    assert doubled.se == pytest.approx(by_value.se), "every value twice is no more evidence"
    assert ev.clustered_estimate(x, ["one"] * 24).se == pytest.approx(by_value.se)
    for values, clusters in ((x[:0], []), (x, range(23))):
        with pytest.raises(ValueError, match="clustered_estimate"): ev.clustered_estimate(values, clusters)


@pytest.mark.parametrize(
    "name, clustered, naive", [("alpaca_eval-preferences", 0.0162, 0.0089), ("gsm8k-preferences", 0.0246, 0.0165)]
)
def test_clustered_errors_of_real_pairs(name, clustered, naive):
    "The rule that the longer response is better, in words, a tie for one half."
    file = Path(os.environ.get("TOKPREF_DATA", "no data")) / name / "test.parquet"
    if not file.exists(): pytest.skip("TOKPREF_DATA does not name these pairs")
    rows = Dataset.from_parquet(str(file), cache_dir=None, keep_in_memory=True)
    words = [[len(text.split()) for text in rows[side]] for side in ("chosen", "rejected")]
    right = ((torch.tensor(words[0]) - torch.tensor(words[1])).sign() + 1) / 2
    assert ev.clustered_estimate(right, rows["prompt"]).se == pytest.approx(clustered, abs=6e-5)
    assert ev.estimate(right).se == pytest.approx(naive, abs=6e-5)


def test_a_win_rate_is_clustered_by_prompt():
    longer = lambda prompts, first, second: [float(len(a) > len(b)) for a, b in zip(first, second, strict=True)]
    chat = [{"role": "user", "content": "q"}]
    candidates, references = ["aa", "aa", "aa", "b"], ["b", "b", "b", "aa"]
    once = ev.win_rate(candidates, references, ["p", "q", "r", "s"], longer)
    shared = ev.win_rate(candidates, references, ["p", "p", "p", chat], longer)
    assert once.rate.value == shared.rate.value == 0.75 and shared.rate.n == 2
    assert once.rate.se == pytest.approx(0.25) and shared.rate.se == pytest.approx(0.375)


@pytest.mark.parametrize(
    "rewards, message", [([1.0], "shape"), ([[1.0], [2.0]], "shape"), ([1.0, float("inf")], "sample 1")]
)
def test_rewards_are_checked(rewards, message):
    with pytest.raises(ValueError, match=message):
        ev.expected_reward(listed([[2]], [[3, END], [END]]), lambda prompts, responses: rewards)


def test_the_boltzmann_frontier_is_exact_when_the_samples_are_the_law():
    rewards = torch.tensor([[0.0, 1.0, 3.0, -2.0], [0.5, 0.5, 0.5, 9.0]]).double()
    uniform = torch.distributions.Categorical(probs=torch.ones(4).double())
    for point in ev.boltzmann_frontier(rewards, (5.0, 1.0, 0.1)):
        best = [torch.distributions.Categorical(logits=row / point["beta"]) for row in rewards]
        assert point["kl"] == pytest.approx(sum(torch.distributions.kl_divergence(b, uniform).item() for b in best) / 2)
        values = [(b.probs * row).sum().item() for b, row in zip(best, rewards, strict=True)]
        assert point["reward"] == pytest.approx(sum(values) / 2)
    curve = ev.boltzmann_frontier(rewards)
    assert [p["reward"] for p in curve] == sorted(p["reward"] for p in curve)
    extreme = ev.boltzmann_frontier(rewards, (1e-4,))[0]
    assert (
        extreme["reward"] == pytest.approx(6.0)
        and extreme["kl"] == pytest.approx(math.log(4))
        and extreme["ess"] == pytest.approx(1.0)
    )


def test_normal_rewards_give_the_square_root_law():
    rewards = torch.randn(20, 4000, generator=torch.Generator().manual_seed(0)).double()
    for point in ev.boltzmann_frontier(rewards, (4.0, 2.0, 1.0)):
        assert point["reward"] == pytest.approx(math.sqrt(2 * point["kl"]), rel=0.03)


@pytest.mark.parametrize(
    "rewards, betas",
    [
        (torch.ones(3), (1.0,)),
        (torch.ones(2, 1), (1.0,)),
        (torch.ones(0, 3), (1.0,)),
        (torch.full((1, 2), math.nan), (1.0,)),
        (torch.ones(1, 2), (0.0,)),
    ],
)
def test_boltzmann_frontier_refuses(rewards, betas):
    with pytest.raises(ValueError): ev.boltzmann_frontier(rewards, betas)


def test_best_of_n_against_every_subset_and_its_kl_bound():
    rewards = torch.tensor([[3.0, 1.0, 4.0, 1.0, 5.0], [0.0, 0.0, 0.0, 2.0, 2.0]])
    for point in ev.best_of_n(rewards, [1, 2, 3, 4, 5]):
        means = [
            sum(max(c) for c in itertools.combinations(row, point["n"])) / math.comb(5, point["n"])
            for row in rewards.tolist()
        ]
        assert point["reward"] == pytest.approx(sum(means) / 2)
    n, size = 3, 4000       # best of n of many distinct rewards has the KL of the bound
    best = torch.tensor([((i + 1) / size) ** n - (i / size) ** n for i in range(size)]).double()
    assert (best * (best * size).log()).sum().item() == pytest.approx(
        ev.best_of_n(torch.rand(1, 5), [n])[0]["kl_bound"], abs=1e-3
    )
    with pytest.raises(ValueError, match="n=6"): ev.best_of_n(rewards, [6])


def test_frontier_against_its_definition():
    draw = torch.rand(60, 2, generator=torch.Generator().manual_seed(0)).mul(8).round().tolist()
    points = [{"kl": k, "reward": r, "loss": "dpo"} for k, r in draw]
    edge = [(p["kl"], p["reward"]) for p in ev.frontier(points)]
    undominated = {
        (k, r) for k, r in map(tuple, draw) if not any((k2 <= k and r2 >= r) and (k2, r2) != (k, r) for k2, r2 in draw)
    }
    assert edge == sorted(undominated)
    for k in (0.5, 3.0, 8.0):
        assert ev.reward_at(points, k) == ev.reward_at(ev.frontier(points), k) == max(r for k2, r in draw if k2 <= k)
    for bad in ([], [{"kl": math.nan, "reward": 1.0}]):
        with pytest.raises(ValueError): ev.frontier(bad)


# Diversity

@pytest.mark.parametrize(
    "text, references, score",
    [  # sacrebleu 2.6.0: sentence_bleu(text, references, tokenize="none").score / 100
        ("the cat sat on the mat", ["the cat is on the mat"], 0.3799178428257963),
        (
            "it is a guide to action which ensures that the military always obeys the commands of the party",
            [
                "it is a guide to action that ensures that the military will forever heed party commands",
                "it is the guiding principle which guarantees the military forces "
                "always being under the command of the party",
                "it is the practical guide for the army always to heed the directions of the party",
            ],
            0.5045666840058485,
        ),
        ("a quiet film", ["a quiet film about nothing at all"], 0.2635971381157268),
        ("one two three four", ["five six three seven eight"], 0.1244023474812678),
        ("a b c d e f g", ["a b x d e y g", "c d e f g h i j"], 0.7071067811865478),
        ("good", ["good movie"], 0.3678794411714425),
        ("x y", ["a b"], 0.0),
    ],
)
def test_bleu_is_sacrebleus(text, references, score):
    assert ev.bleu(text, references) == pytest.approx(score, rel=1e-12)


def test_self_bleu_in_both_forms():
    texts = ["the cat sat on the mat", "the cat is on the mat", "a dog"]
    assert ev.self_bleu(texts) == pytest.approx(sum(ev.bleu(t, [o for o in texts if o != t]) for t in texts) / 3)
    assert ev.self_bleu(texts, pairs=True) == pytest.approx(
        sum(ev.bleu(a, [b]) for a in texts for b in texts if a != b) / 6
    )
    assert ev.self_bleu(["same text here ok", "same text here ok"], pairs=True) == pytest.approx(1.0)
    assert ev.self_bleu(["", ""]) == 0.0
    with pytest.raises(ValueError, match="two texts"): ev.self_bleu(["one"])


def test_distinct_n():
    assert ev.distinct_n(["A b, a"], 1) == 3 / 4 and ev.distinct_n([[1, 2, 1, 2]], 2) == 2 / 3
    for bad in (([], 1), (["a"], 0), (["a"], 2), ([""], 1)):
        with pytest.raises(ValueError): ev.distinct_n(*bad)


# Judges

def test_a_judge_that_looks_at_the_order_decides_nothing():
    result = ev.win_rate(["x"] * 4, ["y"] * 4, ["p"] * 4, lambda prompts, first, second: [1] * len(prompts))
    assert (
        result.rate.value == 0.5 and result.consistent == 0 and result.scores == [0.5] * 4 and result.first.value == 1
    )


def test_win_rate_of_a_fair_judge():
    longer = lambda prompts, first, second: [
        0.5 if len(a) == len(b) else float(len(a) > len(b)) for a, b in zip(first, second, strict=True)
    ]
    result = ev.win_rate(["aaa", "a", "aa", "aaaa"], ["b", "bbb", "bb", "b"], list("pqrs"), longer)
    assert (
        result.scores == [1.0, 0.0, 0.5, 1.0] and result.consistent == 1.0 and result.rate.n == 4 and result.unread == 0
    )
    assert (
        result.rate.se == pytest.approx(torch.tensor(result.scores).double().std().item() / 2)
        and result.first.value == 0.5
    )


def test_a_pair_without_a_readable_answer_in_one_order_is_left_out():
    said = [1, None, 0.8, 0, 1, 0.4]      # p, q, r with the candidate first, then with the reference first
    result = ev.win_rate(list("abc"), list("xyz"), list("pqr"), lambda prompts, first, second: said)
    assert (
        result.unread == 1
        and result.rate.n == 2
        and result.rate.value == pytest.approx((1 + 0.7) / 2)
        and result.consistent == 1
    )
    assert math.isnan(result.scores[1]) and result.first.value == pytest.approx((0.5 + 0.6) / 2)
    assert ev.length_controlled(result.scores, [0.0, 5.0, 0.0], ridge=1e-9) == pytest.approx(
        result.rate.value, abs=1e-6
    )


@pytest.mark.parametrize(
    "candidates, references, judge, message",
    [
        ([], [], None, "not empty"),
        (["a"], ["b", "c"], None, "one length"),
        (["a"], ["b"], lambda *_: ["A", 1], "judge said 'A'"),
        (["a"], ["b"], lambda *_: [1.7, 0], "judge said 1.7"),
        (["a"], ["b"], lambda *_: [1], "1 verdicts for 2"),
        (["a"], ["b"], lambda *_: [None, 1], "no readable answer"),
    ],
)
def test_win_rate_refuses(candidates, references, judge, message):
    with pytest.raises(ValueError, match=message): ev.win_rate(candidates, references, ["p"] * len(candidates), judge)


def test_length_control_finds_the_rate_at_equal_lengths():
    d = torch.linspace(-3, 9, 200).double()
    odds = 0.8 + 2 * torch.tanh(d / d.square().mean().sqrt())
    assert ev.length_controlled(torch.sigmoid(odds).tolist(), d.tolist(), ridge=0) == pytest.approx(
        torch.sigmoid(torch.tensor(0.8)).item(), abs=1e-6
    )
    assert ev.length_controlled([1.0, 1.0, 0.0], [0.0, 0.0, 0.0], ridge=1e-9) == pytest.approx(2 / 3, abs=1e-6)
    for scores in ([1.0], [1.0, math.nan], [math.nan, math.nan]):
        with pytest.raises(ValueError, match="two or more pairs with a readable verdict"):
            ev.length_controlled(scores, [2.0] * len(scores))
    with pytest.raises(ValueError, match="2 scores and 1 differences"): ev.length_controlled([1.0, 0.0], [2.0])


# The examples that the pages and docstrings show

@pytest.mark.parametrize("room", ["estimate", "frontier", "diversity", "judging"])
def test_examples_in_docstrings_are_true(room):
    import doctest
    import importlib
    result = doctest.testmod(importlib.import_module(f"tokpref.evaluation.{room}"))
    assert result.attempted > 0 and result.failed == 0


def test_entropy_is_a_mean_over_the_tokens_of_both_responses():
    def side(entropy):
        zeros = torch.zeros(1, len(entropy))
        return TokenStats(zeros, zeros, torch.ones(1, len(entropy), dtype=torch.bool), entropy=torch.tensor([entropy]))
    chosen, rejected = side([1.0, 1.0]), side([4.0])
    assert pair_metrics(LOSSES["dpo"](chosen, rejected), chosen, rejected)["entropy"] == 2
