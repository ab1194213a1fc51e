"""Sampler: draws reasoning and image tokens. What rows have in common is computed once, and finished rows leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from attrs import define, field, frozen
from torch import Tensor

from reasonrl.errors import ContractError
from reasonrl.kernels import ReadyHead, log_softmax
from reasonrl.noise import choose
from reasonrl.policies.cascade_cache import Cascade, Layers
from reasonrl.policies.llama_decoder import Decoder
from reasonrl.policies.stepper import Stepper

if TYPE_CHECKING:
    from reasonrl.policies.janus import JanusModule, SpecialTokens

FIRST_ROOM = 64
"""Reasoning tokens that there is room for at first; doubled as needed."""
LEAVE = 0.75
"""Finished rows leave when what remains is at most this share."""
LOOKS = 16
"""On CUDA, steps between two looks at who has finished: a look waits for the GPU."""


@frozen(eq=False)
class Tokens:
    """What was drawn for N rows; log-probs and entropies are float32 nats of the distribution drawn from."""

    ids: Tensor
    """(N, T) int64, padded behind each row's length."""
    log_probs: Tensor
    """(N, T)."""
    entropy: Tensor
    """(N, T)."""
    conditional: Tensor | None = None
    """(N, T) log-probs of the same tokens without guidance, where they were asked for."""

    def cpu(self) -> Tokens:
        """Returns a copy on the CPU."""
        alone = None if self.conditional is None else self.conditional.cpu()
        return Tokens(self.ids.cpu(), self.log_probs.cpu(), self.entropy.cpu(), alone)


@frozen(eq=False)
class Reasoned:
    """Reasoning of N rows, begin-of-image last, and the caches from which their images go on."""

    tokens: Tokens
    lengths: Tensor
    """(N,)."""
    forced: Tensor
    """(N, T) bool: appended, not drawn."""
    states: Tensor
    """(N, D): the state at begin-of-image, which predicts the first image token."""
    cache: Cascade
    begin: Tensor
    """(N,) tokens of each row's prompt."""


