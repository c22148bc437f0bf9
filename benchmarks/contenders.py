"""What is compared: each contender makes, of (policy, reference, batch), a function that gives the loss."""

import tempfile
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import own
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BETA, ALPHA = 0.1, 0.5


class Contender(NamedTuple):
    "One row of the table."

    label: str
    family: str                 # losses of one family must agree
    build: Callable             # (policy, reference, batch) -> () -> loss
    peer: str | None = None     # folder of the package it needs
    most: int = 1000            # timed steps at most, for those that are slow and in no bar


def _labels(batch: dict) -> tuple[Tensor, Tensor]:
    "(next token [2B, L-1], whether it belongs to a response [2B, L-1])."
    return batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:].bool()


def _model_inputs(batch: dict) -> dict:
    return dict(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)


def _tdpo2(logps: Tensor, ref_logps: Tensor, kl: Tensor, mask: Tensor) -> Tensor:
    "TDPO2's loss from [2B, L-1] statistics, chosen rows first (arXiv 2404.11999, eq. 17)."
    delta, drift = (torch.where(mask, x, 0.0).sum(-1).chunk(2) for x in (logps - ref_logps, kl))
    margin = delta[0] - delta[1] - ALPHA * (drift[1] - drift[0].detach())
    return -F.logsigmoid(BETA * margin).mean()


def released_tdpo(policy: nn.Module, reference: nn.Module, batch: dict) -> Callable[[], Tensor]:
    "TDPO2 as its released computation goes: full logits of both models, every [2B, L-1, V] matrix of it in float32."
    labels, mask = _labels(batch)

    def loss() -> Tensor:
        logits = policy(**_model_inputs(batch)).logits[:, :-1].float()
        with torch.no_grad(): ref_logits = reference(**_model_inputs(batch)).logits[:, :-1].float()
        all_logps = logits.log_softmax(-1)
        ref_probs = ref_logits.softmax(-1)
        ref_all_logps = ref_probs.log()
        kl = (ref_probs * (ref_all_logps - all_logps)).sum(-1)
        logps, ref_logps = (x.gather(-1, labels[..., None]).squeeze(-1) for x in (all_logps, ref_all_logps))
        return _tdpo2(logps, ref_logps, kl, mask)
    return loss


def _word_tokenizer():
    "The least tokenizer that a trainer accepts; the ids of the benchmark do not come from it."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    bare = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1, "a": 2, "b": 3, "c": 4}, unk_token="<pad>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", eos_token="<end>", unk_token="<pad>")


def trl_dpo(policy: nn.Module, reference: nn.Module, batch: dict, compact: bool = False) -> Callable[[], Tensor]:
    """TRL's own DPO trainer computing its loss and its metrics; no gradient checkpointing, as for all here.

    `compact` answers yes where TRL 1.16 asks whether the device runs Triton: then only response positions reach its
    head, as they do on a GPU. Its tiles stay those that it uses without Triton.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportMissingImports]  a peer
    if compact: __import__("trl.trainer.utils").trainer.utils._use_triton = lambda device: True
    folder = tempfile.TemporaryDirectory()
    cpu = next(policy.parameters()).device.type == "cpu"
    args = DPOConfig(
        output_dir=folder.name,
        beta=BETA,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        use_cpu=cpu,
        max_length=None,
        disable_tqdm=True,
    )
    rows = Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
    trainer = DPOTrainer(policy, reference, args, train_dataset=rows, processing_class=_word_tokenizer())
    policy.train()
    trainer.kept_folder = folder
    return lambda: trainer.compute_loss(policy, batch)


def liger_dpo(policy: nn.Module, reference: nn.Module, batch: dict) -> Callable[[], Tensor]:
    "Liger's fused DPO loss on all positions' states, called as TRL 1.10 does; compiled, its default, on a GPU only."
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss  # pyright: ignore[reportMissingImports]  a peer
    fused = LigerFusedLinearDPOLoss(beta=BETA, compiled=batch["input_ids"].device.type != "cpu")
    labels, mask = _labels(batch)
    labels = labels.masked_fill(~mask, -100)

    def hidden(model: nn.Module) -> Tensor:
        return model.base_model(**_model_inputs(batch)).last_hidden_state[:, :-1].contiguous()

    def loss() -> Tensor:
        with torch.no_grad(): ref_hidden = hidden(reference)
        head, ref_head = (model.get_output_embeddings().weight for model in (policy, reference))
        return fused(head, hidden(policy), labels, None, ref_hidden, ref_head)[0]
    return loss


def from_tiles(policy: nn.Module, reference: nn.Module, batch: dict, kl: bool) -> Callable[[], Tensor]:
    "DPO or TDPO2 from TRL 1.16's tiled kernels for log-probabilities and forward KL, on response positions only."
    from trl.kernels import ChunkedLogProbFunction  # pyright: ignore[reportMissingImports]  a peer
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # pyright: ignore[reportMissingImports]  a peer
    labels, mask = _labels(batch)
    targets, width = labels[mask], 32_768       # the tile width that TRL's trainers use
    hidden = lambda model: model.base_model(**_model_inputs(batch)).last_hidden_state[:, :-1][mask]
    place = lambda x: torch.zeros(mask.shape, device=x.device).masked_scatter(mask, x)
    score = lambda h, head: ChunkedLogProbFunction.apply(h, head, None, targets, 1.0, width, None, 1.0, ())[0]

    def loss() -> Tensor:
        head, ref_head = (model.get_output_embeddings().weight for model in (policy, reference))
        h = hidden(policy)
        with torch.no_grad():
            ref_h = hidden(reference)
            ref_logps = score(ref_h, ref_head)
        drift = torch.zeros_like(ref_logps)
        if kl: drift, _ = ChunkedDivergenceFunction.apply(h, head, None, ref_h, ref_head, None, 0.0)
        return _tdpo2(*(place(x) for x in (score(h, head), ref_logps, drift)), mask)
    return loss


CONTENDERS: dict[str, Contender] = {
    "trl-1.16": Contender("TRL 1.16 DPO as shipped", "dpo", trl_dpo, "trl-1.16", 2),
    "trl-1.16-compact": Contender("TRL 1.16 DPO, compact path", "dpo", partial(trl_dpo, compact=True), "trl-1.16"),
    "trl-1.10": Contender("TRL 1.10 DPO, full logits", "dpo", trl_dpo, "trl-1.10"),
    "dpo-tiles": Contender(
        "DPO from TRL 1.16's tiled kernels, no metrics", "dpo", partial(from_tiles, kl=False), "trl-1.16", 3
    ),
    "liger": Contender("Liger fused DPO", "dpo", liger_dpo, "liger", 3),
    "tdpo-released": Contender("TDPO2, the released computation", "tdpo2", released_tdpo),
    "tdpo-tiles": Contender("TDPO2 from TRL 1.16's tiled kernels", "tdpo2", partial(from_tiles, kl=True), "trl-1.16"),
    **{name: Contender(label, family, build) for name, (label, family, build) in own.contenders(BETA, ALPHA).items()},
}
