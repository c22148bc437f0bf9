"""Time and peak memory of one step, on a CPU (the process's resident set) or a CUDA device (its allocator)."""
import ctypes
import gc
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

# glibc gives every large block back to the system when it is freed, and gets it back as fresh pages that the kernel has
# to zero. "keeping" tells it to hold on to them, as jemalloc, tcmalloc and CUDA's caching allocator do.
ALLOCATORS = {
    "default": {},
    "keeping": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 26),
                "MALLOC_ARENA_MAX": "1"},
}
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _resident(field: str) -> int:
    "A line of the process's status, in bytes."
    return next(int(line.split()[1]) * 1024 for line in _STATUS.read_text().splitlines() if line.startswith(field))


def tidy(device: str) -> None:
    "Free what can be freed, and give the system its pages back if the allocator is willing."
    gc.collect()
    if device != "cpu": return torch.cuda.empty_cache()
    if sys.platform == "linux": ctypes.CDLL(None).malloc_trim(0)


class Peak:
    "Bytes above the state at entry, at the worst moment inside: `with Peak(device) as peak: ...; peak.bytes`."

    def __init__(self, device: str = "cpu"):
        self.device, self.bytes = device, 0

    def __enter__(self) -> "Peak":
        tidy(self.device)
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        elif _RESET.exists():
            _RESET.write_text("5")      # the high-water mark starts again from the present
            self.start = _resident("VmRSS")
        else: self.start = self._worst()
        return self

    def _worst(self) -> int:
        "The high-water mark of the process; where it cannot be reset, what is below an earlier one is not seen."
        if self.device != "cpu": return torch.cuda.max_memory_allocated()
        if _RESET.exists(): return _resident("VmHWM")
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def __exit__(self, *_) -> None:
        self.bytes = self._worst() - self.start


def run_step(loss_fn: Callable[[], Tensor], policy: nn.Module, device: str) -> tuple[float, float]:
    "(seconds, loss) of one step: policy forward, reference forward, loss, backward; gradients start from None."
    policy.zero_grad(set_to_none=True)
    if device != "cpu": torch.cuda.synchronize()
    start = time.perf_counter()
    loss = loss_fn()
    loss.backward()
    if device != "cpu": torch.cuda.synchronize()
    return time.perf_counter() - start, loss.item()


def gradient_sketch(policy: nn.Module, probes: int = 2) -> list[float]:
    "The gradient's norm and its products with a few random directions: enough to see whether two gradients differ."
    device = next(policy.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    totals = torch.zeros(probes + 1, dtype=torch.float64, device=device)
    for p in policy.parameters():
        grad = p.grad.detach().flatten().double()
        totals[0] += grad @ grad
        for i in range(probes):
            totals[i + 1] += grad @ torch.randn(len(grad), generator=generator, device=device).double()
    totals[0] = totals[0].sqrt()
    return totals.tolist()


def gemm_rate(device: str, dtype: torch.dtype, size: int | None = None) -> float:
    """Measured dense rate, in operations a second: the best of several products of two square matrices.

    On a CPU, the best of both libraries that PyTorch has.
    """
    size = size or (1024 if device == "cpu" else 8192)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    ways = [lambda: a @ b]
    if device == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        inside = a.to_mkldnn()
        ways.append(lambda: torch.nn.functional.linear(inside, b))
    best = float("inf")
    for way in ways * 8:
        if device != "cpu": torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(4): way()
        if device != "cpu": torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / 4)
    return 2 * size ** 3 / best
