"""Ways to the same log-probs: ours, torch's, and the peers' own, imported only to be measured."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from functools import cache

import torch
from attrs import frozen
from torch import Tensor
from torch.nn import functional as F

from reasonrl.bench.problems import CFG_WEIGHT, Problem, Table
from reasonrl.kernels import linear_log_prob, selective_log_prob

TRL_WORDS = 32768
"""Words of a block, as TRL's trainer sets it."""


@frozen
class Contender:
    """`ask` returns the (N,) log-probs of a problem."""

    name: str
    table: Table
    ask: Callable[[Problem], Tensor]
    needs: str = ""
    """A module to import; "" = none."""
    on: tuple[str, ...] = ("cpu", "cuda")
    trains: bool = True
    compiled: bool = False
    """Its first call compiles: that is no part of its memory."""

    def missing(self, device: str) -> str | None:
        """Returns why it cannot run here; None if it can."""
        if device not in self.on:
            return f"needs {self.on[0]}"
        top = self.needs.partition(".")[0]
        if top and importlib.util.find_spec(top) is None:
            return "not installed"
        if self.name == NATIVE and not hasattr(F, "linear_cross_entropy"):
            return "needs torch 2.13"
        return None


NATIVE = "torch linear_cross_entropy"


def _picked(log_probs: Tensor, problem: Problem) -> Tensor:
    return log_probs.gather(1, problem.target[:, None]).squeeze(1)


def _softmax_gather(logits: Tensor, problem: Problem) -> Tensor:
    return _picked(logits.log_softmax(1), problem)


def _rows(problem: Problem) -> Tensor:
    assert problem.logits is not None
    return problem.logits[:-1]


def _head(problem: Problem) -> tuple[Tensor, Tensor]:
    assert problem.hidden is not None
    assert problem.weight is not None
    return problem.hidden, problem.weight


def _bf16_logits(problem: Problem) -> Tensor:
    hidden, weight = _head(problem)
    return hidden @ weight.T


def _float32_logits(problem: Problem) -> Tensor:
    hidden, weight = _head(problem)
    return hidden.float() @ weight.float().T


def _liger_rows(problem: Problem) -> Tensor:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    assert problem.logits is not None
    found: Tensor = fused_selective_log_softmax(problem.logits[None], problem.target[None], temperature=1.0)
    return found[0]


def _liger(problem: Problem) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    found: Tensor = liger_fused_linear_cross_entropy(*_head(problem), problem.target, reduction="none")
    return -found


def _trl_rows(problem: Problem, logits: Tensor) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    found: Tensor = selective_log_softmax(logits[None], problem.target[None])
    return found[0]


def _trl(problem: Problem) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    block = min(TRL_WORDS, len(_head(problem)[1]))
    found: Tensor = ChunkedLogProbFunction.apply(*_head(problem), None, problem.target, 1.0, block, None, 1.0, ())[0]
    return found


def _cce(problem: Problem, *, exact: bool) -> Tensor:
    from cut_cross_entropy import LinearCrossEntropyImpl, linear_cross_entropy

    settings: dict[str, object] = {}
    if exact:  # the preset of newer releases; before them, the filter's switch
        settings = {"impl": "cce_exact"} if "CCE_EXACT" in LinearCrossEntropyImpl.__members__ else {"filter_eps": None}
    assert set(settings) <= set(inspect.signature(linear_cross_entropy).parameters)
    found: Tensor = linear_cross_entropy(*_head(problem), problem.target, reduction="none", **settings)
    return -found


def _native(problem: Problem) -> Tensor:
    found: Tensor = F.linear_cross_entropy(*_head(problem), problem.target, reduction="none")
    return -found


def _guided(problem: Problem, *, exact: bool) -> Tensor:
    return linear_log_prob(
        *_head(problem),
        problem.target,
        uncond_hidden=problem.uncond,
        cfg_weight=CFG_WEIGHT,
        precision="exact" if exact else "default",
    ).log_prob


