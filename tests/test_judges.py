"""Judges: verdicts on record, an endpoint busy, broken or closed, a reward model, and length's part in a score."""

import json
import math
import multiprocessing
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from tokpref.data import data_root, load_texts
from tokpref.evaluation import win_rate
from tokpref.evaluation.estimate import clustered_estimate
from tokpref.experiments import judges
from tokpref.experiments.judges import CachedJudge, EndpointJudge, RewardJudge, longer_is_better, open_judge

RESULTS = Path(__file__).resolve().parent.parent / "results"
PAIRS = ["p", "q", "r"], ["a", "b", "c"], ["x", "y", "z"]


class Recorder:
    "A judge that says what it is told to, and remembers what it was asked."

    def __init__(self, verdicts): self.verdicts, self.asked = verdicts, []

    def __call__(self, prompts, first, second):
        self.asked += zip(prompts, first, second, strict=True)
        return [self.verdicts[prompt] for prompt in prompts]


# The record

def test_verdicts_are_asked_once_and_in_order(tmp_path):
    judge = Recorder({"p": 1, "q": 0.25, "r": 0})
    cached = CachedJudge(judge, tmp_path / "new" / "verdicts.jsonl", "one", progress=False)
    assert cached(*PAIRS) == [1, 0.25, 0] == cached(*PAIRS) and len(judge.asked) == 3
    assert cached(["r", "p", "r"], ["c", "a", "c"], ["z", "x", "z"]) == [0, 1, 0] and len(judge.asked) == 3
    cached(["p"], ["x"], ["a"])     # the other order is another question
    assert len(judge.asked) == 4
    assert CachedJudge(None, cached.path, "one")(*PAIRS) == [1, 0.25, 0]
    with pytest.raises(KeyError, match="no verdict of 'two' in verdicts.jsonl for 3 of 3 pairs"):
        CachedJudge(None, cached.path, "two")(*PAIRS)


def test_a_judge_that_breaks_down_loses_no_finished_batch(tmp_path):
    class Breaks(Recorder):
        def __call__(self, prompts, first, second):
            if "r" in prompts: raise ConnectionError("gone")
            return super().__call__(prompts, first, second)

    with pytest.raises(ConnectionError):
        CachedJudge(Breaks({"p": 1, "q": 0}), tmp_path / "v.jsonl", "j", batch_size=1, progress=False)(*PAIRS)
    rest = Recorder({"r": 0.5})
    assert CachedJudge(rest, tmp_path / "v.jsonl", "j", progress=False)(*PAIRS) == [1, 0, 0.5] and rest.asked == [
        ("r", "c", "z")
    ]


def test_a_line_cut_off_by_a_crash_is_skipped_and_mended(tmp_path, caplog):
    path, judge = tmp_path / "v.jsonl", Recorder({"p": 1, "q": 0, "r": 0.5})
    CachedJudge(judge, path, "j", progress=False)(*(column[:1] for column in PAIRS))
    with path.open("a") as file: file.write('{"judge": "j", "prompt": "q", "first": "b"')
    assert CachedJudge(judge, path, "j", progress=False)(*PAIRS) == [1, 0, 0.5] and "broken line" in caplog.text
    lines = path.read_text().splitlines()
    assert len(lines) == 4 and [json.loads(line)["prompt"] for line in (lines[0], *lines[2:])] == ["p", "q", "r"]
    assert CachedJudge(None, path, "j")(*PAIRS) == [1, 0, 0.5]


def test_an_unreadable_answer_is_asked_again_next_time(tmp_path, caplog):
    judge = Recorder({"p": 1, "q": None, "r": 0})
    cached = CachedJudge(judge, tmp_path / "v.jsonl", "j", progress=False)
    assert cached(*PAIRS) == [1, None, 0] and "no readable answer for 1 of 3" in caplog.text
    judge.verdicts["q"] = 0.5
    assert cached(*PAIRS) == [1, 0.5, 0] and len(judge.asked) == 4