@define(eq=False)
class Sampler:
    """Draws from one state of the weights: make it anew when they have changed."""

    module: JanusModule
    special: SpecialTokens
    guidance: float
    temperature: float
    captures: bool = True
    """On CUDA, steps are captured as graphs."""
    conditional: bool = False
    """Record the image tokens' log-probs without guidance too."""
    _decoder: Decoder | None = field(default=None, init=False)
    _heads: dict[str, ReadyHead] = field(factory=dict, init=False)

    @torch.no_grad()
    def reason(self, prompts: Sequence[Tensor], group_size: int, uniforms: Tensor) -> Reasoned:
        """Returns rows p * group_size + g. One of the (N, most) float64 uniforms an action decides each token.

        A row writes until begin-of-image, which is forced after an end of text and in the last place.
        """
        tokens, lengths = _padded(prompts, self.special.pad, self.device)
        states, prefix = self.decoder.prefill(tokens)
        last = states[torch.arange(len(prompts), device=self.device), lengths - 1]
        seen = torch.arange(tokens.shape[1], device=self.device) < lengths[:, None]
        seen = seen[:, None].expand(-1, group_size, -1)
        writing = _Writing(
            self,
            Cascade(prefix, seen, capacity=min(FIRST_ROOM, uniforms.shape[1])),
            last.repeat_interleave(group_size, 0),
            uniforms.to(self.device),
        )
        return writing.run(prefix, seen)

    @torch.no_grad()
    def images(self, prefixes: Sequence[Tensor], per_prefix: int, uniforms: Tensor) -> Tokens:
        """Returns `per_prefix` images of each prefix, a whole row of ids up to and including begin-of-image.

        Row i * per_prefix + k is the k-th image of prefix i; uniforms (N, T) as in `reason`.
        """
        tokens, lengths = _padded(prefixes, self.special.pad, self.device)
        if (tokens[:, 0] != self.special.begin_text).any():
            raise ContractError(f"every prefix must begin with token {self.special.begin_text} (begin of text)")
        states, prefix = self.decoder.prefill(tokens)
        seen = (torch.arange(tokens.shape[1], device=self.device) < lengths[:, None])[:, None]
        cache = Cascade(prefix, seen.expand(-1, per_prefix, -1), capacity=uniforms.shape[1])
        last = states[torch.arange(len(prefixes), device=self.device), lengths - 1]
        return self._draw_images(
            cache, last.repeat_interleave(per_prefix, 0), lengths.repeat_interleave(per_prefix), uniforms
        )

    @torch.no_grad()
    def images_of(self, reasoned: Reasoned, per_plan: int, uniforms: Tensor) -> Tokens:
        """Returns `per_plan` images of each row of reasoning, from where it stopped."""
        num_tokens = uniforms.shape[1]
        cache = reasoned.cache
        if per_plan > 1:
            cache = cache.closed(per_plan, capacity=num_tokens)
        lengths = (reasoned.begin + reasoned.lengths).repeat_interleave(per_plan)
        return self._draw_images(cache, reasoned.states.repeat_interleave(per_plan, 0), lengths, uniforms)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    @property
    def num_image_tokens(self) -> int:
        """Tokens an image."""
        return int(self.module.model.config.vision_config.num_image_tokens)

    def head(self, name: str) -> ReadyHead:
        """Returns the ready last layer of the "text" or "image" head."""
        if name not in self._heads:
            model = self.module.model
            layer = model.lm_head if name == "text" else model.model.generation_head.vision_head
            self._heads[name] = ReadyHead(layer.weight, layer.bias)
        return self._heads[name]

    @property
    def decoder(self) -> Decoder:
        """The language model, ready for single tokens."""
        if self._decoder is None:
            self._decoder = Decoder(self.module.model.model.language_model)
        return self._decoder

    def _draw_images(self, cache: Cascade, states: Tensor, lengths: Tensor, uniforms: Tensor) -> Tokens:
        """Draws every image token from the guided distribution; both branches read the token that was drawn."""
        caches = [cache]
        if self.guidance != 1.0:
            blind, blind_states = self._unconditional(lengths, uniforms.shape[1])
            caches, states = [cache, blind], torch.cat([states, blind_states])
        return _Drawing(self, caches, states, uniforms.to(self.device)).run()

    def _unconditional(self, lengths: Tensor, num_tokens: int) -> tuple[Cascade, Tensor]:
        """Returns the branch in which all but the first and last of each row's `lengths` tokens are blanked.

        Its prefixes differ in length alone, so that the longest holds them all: it is computed once, a row sees as
        much of it as it is long, and adds its own begin-of-image.
        """
        longest = int(lengths.max())
        chain = torch.full((1, longest - 1), self.special.pad, device=self.device)
        chain[:, 0] = self.special.begin_text
        prefix = self.decoder.prefill(chain)[1]
        seen = torch.arange(longest - 1, device=self.device) < (lengths - 1)[:, None]
        cache = Cascade(prefix, seen[None], capacity=num_tokens + 1)
        begin = self.module.model.get_input_embeddings()(lengths.new_full((len(lengths),), self.special.begin_image))
        return cache, self.decoder.step(begin, [cache], spans=[1])


