"""Inputs at the shapes of training, made on the GPU, and their answers in float64."""

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from reasonrl.kernels import linear_log_prob, selective_log_prob
from reasonrl.kernels.log_probs import mixed
from reasonrl.kernels.reference import LogProbs

DEVICE = "cuda"
NUM_ROWS = 1027  # a multiple of no block
ALL = slice(None)
Given = dict[str, Tensor]


def random(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)
    return made.mul_(scale).to(dtype)


def words(vocab: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)


def branches(width: int, *, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Conditional and unconditional rows, correlated at 0.5."""
    cond = random(NUM_ROWS, width, seed=0, scale=scale)
    uncond = cond / 2 + random(NUM_ROWS, width, seed=1, scale=0.75**0.5 * scale)
    return cond.to(dtype), uncond.to(dtype)


def head(vocab: int, width: int, dtype: torch.dtype, *, guided: bool = False, spread: float = 1.0) -> Given:
    """A head whose logits deviate by about `spread`."""
    cond, uncond = branches(width, scale=1.0, dtype=dtype)
    given = {
        "hidden": cond,
        "weight": random(vocab, width, seed=2, scale=spread * width**-0.5, dtype=dtype),
        "bias": random(vocab, seed=3, dtype=dtype),
        "low_hidden": random(NUM_ROWS, 8, seed=4, scale=0.1, dtype=dtype),
        "low_weight": random(vocab, 8, seed=5, dtype=dtype),
    }
    return given | ({"uncond_hidden": uncond} if guided else {})


def ask_head(function: Callable[..., LogProbs], given: Given, target: Tensor, rows: slice = ALL, **more) -> LogProbs:
    """`linear_log_prob`, ours or the reference's, of some rows of a head; guided by 3 if it has two branches."""
    uncond = {"uncond_hidden": given["uncond_hidden"][rows]} if "uncond_hidden" in given else {}
    return function(
        given["hidden"][rows], given["weight"], target[rows], bias=given["bias"], cfg_weight=3.0,
        low_rank=(given["low_hidden"][rows], given["low_weight"]), return_entropy=True, **uncond, **more,
    )  # fmt: skip


def rounded(wide: Given, narrow: Given) -> Given:
    """The head of hidden states that are mixed, then rounded to `narrow`'s dtype; gradients as if not rounded."""
    mix = wide["uncond_hidden"] + 3.0 * (wide["hidden"] - wide["uncond_hidden"])
    stored = mixed(narrow["hidden"], narrow["uncond_hidden"], 3.0, keep_float=False).detach().double()
    rest = {name: value for name, value in wide.items() if name != "uncond_hidden"}
    return rest | {"hidden": mix + (stored - mix).detach()}


def leaves(given: Given, dtype: torch.dtype | None = None) -> Given:
    return {name: value.detach().to(dtype or value.dtype, copy=True).requires_grad_() for name, value in given.items()}


def gradients(found: LogProbs, given: Given, rows: slice = ALL) -> tuple[Tensor, ...]:
    """Gradients of a weighted sum of log-probs and entropies."""
    slopes = torch.linspace(-1, 2, NUM_ROWS, dtype=torch.float64, device=DEVICE)
    total = (found.log_prob * slopes[rows]).sum() + (found.entropy * slopes.flip(0)[rows]).sum()
    return torch.autograd.grad(total, list(given.values()))


def in_float64(ask: Callable[[slice], LogProbs], wide: Given) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Log-probs, entropies and gradients, some rows at a time: autograd holds every logit of theirs."""
    parts, slopes = [], [torch.zeros_like(value) for value in wide.values()]
    for start in range(0, NUM_ROWS, 256):
        rows = slice(start, start + 256)
        found = ask(rows)
        for total, slope in zip(slopes, gradients(found, wide, rows), strict=True):
            total += slope
        parts.append((found.log_prob.detach(), found.entropy.detach()))
    log_prob, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
    return log_prob, entropy, slopes


def a_whole_problem() -> tuple[Given, Tensor, Tensor]:
    """A guided head, its targets and a mask."""
    given = leaves(head(50257, 1600, torch.bfloat16, guided=True))
    return given, words(50257, NUM_ROWS), words(4, NUM_ROWS, seed=1) > 0


def everything(given: Given, target: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
    """Log-probs, entropies and gradients: of a head, computed in blocks, and of logits."""
    found = ask_head(linear_log_prob, given, target, mask=mask, precision="exact", workspace_bytes=2**26)
    logits = random(NUM_ROWS, len(given["weight"]), seed=7, dtype=torch.bfloat16).requires_grad_()
    plain = selective_log_prob(logits, target, mask=mask, return_entropy=True)
    slopes = *gradients(found, given), *gradients(plain, {"logits": logits})
    return found.log_prob, found.entropy, plain.log_prob, plain.entropy, *slopes


def policy_batch(num_rows: int, num_tokens: int) -> tuple[Given, Tensor]:
    """A batch whose log-ratios are multiples of 1/64: none is so near ln 0.8, ln 1.2 or ln 2 that rounding decides."""
    shape = (num_rows, num_tokens)
    live = -random(*shape, seed=0).abs()
    gap = (random(*shape, seed=1, scale=24) + random(num_rows, 1, seed=2, scale=16)).round() / 64
    mask = random(*shape, seed=3) > -1
    mask[5] = False
    given = {
        "log_prob": live,
        "entropy": random(*shape, seed=4).abs(),
        "old": live - gap,
        "advantages": random(num_rows, seed=5),
        "reference_log_prob": live + random(*shape, seed=6, scale=0.3),
    }
    return given, mask


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted.detach().double()).abs().max())


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted.detach().double()).norm() / wanted.detach().double().norm())


def extra_memory(ask: Callable[[], tuple[Tensor, ...]]) -> int:
    """Bytes at the peak beyond what was there before and what is returned."""
    ask()  # cuBLAS keeps the workspace of its first call
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = ask()
    return torch.cuda.max_memory_allocated() - before - sum(value.nbytes for value in kept)
