"""One language model that writes plans: how it reads prompts, and its log-probs in one forward."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import define
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from reasonrl.errors import ConfigError, DataError
from reasonrl.kernels import LogProbs, ReadyHead, linear_log_prob, log_softmax, selective_log_prob
from reasonrl.noise import choose
from reasonrl.policies.janus_sampler import LEAVE, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT_IDS = "prompt_ids"
INPUT = "model."
"""How a segment's context names what the model reads of a prompt besides its ids: pictures, kinds of tokens."""
KINDS = "token_type_ids"
"""How names of inputs end that have a number a token; all others hold pictures, joined along their first axis."""


class PlannerModule(nn.Module):
    """Wraps a causal model so that log-probs are computed inside forward, of the states that are asked for alone."""

    def __init__(self, model: PreTrainedModel, *, recomputes: bool) -> None:
        super().__init__()
        self.model = model
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._recomputed = _recomputed(model) if recomputes else []
        self.plain = False  # until shown otherwise
        self.plain = self._shown_plain()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def forward(
        self, inputs: Mapping[str, Tensor], places: Tensor, targets: Tensor, *, temperature: float, entropy: bool
    ) -> LogProbs:
        """Returns (K,) float32 log-probs of `targets`, each predicted at one of the `places` of the flattened rows."""
        with self._recomputing():
            found, _ = self._answered(inputs, places, use_cache=False)
        if not self.plain:
            return selective_log_prob(found, targets, temperature=temperature, return_entropy=entropy)
        head = self.head
        return linear_log_prob(
            found, head.weight, targets, bias=head.bias, temperature=temperature, return_entropy=entropy
        )

    @property
    def head(self) -> Any:
        """The layer that makes logits of states."""
        return self.model.get_output_embeddings()

    @torch.no_grad()
    def write(
        self,
        prompts: Sequence[Mapping[str, Tensor]],
        group_size: int,
        uniforms: Tensor,
        *,
        temperature: float,
        ends: Sequence[int],
        pad: int,
    ) -> tuple[Tokens, Tensor]:
        """Returns rows p * group_size + g with their (N,) lengths; one of (N, most) uniforms an action decides it.

        A prompt is read once for its group. Rows that have ended leave once they are a quarter.
        """
        uniforms, stops = uniforms.to(self.device), torch.tensor(ends, device=self.device)
        num_rows, most = uniforms.shape
        ids = torch.full((num_rows, most), pad, device=self.device)
        log_probs, entropy = (torch.zeros(num_rows, most, device=self.device) for _ in range(2))
        lengths = torch.zeros(num_rows, dtype=torch.long, device=self.device)
        which, going = torch.arange(num_rows, device=self.device), torch.ones_like(lengths, dtype=torch.bool)
        reading = _Reading.of(self, prompts, pad)
        reading.select(torch.arange(len(prompts), device=self.device).repeat_interleave(group_size))
        for t in range(most):
            every = log_softmax(reading.logits, temperature=temperature)
            token = choose(every, uniforms[which, t])
            rows = which[going]
            ids[rows, t] = token[going]
            log_probs[rows, t] = every.gather(1, token[:, None]).squeeze(1)[going].float()
            entropy[rows, t] = torch.special.entr(every.exp()).sum(1)[going].float()
            lengths[rows] = t + 1
            going = going & ~torch.isin(token, stops)
            left = going.nonzero().squeeze(1)
            if not len(left) or t + 1 == most:
                break
            if len(left) <= LEAVE * len(which):
                reading.select(left)
                which, token, going = which[left], token[left], going[left]
            reading.go_on(token)
        used = int(lengths.max())
        return Tokens(ids[:, :used], log_probs[:, :used], entropy[:, :used]), lengths

    def _answered(self, inputs: Mapping[str, Tensor], places: Tensor, **settings: Any) -> tuple[Tensor, Any]:
        """Returns the (K, D) states at these places, or (K, V) logits where the head is not plain; and the output.

        The model runs whole, and its head is shown the states that are wanted alone: whatever it does to logits (a
        soft cap, a scale) it does to those, and a plain head's work is left to our kernel.
        """
        kept: list[Tensor] = []

        def pick(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            kept.append(given[0].flatten(0, 1)[places])
            return ((kept[0][:0] if self.plain else kept[0])[None],)

        handle = self.head.register_forward_pre_hook(pick)
        try:
            out = self.model(**inputs, **settings)
        finally:
            handle.remove()
        return kept[0] if self.plain else out.logits.flatten(0, 1), out

    @contextlib.contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Inside, layers recompute: transformers asks their `training`. What they hold, dropout too, stays as it is."""
        for layer in self._recomputed:
            layer.training = True
        try:
            yield
        finally:
            for layer in self._recomputed:
                layer.training = False

    @torch.no_grad()
    def _shown_plain(self) -> bool:
        """Returns whether logits are the head's output as it is; ConfigError for what cannot write from left to right.

        Shown, not looked up: two rows that differ in their last token say what a configuration may not.
        """
        name, head = type(self.model).__name__, self.head
        if not isinstance(head, nn.Module):
            raise ConfigError(f"{name} has no language model's head: give a causal language model")
        given: list[Tensor] = []
        made: list[Tensor] = []

        def watch(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            given.append(args[0])
            made.append(out)

        handle = head.register_forward_hook(watch)
        ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]]) % self.model.get_input_embeddings().weight.shape[0]
        try:
            with self._recomputing():
                out = self.model(input_ids=ids, use_cache=not self._recomputed)
        finally:
            handle.remove()
        if not given:
            raise ConfigError(f"{name} makes logits without its head: give a model with a head of its own")
        one, other = given[0][:, :-1].float()
        near = (1e-4 if given[0].dtype == torch.float32 else 2e-2) * float(one.abs().max())
        if not torch.allclose(one, other, atol=near, rtol=0):
            raise ConfigError(
                f"{name} says another thing of a text's beginning when its end changes: it attends to what comes later,"
                " or uses dropout while it recomputes; give a causal model, and set dropout to 0 in config.json"
            )
        if not self._recomputed and getattr(out, "past_key_values", None) is None:
            raise ConfigError(f"{name} keeps no cache of what it has read: give a model that generates with a cache")
        return type(head) is nn.Linear and torch.equal(out.logits.float(), made[0].float())


@define(eq=False)
class _Reading:
    """Rows under way: what was read, and the logits of what comes next."""

    module: PlannerModule
    head: ReadyHead | None
    cache: Any
    seen: Tensor
    """(N, L) 1 where a place holds a token."""
    positions: Tensor | None
    """(N, 1) or (axes, N, 1) of the next token; None = the model counts by itself."""
    logits: Tensor
    """(N, V) float32."""

    @classmethod
    def of(cls, module: PlannerModule, prompts: Sequence[Mapping[str, Tensor]], pad: int) -> _Reading:
        """Reads prompts, padded on the left so that all go on in one column."""
        inputs = rectangle(prompts, pad=pad, device=module.device, side="left")
        seen = inputs["attention_mask"]
        pictures = len(inputs) > 2
        if module._takes_positions and not pictures:
            inputs["position_ids"] = (seen.cumsum(1) - 1).clamp(min=0)
        places = torch.arange(1, len(seen) + 1, device=seen.device) * seen.shape[1] - 1
        with _watched_positions(module.model) as found:
            states, out = module._answered(_cast(inputs, module.model.dtype), places, use_cache=True)
        positions = found[0] if pictures else inputs.get("position_ids")
        if positions is not None:  # a picture's tokens may have theirs on several axes: what follows is behind all
            axes = positions[None] if positions.dim() == 2 else positions
            after = axes.amax((0, 2))[:, None] + 1
            positions = after if positions.dim() == 2 else after.expand(len(axes), -1, -1)
        head = ReadyHead(module.head.weight, module.head.bias) if module.plain else None
        logits = states.float() if head is None else head.logits(states)
        return cls(module, head, out.past_key_values, seen, positions, logits)

    def select(self, rows: Tensor) -> None:
        """Goes on with these rows, in this order; a row may be given several times."""
        self.cache.reorder_cache(rows)
        self.seen, self.logits = self.seen[rows], self.logits[rows]
        self.positions = None if self.positions is None else self.positions.index_select(-2, rows)

    def go_on(self, token: Tensor) -> None:
        """Reads (N,) tokens."""
        self.seen = torch.cat([self.seen, torch.ones_like(self.seen[:, :1])], 1)
        inputs = {"input_ids": token[:, None], "attention_mask": self.seen, "past_key_values": self.cache}
        if self.positions is not None:
            inputs["position_ids"] = self.positions
            self.positions = self.positions + 1
        places = torch.arange(len(token), device=token.device)
        states, out = self.module._answered(inputs, places, use_cache=True)
        self.cache = out.past_key_values
        self.logits = states.float() if self.head is None else self.head.logits(states)


def rectangle(
    prompts: Sequence[Mapping[str, Tensor]],
    plans: Sequence[Tensor] | None = None,
    *,
    pad: int,
    device: torch.device,
    side: str = "right",
) -> dict[str, Tensor]:
    """Returns the model's inputs of prompts, each with its plan behind it: ids, mask, and pictures where there are any.

    Rows without a picture have the kinds of their tokens beside the others' pictures; without any, both are left out.
    """
    plans = plans or [torch.zeros(0, dtype=torch.long)] * len(prompts)

    def padded(rows: Sequence[Tensor], value: int = 0) -> Tensor:
        return pad_sequence([r.to(device) for r in rows], True, value, side)

    def line(name: str, row: int, *, kinds: bool = False) -> Tensor:
        tail = plans[row].to(device)
        return torch.cat([prompts[row][name].to(device), torch.zeros_like(tail) if kinds else tail])

    ids = [line(PROMPT_IDS, row) for row in range(len(prompts))]
    found = {"input_ids": padded(ids, pad), "attention_mask": padded([torch.ones_like(row) for row in ids])}
    names = [name for name in prompts[0] if name.startswith(INPUT)]
    _refuse_ragged(prompts, names)
    pictures = {n: torch.cat([p[n].to(device) for p in prompts]) for n in names if not n.endswith(KINDS)}
    if any(len(value) for value in pictures.values()):
        kinds = {n: padded([line(n, r, kinds=True) for r in range(len(ids))]) for n in names if n.endswith(KINDS)}
        found |= {name.removeprefix(INPUT): value for name, value in (pictures | kinds).items()}
    return found


def _refuse_ragged(prompts: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> None:
    """Refuses pictures that do not make one batch: flat patches do, whatever their number; tiles may not."""
    for name in names:
        shapes = {tuple(p[name].shape[1:]) for p in prompts if not name.endswith(KINDS) and len(p[name])}
        if len(shapes) > 1:
            raise DataError(
                f"pictures become {name.removeprefix(INPUT)} of {' and '.join(map(str, sorted(shapes)))}, which make no"
                " batch: give all prompts pictures of one size, or take a model of flat patches (Qwen2.5-VL, Qwen3-VL)"
            )


def _cast(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the inputs with pictures in the weights' dtype."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


@contextlib.contextmanager
def _watched_positions(model: PreTrainedModel) -> Iterator[list[Tensor | None]]:
    """Yields what will hold the positions that a model gives the tokens of its prompts."""
    found: list[Tensor | None] = []

    def watch(_: nn.Module, args: Any, settings: Mapping[str, Any]) -> None:
        found.append(settings.get("position_ids"))

    handle = model.get_decoder().register_forward_pre_hook(watch, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def _recomputed(model: PreTrainedModel) -> list[nn.Module]:
    """Lets layers compute their insides again in backward, and returns them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    decoder = model.get_decoder()
    layers = [layer for layer in decoder.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(f"{type(model).__name__} cannot recompute its layers: set gradient_checkpointing=False")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer releases rename it, older ones know no other
        decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return layers
