"""Sampler: draws reasoning and image tokens with a KV cache; each prompt is prefilled once for its group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import Tensor

from reasonrl.kernels import log_softmax
from reasonrl.noise import choose

if TYPE_CHECKING:
    from reasonrl.policies.janus import JanusModule, SpecialTokens


@frozen(eq=False)
class Drawn:
    """What was drawn for N rows, on the CPU; log-probs are float32 nats of the distribution drawn from."""

    text: Tensor
    """(N, T) ids, begin-of-image last, padded behind it."""
    text_lengths: Tensor
    text_forced: Tensor
    """(N, T) bool: appended, not drawn."""
    text_log_probs: Tensor
    image: Tensor
    image_log_probs: Tensor


@frozen(eq=False)
class Sampler:
    """One call of `draw` is one batch of whole groups."""

    module: JanusModule
    special: SpecialTokens
    guidance: float
    temperature: float

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[Tensor],
        group_size: int,
        *,
        text_uniforms: Tensor,
        image_uniforms: Tensor,
    ) -> Drawn:
        """Returns rows p * group_size + g. One float64 uniform an action, drawn up front, decides each token."""
        device = next(self.module.parameters()).device
        tokens, present = _left_padded(prompts, self.special.pad, device)
        branch = _Branch.of(self.module, tokens, present).repeated(group_size)
        text = self._draw_text(branch, text_uniforms.to(device))
        rows = [torch.cat([p.to(device), text.ids[i, : text.lengths[i]]]) for i, p in _each(prompts, group_size)]
        blind = self._unconditional(rows) if self.guidance != 1.0 else None
        image, image_log_probs = self._draw_image(branch, text.states, blind, image_uniforms.to(device))
        return Drawn(
            text.ids.cpu(),
            text.lengths.cpu(),
            text.forced.cpu(),
            text.log_probs.cpu(),
            image.cpu(),
            image_log_probs.cpu(),
        )

    def _draw_text(self, branch: _Branch, uniforms: Tensor) -> _Text:
        """Draws until every row has written begin-of-image; the last position, or what follows an end, is forced."""
        num_rows, most = uniforms.shape
        begin, pad = self.special.begin_image, self.special.pad
        ids = torch.full((num_rows, most), pad, device=uniforms.device)
        forced = torch.zeros(num_rows, most, dtype=torch.bool, device=uniforms.device)
        log_probs = torch.zeros(num_rows, most, device=uniforms.device)
        lengths = torch.zeros(num_rows, dtype=torch.long, device=uniforms.device)
        states = torch.zeros_like(branch.state)
        writing = torch.ones(num_rows, dtype=torch.bool, device=uniforms.device)
        ended = torch.zeros_like(writing)
        for t in range(most):
            every = log_softmax(self.module.text_logits(branch.state), temperature=self.temperature)
            token = choose(every, uniforms[:, t])
            must = ended | torch.full_like(ended, t == most - 1)
            token = torch.where(must, begin, token)
            picked = every.gather(1, token[:, None]).squeeze(1).float()
            ids[:, t] = torch.where(writing, token, pad)
            forced[:, t] = must & writing
            log_probs[:, t] = torch.where(writing, picked, 0.0)
            lengths += writing.long()
            branch.step(self.module.model.get_input_embeddings()(ids[:, t]), writing)
            done = writing & (token == begin)
            states = torch.where(done[:, None], branch.state, states)
            ended = token == self.special.end_text
            writing = writing & ~done
            if not writing.any():
                break
        used = int(lengths.max())
        return _Text(ids[:, :used], lengths, forced[:, :used], log_probs[:, :used], states)

    def _draw_image(
        self, branch: _Branch, states: Tensor, blind: _Branch | None, uniforms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draws every image token from the guided distribution; both branches read the token that was drawn."""
        num_rows, num_tokens = uniforms.shape
        everyone = torch.ones(num_rows, dtype=torch.bool, device=uniforms.device)
        ids = torch.zeros(num_rows, num_tokens, dtype=torch.long, device=uniforms.device)
        log_probs = torch.zeros(num_rows, num_tokens, device=uniforms.device)
        branch.state = states
        for t in range(num_tokens):
            logits = self.module.image_logits(branch.state, None if blind is None else blind.state, self.guidance)
            every = log_softmax(logits, temperature=self.temperature)
            ids[:, t] = choose(every, uniforms[:, t])
            log_probs[:, t] = every.gather(1, ids[:, t, None]).squeeze(1).float()
            if t + 1 < num_tokens:
                embedded = self.module.embed_image(ids[:, t])
                branch.step(embedded, everyone)
                if blind is not None:
                    blind.step(embedded, everyone)
        return ids, log_probs

    def _unconditional(self, rows: Sequence[Tensor]) -> _Branch:
        """Returns the blanked branch of each row; rows of one length have the same prefix, computed once."""
        lengths = torch.tensor([len(row) for row in rows])
        sizes, which = lengths.unique(return_inverse=True)
        examples = [rows[int((which == i).nonzero()[0])] for i in range(len(sizes))]
        blanked = [self.module.unconditional(e[None], torch.tensor([len(e)], device=e.device))[0] for e in examples]
        tokens, present = _left_padded(blanked, self.special.pad, rows[0].device)
        return _Branch.of(self.module, tokens, present).selected(which.to(tokens.device))


