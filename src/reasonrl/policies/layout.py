"""Layout: a batch as the language model reads it, packed on one line or padded to rows, and where its answers are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from attrs import define, field, frozen
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from reasonrl.policies.packed_attention import Range, Runs

if TYPE_CHECKING:
    from reasonrl.policies.janus import SpecialTokens
    from reasonrl.types import Batch, Stage

REASONING, IMAGE = "reasoning", "image"


@frozen(eq=False)
class Line:
    """R rows of L tokens, each a word or an image token."""

    words: Tensor
    """(S,) ids of words."""
    codes: Tensor
    """(I,) ids of image tokens."""
    source: Tensor
    """(R, L) places in `words`, and behind them in `codes`."""
    positions: Tensor
    """(R, L)."""
    runs: Runs | None
    """Who sees whom on the one row; None = each row is causal by itself."""


@frozen(eq=False)
class Asked:
    """Tokens whose log-probs are wanted, and the places of the states that predict them, rows flattened."""

    ids: Tensor
    places: Tensor
    blind: Tensor | None = None
    """Places of the unconditional branch's states."""


@frozen(eq=False)
class Layout:
    """What one replay reads."""

    line: Line
    blind: Line | None
    """The unconditional branch, where it has a line of its own; else it is on `line`."""
    words: Asked | None
    codes: Asked | None


def laid_out(
    batch: Batch,
    wanted: Mapping[str, object],
    special: SpecialTokens,
    *,
    guided: bool,
    packed: bool,
    apart: bool,
) -> Layout:
    """Returns the layout of a batch's wanted stages.

    Packed: rows follow each other without padding, a prompt or plan that several rows share stands there once, and
    so does the unconditional branch's prefix, which the longest row's holds for all. Padded: two rectangles of
    rows, that share nothing. `apart` gives the unconditional branch a line of its own, for a pass without gradient.
    """
    reasoning = batch.stages[REASONING]
    image = batch.stages.get(IMAGE) if IMAGE in wanted else None
    rows = _Rows.of(reasoning, image, special)
    found = (_packed if packed else _padded)(rows, guided=guided and image is not None, apart=apart)
    words = _asked(reasoning, found.words) if REASONING in wanted else None
    codes = None if image is None else _asked(image, found.codes, found.blind_codes)
    return Layout(found.line, found.blind, words, codes)


def _asked(stage: Stage, places: Sequence[Tensor], blind: Sequence[Tensor] | None = None) -> Asked | None:
    mask, device = stage.mask, stage.mask.device
    if not mask.any():
        return None

    def masked(lines: Sequence[Tensor]) -> Tensor:
        whole = torch.zeros(mask.shape, dtype=torch.long)
        for row, line in enumerate(lines):
            whole[row, : len(line)] = line
        return whole.to(device)[mask]

    return Asked(stage.actions[mask], masked(places), None if blind is None else masked(blind))


@frozen(eq=False)
class _Rows:
    """Each row's tokens as places in `words` and, behind them, in `codes`."""

    words: Tensor
    codes: Tensor
    prompts: list[Tensor]
    plans: list[Tensor]
    """With begin-of-image at the end."""
    images: list[Tensor]
    """Without the last token, which predicts nothing."""
    num_codes: list[int]
    """Image tokens, the last one too; 0 = none."""
    blank: list[bool]
    """The row's image sees the unconditional prefix instead of its own."""
    same: list[tuple[bytes, bytes]]
    """Prompt and plan: equal where rows have the same."""

    @classmethod
    def of(cls, reasoning: Stage, image: Stage | None, special: SpecialTokens) -> _Rows:
        given = reasoning.context["prompt_ids"]
        device, num_rows = reasoning.actions.device, len(given)
        prompt_lengths = torch.tensor([len(p) for p in given])
        ends = prompt_lengths.cumsum(0)
        lengths = reasoning.present.sum(1).tolist()
        ids = reasoning.actions.cpu()
        width, first = reasoning.actions.shape[1], int(ends[-1])
        alone = torch.tensor([special.begin_text, special.pad, special.begin_image], device=device)
        words = torch.cat([*given, reasoning.actions.flatten(), alone])
        prompts = [torch.arange(int(end) - len(p), int(end)) for p, end in zip(given, ends, strict=True)]
        plans = [first + row * width + torch.arange(length) for row, length in enumerate(lengths)]
        same = [
            (p.cpu().numpy().tobytes(), ids[row, :length].numpy().tobytes())
            for row, (p, length) in enumerate(zip(given, lengths, strict=True))
        ]
        if image is None:
            nothing = [torch.zeros(0, dtype=torch.long)] * num_rows
            none = torch.zeros(0, dtype=torch.long, device=device)
            return cls(words, none, prompts, plans, nothing, [0] * num_rows, [False] * num_rows, same)
        counts = image.present.sum(1).tolist()
        width = image.actions.shape[1]
        images = [len(words) + row * width + torch.arange(max(0, n - 1)) for row, n in enumerate(counts)]
        blank = [b is not None and bool(b) for b in image.context["blank"]]
        return cls(words, image.actions.flatten(), prompts, plans, images, counts, blank, same)

    @property
    def begin_text(self) -> Tensor:
        return torch.tensor([len(self.words) - 3])

    @property
    def begin_image(self) -> Tensor:
        return torch.tensor([len(self.words) - 1])

    def length(self, row: int) -> int:
        """Tokens up to and including begin-of-image."""
        return len(self.prompts[row]) + len(self.plans[row])

    def chain(self, length: int) -> Tensor:
        """Returns the unconditional prefix's first tokens: begin of text, then padding."""
        return torch.cat([self.begin_text, torch.full((max(0, length - 1),), len(self.words) - 2)])[:length]

    def line(self, source: Tensor, positions: Tensor, runs: Runs | None) -> Line:
        device = self.words.device
        return Line(self.words, self.codes, source.to(device), positions.to(device), runs)