def test_chat_prompts_and_other_alphabets_are_kept_as_they_are(tmp_path):
    chat = [{"role": "user", "content": "Grüße 你好\u2028"}]
    CachedJudge(lambda *_: [0.75], tmp_path / "v.jsonl", "j", progress=False)([chat], ["ä\n"], ["\u0085b"])
    assert CachedJudge(None, tmp_path / "v.jsonl", "j")([chat], ["ä\n"], ["\u0085b"]) == [0.75]


def write(path, name):
    def slow(prompts, first, second):
        time.sleep(0.002)
        return [len(x) % 2 for x in prompts]
    prompts = [f"shared {i} " + "ü" * 3000 for i in range(30)] + [f"{name} {i}" for i in range(30)]
    CachedJudge(slow, path, "j", batch_size=1, progress=False)(prompts, ["a"] * 60, ["b"] * 60)


def test_two_processes_share_one_file(tmp_path):
    path, context = tmp_path / "v.jsonl", multiprocessing.get_context("fork")
    writers = [context.Process(target=write, args=(path, name)) for name in ("one", "two")]
    for writer in writers: writer.start()
    for writer in writers: writer.join(100)
    assert [writer.exitcode for writer in writers] == [0, 0]
    prompts = {json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()}
    assert len(prompts) == 90 and CachedJudge(None, path, "j")([*prompts], ["a"] * 90, ["b"] * 90) == [
        len(x) % 2 for x in prompts
    ]


def test_one_process_sees_what_another_wrote(tmp_path):
    mine, theirs = (
        CachedJudge(Recorder({"p": 1, "q": 0, "r": 0.5}), tmp_path / "v.jsonl", "j", progress=False) for _ in range(2)
    )
    mine(["p"], ["a"], ["x"]), theirs(*PAIRS)
    assert mine(*PAIRS) == [1, 0, 0.5] and len(mine.judge.asked) == 1 and len(theirs.judge.asked) == 2


# A model behind a URL

class Server(ThreadingHTTPServer):
    "A chat endpoint: prefers the answer with more x, and first says what `script` has (status, body or headers)."

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = []
        self.requests = []
        self.reply = lambda a, b: "A" if a.count("x") > b.count("x") else "B" if b.count("x") > a.count("x") else "T"

    @property
    def url(self): return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Any     # a `Server`

    def log_message(self, *args): pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.headers["Authorization"], body))
        status, headers, text = self.server.script.pop(0) if self.server.script else (200, {}, None)
        if text is None:
            a, b = body["messages"][0]["content"].split("|")[1:]
            text = json.dumps({"choices": [{"message": {"content": self.server.reply(a, b)}}]})
        self.send_response(status)
        for name, value in headers.items(): self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown(), server.server_close()


def endpoint(server, **options):
    return EndpointJudge("tiny", server.url, "{prompt}|{first}|{second}", pause=0.001, timeout=5, **options)


def test_an_endpoint_is_asked_in_both_orders(server):
    result = win_rate(
        ["xx", "", "x"], ["x", "x", "x"], ["p", [{"role": "user", "content": "q"}], "r"], endpoint(server)
    )
    assert result.scores == [1.0, 0.0, 0.5] and result.consistent == 1 and len(server.requests) == 6
    path, key, body = server.requests[0]
    assert (
        path == "/v1/chat/completions"
        and key == "Bearer secret-key"
        and body["model"] == "tiny"
        and body["temperature"] == 0
    )
    assert any("user: q|" in body["messages"][0]["content"] for _, _, body in server.requests)


@pytest.mark.parametrize("trouble", [(429, {"Retry-After": "0"}, "busy"), (503, {}, "down"), (200, {}, "not json")])
def test_a_busy_server_is_asked_again(server, trouble):
    server.script = [trouble] * 3
    assert endpoint(server)(["p"], ["x"], [""]) == [1.0] and len(server.requests) == 4


@pytest.mark.parametrize("script, error, says", [
    ([(401, {}, "wrong key")], PermissionError, "refused the key in OPENAI_API_KEY .401"),
    ([(404, {}, "no such model")], ConnectionError, "refused the question to tiny .404.*no such model"),
    ([(500, {}, "oh")] * 2, ConnectionError, "did not answer in 2 tries; the last: 500"),
    ([(200, {}, '{"error": "?"}')], ConnectionError, "not with a chat completion")])
