"""The kernels of a GPU, run by Triton's interpreter where there is none: alone, and in a whole step."""
import functools

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton")

from test_engine import make, shared_batch

from tokpref import LOSSES, pair_loss
from tokpref.engine import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, of what the kernels mask out


def close(ours, plain, tolerance=1e-5):
    "Equal up to a share of the largest entry."
    assert_close(ours, plain, rtol=tolerance, atol=tolerance * max(1.0, plain.abs().max().item()))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("spread", [1.0, 100.0])
@pytest.mark.parametrize("vocabulary", [2, 37, 4097])
def test_statistics_and_gradient(vocabulary, spread, softcap):
    "A vocabulary of less than a block, of a block and one more; logits so far apart that most probabilities are zero."
    z = spread * torch.randn(3, vocabulary, device=DEVICE)
    q = z + torch.randn_like(z)
    targets = torch.randint(vocabulary, (3,), device=DEVICE)
    transform = kernels.Transform(0.7, softcap)
    wants = (True, True, True)
    ours = kernels.fused_statistics(z, q, targets, wants, transform, transform)
    plain = kernels.plain_statistics(z.double(), q.double(), targets, wants, transform, transform)
    for name, values in plain.items(): close(ours[name].double(), values, 1e-4)
    g, k = torch.randn(2, 3, device=DEVICE)
    more = g, k, ours["norm"], ours["ref_norm"], transform, transform
    close(kernels.fused_gradient(z.clone(), q, targets, *more), kernels.plain_gradient(z.clone(), q, targets, *more))


def test_a_token_that_is_ruled_out_adds_nothing():
    z = torch.randn(2, 50, device=DEVICE)
    q = torch.randn_like(z)
    z[:, 7] = q[:, 7] = -torch.inf
    targets = torch.tensor([1, 2], device=DEVICE)
    stats = kernels.fused_statistics(z, q, targets, (True, True, True))
    for name, values in kernels.plain_statistics(z, q, targets, (True, True, True)).items(): close(stats[name], values)
    grad = kernels.fused_gradient(z, q, targets, stats["kl"], stats["kl"], stats["norm"], stats["ref_norm"])
    assert (grad[:, 7] == 0).all()


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Cohere"])
@pytest.mark.parametrize("name", ["dpo", "tdpo2"])
def test_a_whole_step(name, family, chunk_size, monkeypatch):
    "Loss and gradients with the kernels and without; a soft cap (Gemma 2), a scale (Cohere), chunks scored twice."
    model, ref_model = (make(family, seed).float().to(DEVICE) for seed in (0, 1))
    batch = {key: value.to(DEVICE) for key, value in shared_batch().items()}
    loss = functools.partial(LOSSES[name], beta=0.3)
    results = []
    for used in (False, True):
        monkeypatch.setattr(kernels, "usable", lambda device, dtype, used=used: used)
        model.zero_grad()
        result = pair_loss(model, ref_model, batch, loss, entropy=True, chunk_size=chunk_size)
        result.loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([result.loss.detach(), result.chosen.logps, result.chosen.entropy, *grads])
    for ours, plain in zip(*reversed(results), strict=True): close(ours, plain)