def _two_heads(problem: Problem) -> Tensor:
    """Two products, our operator on their logits."""
    hidden, weight = _head(problem)
    assert problem.uncond is not None
    branches = (hidden @ weight.T, problem.uncond @ weight.T)
    found = selective_log_prob(branches[0], problem.target, uncond_logits=branches[1], cfg_weight=CFG_WEIGHT)
    return found.log_prob


def _two_heads_eager(problem: Problem, *, wide: bool) -> Tensor:
    hidden, weight = _head(problem)
    assert problem.uncond is not None
    branches = [hidden @ weight.T, problem.uncond @ weight.T]
    cond, uncond = [z.float() for z in branches] if wide else branches
    return _softmax_gather(uncond + CFG_WEIGHT * (cond - uncond), problem)


@cache
def _compiled() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(lambda logits, target: logits.float().log_softmax(1).gather(1, target[:, None])[:, 0])


@cache
def _compiled_head() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(lambda h, w, target: (h @ w.T).float().log_softmax(1).gather(1, target[:, None])[:, 0])


CONTENDERS = (
    Contender("reasonrl", "logits", lambda p: selective_log_prob(_rows(p), p.target).log_prob),
    Contender(
        "reasonrl, entropy too",
        "logits",
        lambda p: selective_log_prob(_rows(p), p.target, return_entropy=True).log_prob,
    ),
    Contender("torch eager, float32", "logits", lambda p: _softmax_gather(_rows(p).float(), p)),
    Contender("torch eager, bfloat16", "logits", lambda p: _softmax_gather(_rows(p), p)),
    Contender("torch.compile, float32", "logits", lambda p: _compiled()(_rows(p), p.target), compiled=True),
    Contender("trl selective_log_softmax", "logits", lambda p: _trl_rows(p, _rows(p)), "trl"),
    Contender("liger selective_log_softmax", "logits", _liger_rows, "liger_kernel", on=("cuda",), trains=False),
    Contender("reasonrl", "linear", lambda p: linear_log_prob(*_head(p), p.target).log_prob),
    Contender(
        "reasonrl, entropy too",
        "linear",
        lambda p: linear_log_prob(*_head(p), p.target, return_entropy=True).log_prob,
    ),
    Contender(
        "reasonrl, precision fast", "linear", lambda p: linear_log_prob(*_head(p), p.target, precision="fast").log_prob
    ),
    Contender("torch eager, float32 product", "linear", lambda p: _softmax_gather(_float32_logits(p), p), on=("cpu",)),
    Contender("torch eager, float32 softmax", "linear", lambda p: _softmax_gather(_bf16_logits(p).float(), p)),
    Contender("torch eager, bfloat16", "linear", lambda p: _softmax_gather(_bf16_logits(p), p)),
    Contender(
        "torch.compile, float32 softmax", "linear", lambda p: _compiled_head()(*_head(p), p.target), compiled=True
    ),
    Contender(NATIVE, "linear", _native),
    Contender("trl selective_log_softmax", "linear", lambda p: _trl_rows(p, _bf16_logits(p)), "trl"),
    Contender("trl ChunkedLogProb", "linear", _trl, "trl"),
    Contender("liger fused_linear_cross_entropy", "linear", _liger, "liger_kernel", on=("cuda",), compiled=True),
    Contender("cut-cross-entropy", "linear", lambda p: _cce(p, exact=False), "cut_cross_entropy", on=("cuda",)),
    Contender("cut-cross-entropy, exact", "linear", lambda p: _cce(p, exact=True), "cut_cross_entropy", on=("cuda",)),
    Contender("reasonrl", "guidance", lambda p: _guided(p, exact=False)),
    Contender("reasonrl, precision exact", "guidance", lambda p: _guided(p, exact=True)),
    Contender("two heads, reasonrl", "guidance", _two_heads),
    Contender("two heads, torch eager, float32", "guidance", lambda p: _two_heads_eager(p, wide=True)),
    Contender("two heads, torch eager, bfloat16", "guidance", lambda p: _two_heads_eager(p, wide=False)),
)