class _Writing:
    """Rows of reasoning under way. What `_step` touches stays in place: on CUDA a graph holds its address."""

    def __init__(self, sampler: Sampler, cache: Cascade, states: Tensor, uniforms: Tensor) -> None:
        self.sampler = sampler
        num_rows, most = uniforms.shape
        device = uniforms.device
        self.uniforms, self.most = uniforms, most
        # The last row is nobody's: rows that fill a rectangle write there.
        self.ids = torch.full((num_rows + 1, most), sampler.special.pad, device=device)
        self.forced = torch.zeros(num_rows + 1, most, dtype=torch.bool, device=device)
        self.log_probs = torch.zeros(num_rows + 1, most, device=device)
        self.entropy = torch.zeros(num_rows + 1, most, device=device)
        self.lengths = torch.zeros(num_rows + 1, dtype=torch.long, device=device)
        self.final = states.new_zeros(num_rows + 1, states.shape[1])
        self.begin = cache.begin
        self.time = torch.zeros(1, dtype=torch.long, device=device)
        self.parked: list[tuple[Tensor, Layers]] = []
        self._go_on(cache, states, torch.arange(num_rows, device=device))
        self.ended = torch.zeros(num_rows, dtype=torch.bool, device=device)

    def run(self, prefix: Layers, seen: Tensor) -> Reasoned:
        """Writes until every row has written begin-of-image."""
        looks = LOOKS if self.uniforms.is_cuda else 1
        for t in range(self.most):
            if t == self.cache.capacity:
                self.cache.grow(min(2 * t, self.most))
                self._new_stepper()
            self.stepper(t)
            if (t + 1) % looks == 0 or t + 1 == self.most:
                self._release()
                if not len(self.which):
                    break
        del self.cache, self.stepper  # what finished is put away: make room for where it goes
        num_rows = len(self.begin)
        lengths = self.lengths[:num_rows]
        used = int(lengths.max())
        tokens = Tokens(self.ids[:num_rows, :used], self.log_probs[:num_rows, :used], self.entropy[:num_rows, :used])
        cache = Cascade(prefix, seen, capacity=used + self.sampler.num_image_tokens)
        for rows, layers in self.parked:
            cache.put(rows, layers, lengths[rows])
        return Reasoned(tokens, lengths, self.forced[:num_rows, :used], self.final[:num_rows], cache, self.begin)

    def _go_on(self, cache: Cascade, states: Tensor, which: Tensor) -> None:
        """Goes on with the rows of a cache; `which` are their numbers, the last of all where a row is nobody's."""
        self.cache, self.states, self.which = cache, states.clone(), which
        self.writing = which < len(self.begin)
        self._new_stepper()

    def _new_stepper(self) -> None:
        self.stepper = Stepper(self._step, self.uniforms.device, captures=self.sampler.captures)

    def _step(self, bound: int) -> None:
        special = self.sampler.special
        every = log_softmax(self.sampler.head("text").logits(self.states), temperature=self.sampler.temperature)
        uniforms = self.uniforms[self.which.clamp(max=len(self.uniforms) - 1), self.time]
        must = self.ended | (self.time == self.most - 1)
        token = torch.where(must, special.begin_image, choose(every, uniforms))
        token = torch.where(self.writing, token, special.pad)
        picked = every.gather(1, token[:, None]).squeeze(1).float()
        # A row that has finished has gone on to other places in the cache, but nothing of it is written down.
        rows = torch.where(self.writing, self.which, len(self.begin))
        at = (rows, self.time.expand_as(rows))
        self.ids[at], self.forced[at] = token, must
        self.log_probs[at], self.entropy[at] = picked, _entropy(every)
        embedded = self.sampler.module.model.get_input_embeddings()(token)
        self.states.copy_(self.sampler.decoder.step(embedded, [self.cache], spans=[min(bound, self.cache.capacity)]))
        self.lengths[rows] = self.time + 1
        self.final[rows] = self.states
        self.ended.copy_(token == special.end_text)
        self.writing &= token != special.begin_image
        self.time += 1

    def _release(self) -> None:
        """Puts finished rows away, and goes on with a smaller rectangle where that is worth its copies."""
        num_rows = len(self.begin)
        left = self.writing.nonzero().squeeze(1)
        if len(left) and len(left) > LEAVE * len(self.which):
            return
        lines = [left[self.cache.behind[left] == line] for line in self.cache.behind[left].unique()]
        width = max((len(line) for line in lines), default=0)
        if lines and len(lines) * width > LEAVE * len(self.which):
            return
        done = (~self.writing & (self.which < num_rows)).nonzero().squeeze(1)
        used = self.time.item()
        self.parked.append(
            (self.which[done], [(k[:, :, :used].clone(), v[:, :, :used].clone()) for k, v in self.cache.take(done)])
        )
        # A line with fewer rows than the widest repeats its first, and whatever that writes is nobody's.
        rectangle = [torch.cat([line, line[:1].expand(width - len(line))]) for line in lines]
        nobody = [torch.arange(width, device=left.device) >= len(line) for line in lines]
        if not rectangle:
            self.which = left
            return
        rows = torch.stack(rectangle)
        flat, spare = rows.flatten(), torch.cat(nobody)
        self.ended = self.ended[flat]
        self._go_on(self.cache.selected(rows), self.states[flat], torch.where(spare, num_rows, self.which[flat]))