def test_what_waiting_cannot_mend_is_said(server, script, error, says):
    server.script = list(script)
    with pytest.raises(error, match=says) as caught: endpoint(server, tries=2, concurrency=1)(["p"], ["x"], [""])
    assert "secret-key" not in str(caught.value) and len(server.requests) == len(script)


def test_nobody_there(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    with pytest.raises(ConnectionError, match="did not answer in 2 tries"):
        EndpointJudge("tiny", "http://127.0.0.1:9/v1", tries=2, pause=0.001)(["p"], ["a"], ["b"])


def test_no_key_no_call(server, monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(
        PermissionError, match="set OPENAI_API_KEY to your key for http://127.0.0.1.*or choose a judge that needs none"
    ):
        CachedJudge(endpoint(server), tmp_path / "v.jsonl")(["p"], ["x"], [""])
    assert not server.requests and not (tmp_path / "v.jsonl").exists()


def test_what_is_on_record_needs_no_key(server, monkeypatch, tmp_path):
    judge = CachedJudge(endpoint(server), tmp_path / "v.jsonl", progress=False)
    said = judge(*PAIRS)
    monkeypatch.delenv("OPENAI_API_KEY")
    assert CachedJudge(endpoint(server), tmp_path / "v.jsonl")(*PAIRS) == said
    assert "secret-key" not in (tmp_path / "v.jsonl").read_text() and "secret-key" not in repr(judge.judge)


def test_another_question_is_another_judge():
    names = {
        EndpointJudge("m", template=judges.BETTER_ANSWER).name,
        EndpointJudge("m", template=judges.BETTER_SUMMARY).name,
        EndpointJudge("n").name,
        EndpointJudge("m", options={"temperature": 1}).name,
    }
    assert len(names) == 4 and EndpointJudge("m").name in names
    with pytest.raises(ValueError, match="no {second}"): EndpointJudge("m", template="{prompt} {first}")


def test_a_reply_without_a_letter_is_left_out(server, tmp_path):
    server.reply = lambda a, b: "A" if "x" in a + b else "Both are lovely."
    result = win_rate(
        ["x", ""], ["", ""], ["p", "q"], CachedJudge(endpoint(server), tmp_path / "v.jsonl", progress=False)
    )
    assert result.unread == 1 and result.rate.n == 1 and result.scores[0] == 0.5 and math.isnan(result.scores[1])


@pytest.mark.parametrize(
    "reply, verdict",
    [
        ("A", 1),
        ("B.", 0),
        (" T\n", 0.5),
        ("**A**", 1),
        ("Answer: B", 0),
        ("(T)", 0.5),
        ("The better one is answer A.", 1),
        ("", None),
        ("I prefer the first", None),
        ("a", None),
        ("DATA", None),
        ("A is better", None),
        ("that's B", 0),
        ("it isn'T", None),
    ],
)
def test_replies(reply, verdict): assert judges.read_verdict(reply) == verdict


# A reward model

@pytest.fixture
def reward_folder(tmp_path, tokenizer):
    from transformers import GPT2Config, GPT2ForSequenceClassification
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64,
        n_positions=64,
        n_embd=16,
        n_layer=1,
        n_head=2,
        num_labels=1,
        pad_token_id=0,
        initializer_range=0.5,
    )
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "rm"), tokenizer.save_pretrained(tmp_path / "rm")
    return str(tmp_path / "rm")


def test_a_reward_model_gives_bradley_terry_probabilities(reward_folder):
    judge = RewardJudge(reward_folder, batch_size=2, max_length=64)
    prompts, first, second = ["say yes", "go on", "say yes"], ["yes", "and so on", "no"], ["no, never", "stop", "yes"]
    a, b = (torch.tensor(judge.scores(prompts, column)) for column in (first, second))
    assert (
        torch.allclose(torch.tensor(judge(prompts, first, second)), torch.sigmoid(a - b), atol=1e-6)
        and len(set(a.tolist())) == 3
    )
    one = RewardJudge(reward_folder, batch_size=1, max_length=64).scores(prompts, first)
    assert torch.allclose(torch.tensor(one), a, atol=1e-5), "padding changes no score"
    assert win_rate(first, second, prompts, judge).first.value == pytest.approx(0.5)


