"""How a batch is divided: groups stay whole, parts are as even as whole groups allow."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen

from reasonrl import Trajectory


@frozen
class Part:
    """Rows of a batch that one actor judges together."""

    groups: tuple[tuple[int, ...], ...]
    """Indices of the rows, one tuple for each prompt."""
    deaths: int = 0
    """How many actors died of it, or while they had it."""

    @property
    def rows(self) -> list[int]:
        """The indices in the order of the batch."""
        return sorted(row for group in self.groups for row in group)

    def apart(self) -> list[Part]:
        """Returns its groups one by one with a death more: what kills an actor then takes nothing else along."""
        return [Part((group,), self.deaths + 1) for group in self.groups]


def split(trajectories: Sequence[Trajectory], number: int) -> list[Part]:
    """Returns at most `number` parts, none empty; all trajectories of one prompt id are in one of them."""
    groups: dict[str, list[int]] = {}
    for row, trajectory in enumerate(trajectories):
        groups.setdefault(trajectory.prompt.id, []).append(row)
    shares: list[list[tuple[int, ...]]] = [[] for _ in range(number)]
    for group in sorted(groups.values(), key=len, reverse=True):  # stable: the largest first, each to the least loaded
        min(shares, key=lambda share: sum(map(len, share))).append(tuple(group))
    return [Part(tuple(share)) for share in shares if share]