class _Drawing:
    """Image tokens under way: N conditional rows, and behind them as many unconditional ones where guided."""

    def __init__(self, sampler: Sampler, caches: Sequence[Cascade], states: Tensor, uniforms: Tensor) -> None:
        self.sampler, self.caches = sampler, caches
        self.states, self.uniforms = states.clone(), uniforms
        self.ids = torch.zeros(uniforms.shape, dtype=torch.long, device=uniforms.device)
        self.log_probs, self.entropy, self.conditional = (
            torch.zeros(uniforms.shape, device=uniforms.device) for _ in range(3)
        )
        self.time = torch.zeros(1, dtype=torch.long, device=uniforms.device)
        self.before = [int(cache.used.max()) for cache in caches]

    def run(self) -> Tokens:
        """Draws them all."""
        num_tokens = self.uniforms.shape[1]
        stepper = Stepper(self._step, self.uniforms.device, captures=self.sampler.captures)
        for t in range(num_tokens - 1):
            stepper(t)
        self._choose()
        asked = self.sampler.conditional and self.sampler.guidance != 1.0
        return Tokens(self.ids, self.log_probs, self.entropy, self.conditional if asked else None)

    def _step(self, bound: int) -> None:
        embedded = self.sampler.module.embed_image(self._choose()).repeat(len(self.caches), 1)
        spans = [min(before + bound, cache.capacity) for before, cache in zip(self.before, self.caches, strict=True)]
        self.states.copy_(self.sampler.decoder.step(embedded, self.caches, spans=spans))
        self.time += 1

    def _choose(self) -> Tensor:
        """Draws the token at `time` from the states, and writes it down."""
        sampler, head = self.sampler, self.sampler.head("image")
        states = sampler.module.before_image_head(self.states).chunk(len(self.caches))
        other = states[1] if len(states) > 1 else None
        logits = head.logits(states[0], uncond_hidden=other, cfg_weight=sampler.guidance)
        every = log_softmax(logits, temperature=sampler.temperature)
        uniforms = self.uniforms.index_select(1, self.time).squeeze(1)
        token = choose(every, uniforms)[:, None]
        self.ids.index_copy_(1, self.time, token)
        self.log_probs.index_copy_(1, self.time, every.gather(1, token).float())
        self.entropy.index_copy_(1, self.time, _entropy(every)[:, None])
        if sampler.conditional and other is not None:
            alone = log_softmax(head.logits(states[0]), temperature=sampler.temperature)
            self.conditional.index_copy_(1, self.time, alone.gather(1, token).float())
        return token.squeeze(1)


def _entropy(every: Tensor) -> Tensor:
    """Returns (N,) float32 nats of (N, V) log-probs; a token of probability 0 adds none."""
    return -(every.exp() * every.clamp(min=torch.finfo(every.dtype).min)).sum(1).float()


def _padded(rows: Sequence[Tensor], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns right-padded (P, L) ids, and (P,) lengths."""
    tokens = torch.nn.utils.rnn.pad_sequence([row.to(device) for row in rows], batch_first=True, padding_value=pad)
    return tokens, torch.tensor([len(row) for row in rows], device=device)
