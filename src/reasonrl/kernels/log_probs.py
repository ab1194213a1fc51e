"""Log-probs of chosen tokens, from logits or from hidden states, without ever holding a second copy of the logits."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from reasonrl.errors import ContractError
from reasonrl.kernels import checks
from reasonrl.kernels.backend import Backend, uses_triton
from reasonrl.kernels.chunks import MIB
from reasonrl.kernels.epilogue import OUTSIDE, SKIP
from reasonrl.kernels.log_prob_ops import linear_log_prob as _linear_op
from reasonrl.kernels.log_prob_ops import logits_log_prob as _logits_op
from reasonrl.kernels.matmul import product, ready_product
from reasonrl.kernels.reference import IGNORED, LogProbs

Precision = Literal["default", "exact", "fast"]


def selective_log_prob(
    logits: Tensor,
    target: Tensor,
    *,
    uncond_logits: Tensor | None = None,
    cfg_weight: float = 1.0,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = IGNORED,
    return_entropy: bool = False,
    backend: Backend = "auto",
) -> LogProbs:
    """Returns log-prob, and entropy, of each target (...) under logits (..., V); float32, both with gradient.

    The distribution is softmax((u + w (c − u)) / T): c the logits, u `uncond_logits`, w `cfg_weight`, T
    `temperature`, a number or one a position. Gradients come in the dtype of the logits, accumulated in float32.
    Positions outside `mask` (bool), or whose target is `ignore_index`, are exactly 0 and send no gradient. A target
    outside the vocabulary has log-prob nan. A row of −inf has log-prob −inf, entropy 0 and no gradient. float64
    logits are computed and returned in float64 (torch backend). Raises ContractError.

    >>> found = selective_log_prob(torch.tensor([[0.0, 0.0]]), torch.tensor([1]), return_entropy=True)
    >>> found.log_prob.item() == found.entropy.neg().item()  # ln(1/2), and the entropy of a coin
    True
    """
    checks.floats(logits=logits, uncond_logits=uncond_logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ContractError(f"logits must be (..., V) with a vocabulary, got {tuple(logits.shape)}")
    shape = logits.shape[:-1]
    checks.same_shape("uncond_logits", uncond_logits, logits.shape, of="logits")
    checks.targets(target, shape, logits.device, of="logits")
    checks.masks(mask, shape, of="logits")
    checks.temperatures(temperature, shape)
    triton = _triton(backend, logits)
    words = _words(target, mask, ignore_index, logits.shape[-1])
    uncond = None if uncond_logits is None or cfg_weight == 1.0 else _rows(uncond_logits)
    heat = _heat(temperature, words, logits.dtype)
    found = _logits_op(_rows(logits), uncond, float(cfg_weight), words, heat, return_entropy, triton)
    return _log_probs(found, words, heat, shape, return_entropy)


def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    uncond_hidden: Tensor | None = None,
    cfg_weight: float = 1.0,
    low_rank: tuple[Tensor, Tensor] | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = IGNORED,
    return_entropy: bool = False,
    precision: Precision = "default",
    workspace_bytes: int | None = None,
    backend: Backend = "auto",
) -> LogProbs:
    """Returns `selective_log_prob` of the logits hidden Wᵀ + b + u Bᵀ, block by block: they are never held whole.

    hidden (..., H), weight W (V, H), bias (V,); `low_rank` = (u (..., r), B (V, r)) is a LoRA pair, u = s·h Aᵀ with h
    the mixed state where guided. Under guidance the logits of the two branches mix linearly, so one product with
    u + w (c − u) of the *hidden* states is both heads at once, at half the cost; for a head of several layers these
    are the states before its last one.
    A weight that needs no gradient costs none. Products accumulate in float32.

    `precision`: "default" multiplies in hidden's dtype. "exact" keeps a mixed hidden in float32, on CUDA as three
    bfloat16 products where the weight is bfloat16. "fast" also rounds the logits to hidden's dtype: 0.01 to 0.03 nats
    of error. `workspace_bytes` bounds the block; None = 16 MiB on a CPU, 2% of the device up to 2 GiB on CUDA.
    Else as `selective_log_prob`; no gradient of a gradient. Raises ContractError.
    """
    low_hidden, low_weight = low_rank or (None, None)
    checks.floats(
        hidden=hidden,
        weight=weight,
        bias=bias,
        uncond_hidden=uncond_hidden,
        low_rank_u=low_hidden,
        low_rank_b=low_weight,
    )
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1] or 0 in weight.shape:
        raise ContractError(
            f"weight must be (V, H) for hidden (..., H), got weight {tuple(weight.shape)} and hidden"
            f" {tuple(hidden.shape)}"
        )
    if precision not in ("default", "exact", "fast"):
        raise ContractError(f"precision must be 'default', 'exact' or 'fast', got {precision!r}")
    shape, vocab = hidden.shape[:-1], len(weight)
    checks.same_shape("bias", bias, (vocab,), of="weight")
    checks.same_shape("uncond_hidden", uncond_hidden, hidden.shape, of="hidden")
    if low_hidden is not None and low_weight is not None:
        checks.same_shape("low_rank u", low_hidden, (*shape, low_weight.shape[-1]), of="hidden and B")
        checks.same_shape("low_rank B", low_weight, (vocab, low_hidden.shape[-1]), of="weight and u")
    checks.targets(target, shape, hidden.device, of="hidden")
    checks.masks(mask, shape, of="hidden")
    checks.temperatures(temperature, shape)
    triton = _triton(backend, hidden)
    words = _words(target, mask, ignore_index, vocab)
    heat = _heat(temperature, words, hidden.dtype)
    rows = [None if value is None else _rows(value) for value in (hidden, uncond_hidden, low_hidden)]
    kept = None
    if mask is not None and not torch.compiler.is_compiling():
        kept = (words != SKIP).nonzero().squeeze(1)  # no work for what is masked, at the price of one wait for a GPU
        rows = [None if value is None else value[kept] for value in rows]
    part_words, part_heat = (words, heat) if kept is None else (words[kept], heat[kept])
    assert rows[0] is not None
    states = mixed(rows[0], rows[1], cfg_weight, keep_float=precision == "exact")
    if (
        precision == "exact"
    ):  # the finer of the two, but a 16-bit weight stays: its products with float32 parts are exact
        wide = torch.promote_types(states.dtype, weight.dtype)
        states, head = states.to(wide), weight if wide == torch.float32 else weight.to(wide)
    else:
        head = weight.to(states.dtype)
    found = _linear_op(
        states,
        head,
        None if bias is None else bias.contiguous(),
        rows[2],
        low_weight,
        part_words,
        part_heat,
        workspace_bytes or _workspace(hidden),
        precision == "fast",
        return_entropy,
        triton,
    )
    if kept is not None:
        found = tuple(value.new_zeros(len(words)).index_put((kept,), value) for value in found)
    return _log_probs(found, words, heat, shape, return_entropy)


class ReadyHead:
    """A linear head made ready for many small products: (N, V) float32 logits of (N, H) states, without gradient.

    They are what `linear_log_prob` in its default precision takes the log-probs of. Sampling from these, and not from
    logits that the head rounded to bfloat16, keeps replay on-policy. On a CPU it holds a float32 copy of the weight.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self._ready = None
        if weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16, torch.float32):
            self._ready = ready_product(self.weight.float())

    @torch.no_grad()
    def logits(self, hidden: Tensor, *, uncond_hidden: Tensor | None = None, cfg_weight: float = 1.0) -> Tensor:
        """Returns (N, V) float32 logits, guided as `linear_log_prob` guides."""
        states = mixed(hidden, uncond_hidden, cfg_weight, keep_float=False)
        if self._ready is not None and states.dtype != torch.float64:
            found = self._ready(states.float())
        else:
            dtype = torch.float64 if states.dtype == torch.float64 else torch.float32
            found = torch.empty(len(states), len(self.weight), dtype=dtype, device=states.device)
            product(states, self.weight.to(states.dtype).T, found)
        return found if self.bias is None else found.add_(self.bias.to(found.dtype))