@frozen(eq=False)
class _Found:
    """Lines, and each row's places of the states that predict its words and its image tokens."""

    line: Line
    blind: Line | None
    words: list[Tensor]
    codes: list[Tensor]
    blind_codes: list[Tensor] | None


@define(eq=False)
class _Building:
    """A line under way."""

    rows: _Rows
    sources: list[Tensor] = field(factory=list)
    positions: list[Tensor] = field(factory=list)
    before: list[tuple[Range, ...]] = field(factory=list)
    cuts: list[int] = field(factory=lambda: [0])

    def add(self, source: Tensor, at: int, before: tuple[Range, ...] = ()) -> Range:
        """Adds a run whose first token is at position `at`, and returns its range."""
        self.sources.append(source)
        self.positions.append(at + torch.arange(len(source)))
        self.before.append(tuple(r for r in before if r[1] > r[0]))
        self.cuts.append(self.cuts[-1] + len(source))
        return self.cuts[-2], self.cuts[-1]

    def line(self) -> Line:
        runs = Runs(tuple(self.cuts), tuple(self.before), self.rows.words.device)
        return self.rows.line(torch.cat(self.sources)[None], torch.cat(self.positions)[None], runs)


def _packed(rows: _Rows, *, guided: bool, apart: bool) -> _Found:
    main = _Building(rows)
    other = _Building(rows) if apart else main
    heads: dict[bytes, Range] = {}
    tails: dict[tuple[bytes, bytes], Range] = {}
    words, codes, blind_codes = [], [], []
    longest = max((rows.length(row) for row, n in enumerate(rows.num_codes) if n), default=1) - 1
    chains: dict[int, Range] = {}

    def blind(building: _Building, row: int) -> Tensor:
        """Adds a row of the unconditional branch, and returns the places of its states."""
        if id(building) not in chains:
            chains[id(building)] = building.add(rows.chain(longest), 0)
        start, seen = chains[id(building)][0], rows.length(row) - 1
        run = building.add(torch.cat([rows.begin_image, rows.images[row]]), seen, ((start, start + seen),))
        return torch.arange(*run)

    for row, tail in enumerate(rows.same):
        if tail[0] not in heads:
            heads[tail[0]] = main.add(rows.prompts[row], 0)
        prompt = heads[tail[0]]
        if tail not in tails:
            tails[tail] = main.add(rows.plans[row], len(rows.prompts[row]), (prompt,))
        plan = tails[tail]
        words.append(torch.cat([torch.tensor([prompt[1] - 1]), torch.arange(plan[0], plan[1] - 1)]))
        if not rows.num_codes[row]:
            codes.append(torch.zeros(0, dtype=torch.long))
        elif rows.blank[row]:
            codes.append(blind(main, row))
        else:
            image = main.add(rows.images[row], rows.length(row), (prompt, plan)) if len(rows.images[row]) else (0, 0)
            codes.append(torch.cat([torch.tensor([plan[1] - 1]), torch.arange(*image)]))
        if guided:
            blind_codes.append(blind(other, row) if rows.num_codes[row] else torch.zeros(0, dtype=torch.long))
    separate = other.line() if guided and apart else None
    return _Found(main.line(), separate, words, codes, blind_codes if guided else None)


def _padded(rows: _Rows, *, guided: bool, apart: bool) -> _Found:
    numbers = range(len(rows.prompts))

    def unseen(row: int) -> Tensor:
        return torch.cat([rows.chain(rows.length(row) - 1), rows.begin_image])

    prefixes = [
        unseen(row) if rows.blank[row] and rows.num_codes[row] else torch.cat([rows.prompts[row], rows.plans[row]])
        for row in numbers
    ]
    lines = [torch.cat([prefixes[row], rows.images[row]]) for row in numbers]
    blind = [torch.cat([unseen(row), rows.images[row]]) for row in numbers] if guided else []
    line = _rectangle(rows, lines if apart else [*lines, *blind])
    separate = _rectangle(rows, blind) if guided and apart else None
    width = line.source.shape[1]
    words = [row * width + len(rows.prompts[row]) - 1 + torch.arange(len(rows.plans[row])) for row in numbers]
    codes = [row * width + rows.length(row) - 1 + torch.arange(rows.num_codes[row]) for row in numbers]
    if not guided:
        return _Found(line, None, words, codes, None)
    other = width if separate is None else separate.source.shape[1]
    first = 0 if apart else len(lines)
    blind_codes = [(first + row) * other + rows.length(row) - 1 + torch.arange(rows.num_codes[row]) for row in numbers]
    return _Found(line, separate, words, codes, blind_codes)


def _rectangle(rows: _Rows, lines: Sequence[Tensor]) -> Line:
    """Padding is on the right and attention is causal, so no mask is needed."""
    source = pad_sequence(list(lines), batch_first=True, padding_value=len(rows.words) - 2)
    return rows.line(source, torch.arange(source.shape[1]).expand(len(source), -1), None)