def test_a_reward_model_counts_with_what_the_card_has(reward_folder, monkeypatch):
    "bfloat16 only where it isn't emulated."
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        judges.reward_model.AutoModelForSequenceClassification,
        "from_pretrained",
        lambda name, dtype, trust_remote_code: asked.append(dtype) or 1 / 0,
    )
    for own in (True, False):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True, own=own: own or including_emulation
        )
        with pytest.raises(ZeroDivisionError): _ = RewardJudge(str(reward_folder)).parts
    assert asked == [torch.bfloat16, torch.float16]


def test_a_long_prompt_is_cut_and_the_response_is_not(reward_folder):
    judge = RewardJudge(reward_folder, max_length=64)
    assert judge.scores(["a" * 500], ["yes"]) != judge.scores(["a" * 500], ["no!"])


def test_the_label_says_which_output_is_the_score(reward_folder):
    model = RewardJudge(reward_folder).parts[1]
    model.score, model.config.num_labels = torch.nn.Linear(16, 3, bias=False), 3
    model.save_pretrained(reward_folder)
    scores = [RewardJudge(reward_folder, label=label).scores(["say yes"], ["yes"])[0] for label in (0, 1, 2)]
    assert len(set(scores)) == 3


def test_only_the_prompt_of_a_text_gives_way(reward_folder):
    "Also beside a response that is longer than the prompt."
    tokenizer, _ = RewardJudge(reward_folder).parts
    encode = judges.reward_model._encode
    whole, cut = (encode(tokenizer, "go on " * 5, "yes " * 9, most)["input_ids"] for most in (1000, 50))
    response = encode(tokenizer, "", "yes " * 9, 1000)["input_ids"]
    assert len(whole) > len(cut) == 50 and cut[-len(response):] == response