def linear_logits(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    uncond_hidden: Tensor | None = None,
    cfg_weight: float = 1.0,
) -> Tensor:
    """Returns the logits of `ReadyHead`, once."""
    return ReadyHead(weight, bias).logits(hidden, uncond_hidden=uncond_hidden, cfg_weight=cfg_weight)


def mixed(cond: Tensor, uncond: Tensor | None, cfg_weight: float, *, keep_float: bool) -> Tensor:
    """Returns u + w (c − u), mixed in float32; in cond's dtype unless `keep_float`."""
    if uncond is None or cfg_weight == 1.0:
        return cond
    wide = cond if cond.dtype == torch.float64 else cond.float()
    low = uncond.to(wide.dtype)
    found = low + cfg_weight * (wide - low)
    return found if keep_float else found.to(cond.dtype)


def _triton(backend: Backend, value: Tensor) -> bool:
    found = uses_triton(backend, value)
    if found and value.dtype == torch.float64:
        if backend == "triton":
            raise ContractError("backend='triton' computes in float32, got float64: cast, or backend='torch'")
        return False
    return found


def _words(target: Tensor, mask: Tensor | None, ignore_index: int, vocab: int) -> Tensor:
    """Returns (N,) int64 targets, SKIP where left out and OUTSIDE where no word."""
    kept = target != ignore_index if mask is None else mask & (target != ignore_index)
    inside = (target >= 0) & (target < vocab)
    return torch.where(kept, torch.where(inside, target.long(), OUTSIDE), SKIP).reshape(-1)


def _heat(temperature: float | Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if isinstance(temperature, Tensor):
        return temperature.detach().to(words.device, wide).reshape(-1).reciprocal()
    return torch.full(words.shape, 1.0 / temperature, dtype=wide, device=words.device)


def _rows(values: Tensor) -> Tensor:
    """Returns (N, C) rows, each contiguous; a slice of a bigger tensor stays a view where it can."""
    flat = values.reshape(-1, values.shape[-1])
    return flat if flat.stride(-1) == 1 or (flat.shape[-1] == 1 and flat.is_contiguous()) else flat.contiguous()


def _workspace(hidden: Tensor) -> int:
    if not hidden.is_cuda:
        return 16 * MIB
    return min(2048 * MIB, torch.cuda.get_device_properties(hidden.device).total_memory // 50)


def _log_probs(found: tuple[Tensor, ...], words: Tensor, heat: Tensor, shape: torch.Size, entropy: bool) -> LogProbs:
    log_prob, spread, top, log_total = found
    total = torch.where(words == SKIP, 0.0, torch.where(top.isneginf(), -torch.inf, top * heat + log_total))
    return LogProbs(log_prob.view(shape), spread.view(shape) if entropy else None, total.detach().view(shape))
