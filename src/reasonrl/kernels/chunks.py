"""How a head's logits are cut so that a piece fits a workspace. A pure function of shapes: reproducible."""

from __future__ import annotations

from functools import lru_cache
from math import ceil

from attrs import frozen

ALIGN = 256
MIB = 2**20


@frozen
class Plan:
    """Logits are made in blocks of `rows` tokens by `cols` words."""

    rows: int
    cols: int

    def blocks(self, num_rows: int, vocab: int) -> list[tuple[int, int, int, int]]:
        """Returns (v0, v1, r0, r1), words outermost: a slice of the weight is made ready once."""
        return [
            (v, min(v + self.cols, vocab), r, min(r + self.rows, num_rows))
            for v in range(0, vocab, self.cols)
            for r in range(0, num_rows, self.rows)
        ]


@lru_cache(maxsize=256)
def plan(num_rows: int, vocab: int, width: int, *, workspace: int, item: int, learns_weight: bool) -> Plan:
    """Returns the plan of least accumulation traffic whose block of `item` bytes an element fits the workspace.

    Traffic in bytes, both terms in float32 read-modify-write: 8·N·H a further column block (hidden's gradient), and
    8·V·H a further row block (the weight's, if it learns).
    """
    budget = max(workspace // item, ALIGN * ALIGN)
    best: tuple[float, int, Plan] | None = None
    for num in range(1, max(2, ceil(num_rows / ALIGN)) + 1):
        rows = ceil(max(num_rows, 1) / num)
        cols = _aligned(budget // rows, vocab)
        if cols == 0:
            continue
        row_blocks, col_blocks = ceil(num_rows / rows), ceil(vocab / cols)
        traffic = 8.0 * num_rows * width * (col_blocks - 1)
        if learns_weight:
            traffic += 8.0 * vocab * width * (row_blocks - 1)
        found = (traffic, row_blocks * col_blocks, Plan(rows, cols))
        best = found if best is None or found[:2] < best[:2] else best
    assert best is not None, "a block of ALIGN x ALIGN always fits"
    return best[2]


def cpu_plan(num_rows: int, vocab: int, width: int, *, workspace: int, learns_weight: bool) -> Plan:
    """Returns the plan for a CPU: many rows and few words, since float32 copies of the operands are in the block too.

    The rows' copy takes rows·width·4; a block of words rows·cols·8 (logits and their exponentials) and cols·width·8
    (the slice of the weight, and oneDNN's copy of it). A weight that learns is given all rows at once where their
    copy is smaller than the float32 sum, vocab·width·4, that several row blocks would add to.
    """
    rows = min(max(num_rows, 1), 2048)
    if learns_weight and num_rows * (4 * width + 8 * ALIGN) < 4 * vocab * width:
        rows = max(num_rows, 1)
    cols = _aligned(max(workspace - 4 * rows * width, 0) // (8 * (rows + width)), vocab)
    return Plan(rows, cols or min(vocab, ALIGN))


def _aligned(most: int, vocab: int) -> int:
    """Returns equal blocks of at most `most` words, a multiple of ALIGN; 0 = none fits."""
    if most >= vocab:
        return vocab
    most = most // ALIGN * ALIGN
    if most == 0:
        return 0
    return min(ceil(ceil(vocab / ceil(vocab / most)) / ALIGN) * ALIGN, most)