def test_a_chat_is_cut_by_whole_turns_and_keeps_its_system_message(reward_folder):
    "Not in the middle of a turn, whose beginning and role would be lost."
    tokenizer, _ = RewardJudge(reward_folder).parts
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}!{% endfor %}"
    talk = [{"role": "system", "content": "be kind"}]
    for i in "abcdefgh": talk += [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": f"say {i}"}]
    talk.append({"role": "user", "content": "and now"})
    encode = judges.reward_model._encode
    whole = encode(tokenizer, talk, "yes", 1000)["input_ids"]
    limit = len(whole) - 30
    for most in range(limit - 20, limit): assert len(encode(tokenizer, talk, "yes", most)["input_ids"]) <= most
    cut = encode(tokenizer, talk, "yes", limit)["input_ids"]
    text = tokenizer.decode(cut).replace(" ", "")
    assert len(cut) <= limit and tokenizer.decode(whole).replace(" ", "").startswith("s:bekind!u:aska!")
    assert text.startswith("s:bekind!u:ask") and "u:andnow!a:yes!" in text and "u:aska!" not in text


def test_other_weights_are_another_judge(reward_folder):
    "Wherever in the file they differ."
    before = RewardJudge(reward_folder).name
    model = RewardJudge(reward_folder).parts[1]
    names = {before}
    for weight in (model.transformer.wte.weight, model.score.weight, model.transformer.ln_f.bias):
        with torch.no_grad(): weight += 1
        model.save_pretrained(reward_folder)
        names.add(RewardJudge(reward_folder).name)
    assert before.startswith("reward rm ") and len(names) == 4


def test_a_judge_is_checked_before_it_is_asked(reward_folder, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for there in ("longer", f"reward:{reward_folder}"): open_judge(there, tmp_path).check()
    for spec, error, says in (("reward:nobody/none", FileNotFoundError, "cannot load the judge 'nobody/none'"),
                              ("m@http://127.0.0.1:9/v1", PermissionError, "set OPENAI_API_KEY")):
        judge = open_judge(spec, tmp_path)
        with pytest.raises(error, match=says): judge.check()
        judge.path.write_text("", encoding="utf-8")
        judge.check()       # what is on record needs neither key nor model
    model = RewardJudge(reward_folder).parts[1]
    model.config.num_labels = 2
    model.config.save_pretrained(reward_folder)
    with pytest.raises(ValueError, match="2 scores: set label"): RewardJudge(reward_folder).check()
    RewardJudge(reward_folder, label=1).check()


# Words for judges, numbers of comparisons, length

def test_judges_by_word(reward_folder, tmp_path):
    longer = open_judge("longer", tmp_path, progress=False)
    assert longer(["p"], ["a b"], ["a"]) == [1.0] and longer.path.name == "longer_is_better.jsonl".replace("_", "-")
    assert open_judge(f"recorded:{longer.path}", tmp_path)(["p"], ["a b"], ["a"]) == [1.0]
    assert open_judge(f"reward:{reward_folder}", tmp_path).name.startswith("reward rm")
    assert open_judge("org/m@https://host/v1", tmp_path).judge.model == "org/m"
    for wrong in ("gpt-4", "reward:", "m@host", "@http://x"):
        with pytest.raises(ValueError, match="say longer, reward:NAME_OR_FOLDER"): open_judge(wrong, tmp_path)
    with pytest.raises(FileNotFoundError, match="record verdicts"): open_judge("recorded:nowhere.jsonl", tmp_path)


def test_longer_is_better():
    assert longer_is_better([""] * 3, ["a b", "a", "a"], ["a", "a b", "longerword"]) == [1.0, 0.0, 0.5]


def test_comparisons():
    assert judges.comparisons_needed(0.05) == 785 and judges.comparisons_needed(0.05, policies=2) == 1570
    assert judges.comparisons_needed(0.05, rate=0.9) < 300
    for wrong in (dict(difference=0), dict(difference=0.1, policies=3)):
        with pytest.raises(ValueError): judges.comparisons_needed(**wrong)


def test_bootstrap_draws_rows_together():
    x = torch.arange(50.0).numpy()
    assert judges.bootstrap_interval(lambda a, b: float((a - b).mean()), x, x - 1, draws=50) == (1.0, 1.0)
    low, high = judges.bootstrap_interval(lambda a: float(a.mean()), x)
    assert low < x.mean() < high
    half = 1.96 * x.std() / len(x) ** 0.5       # the normal interval at 95 %
    assert high - low == pytest.approx(2 * half, rel=0.1)
    with pytest.raises(ValueError): judges.bootstrap_interval(max, [1.0], [1.0])


def test_the_error_of_a_bin_is_clustered_by_prompt():
    "Answers to the same prompt agree with each other, so they are fewer than they seem."
    rows = [{"prompt_id": i, "chosen": "a b", "rejected": "c", "chosen_model": name, "rejected_model": "other",
             "score_chosen": score, "score_rejected": 0.0}
            for name, i, score in (("x", 0, 1.0), ("y", 0, 1.0), ("z", 0, 1.0), ("x", 1, 0.0), ("y", 1, 0.0),
                                   ("z", 1, 0.0))]
    study = judges.length_study([*rows, {**rows[0], "prompt_id": 2, "chosen": "w " * 60}], "other")
    values, clusters = [1.0] * 3 + [0.0] * 6, [0, 0, 0, 1, 1, 1, 0, 1, 2]
    expected = clustered_estimate(torch.tensor(values), clusters)
    (first, *_) = study["bins"]
    assert first["n"] == 9 and first["score"] == pytest.approx(expected.value)
    assert first["se"] == pytest.approx(expected.se) != pytest.approx(torch.tensor(values).std() / 9**0.5)


@pytest.mark.skipif(not data_root(), reason="set TOKPREF_DATA")
def test_the_recorded_study_of_length_is_that_of_the_data():
    rows = [row for split in ("train", "test") for row in load_texts("alpaca_eval-preferences", split)]
    record = json.loads((RESULTS / "judges-length.json").read_text(encoding="utf-8"))
    study = judges.length_study(rows)
    assert {name: record[name] for name in study} == json.loads(json.dumps(study))