@frozen(eq=False)
class _Text:
    ids: Tensor
    lengths: Tensor
    forced: Tensor
    log_probs: Tensor
    states: Tensor
    """(N, D): the state at begin-of-image, which predicts the first image token."""


class _Branch:
    """A growing KV cache of N rows with gaps: `present` says which positions a row may attend to."""

    def __init__(self, module: JanusModule, cache: Any, present: Tensor, state: Tensor) -> None:
        self.module, self.cache, self.present, self.state = module, cache, present, state

    @classmethod
    def of(cls, module: JanusModule, tokens: Tensor, present: Tensor) -> _Branch:
        """Prefills left-padded (N, L) tokens."""
        from reasonrl.policies.growing_cache import growing_cache

        cache = growing_cache()
        out = module.model.model.language_model(
            inputs_embeds=module.model.get_input_embeddings()(tokens),
            attention_mask=present.long(),
            position_ids=(present.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
        return cls(module, cache, present, out.last_hidden_state[:, -1])

    def repeated(self, times: int) -> _Branch:
        """Returns each row `times` times, without computing it again."""
        self.cache.batch_repeat_interleave(times)
        return _Branch(
            self.module,
            self.cache,
            self.present.repeat_interleave(times, 0),
            self.state.repeat_interleave(times, 0),
        )

    def selected(self, rows: Tensor) -> _Branch:
        """Returns the named rows, in order."""
        self.cache.batch_select_indices(rows)
        return _Branch(self.module, self.cache, self.present[rows], self.state[rows])

    def step(self, embedded: Tensor, real: Tensor) -> None:
        """Feeds one (N, D) input a row; where `real` is False it is a gap that nobody will attend to."""
        self.present = torch.cat([self.present, real[:, None]], 1)
        out = self.module.model.model.language_model(
            inputs_embeds=embedded[:, None],
            attention_mask=self.present.long(),
            position_ids=(self.present.sum(1, keepdim=True) - 1).clamp(min=0),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.state = out.last_hidden_state[:, -1]


def _left_padded(rows: Sequence[Tensor], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    length = max(len(row) for row in rows)
    tokens = torch.full((len(rows), length), pad, device=device)
    present = torch.zeros(len(rows), length, dtype=torch.bool, device=device)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :] = row.to(device)
        present[i, length - len(row) :] = True
    return tokens, present


def _each(prompts: Sequence[Tensor], group_size: int) -> list[tuple[int, Tensor]]:
    return [(p * group_size + g, prompt) for p, prompt in enumerate(prompts) for g in range(group_size)]
