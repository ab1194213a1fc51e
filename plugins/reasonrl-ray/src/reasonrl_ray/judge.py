"""OnRay: any judge on a pool of Ray actors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, final

from attrs import field, frozen, validators

from reasonrl import Judge, Trajectory, Verdict

if TYPE_CHECKING:
    from reasonrl_ray.pool import Pool


@final
@frozen
class OnRay(Judge):
    """A judge's verdicts, given by copies of it in `num_actors` processes of Ray; the range is the judge's.

    Trajectories of one prompt stay together. An actor that dies is replaced, and what it had is judged again, group
    by group; a group of which more than `max_restarts` actors die abstains with "actor died: ...". What the judge
    raises is raised here: its ReasonRLErrors as they are, anything else as a JudgeError.

    A Ray that the process is connected to, or that runs on this machine, is used and left running; else one is
    started with the first judgement. `close()`, or leaving a `with` block, ends what was started.
    """

    part: Judge
    num_actors: int = field(default=2, validator=validators.gt(0), kw_only=True)
    num_cpus: float = field(default=1.0, validator=validators.ge(0), kw_only=True)
    """What each actor reserves; Ray also limits its threads to this."""
    num_gpus: float = field(default=0.0, validator=validators.ge(0), kw_only=True)
    """What each actor reserves: 0.5 puts two on one GPU, 0 hides GPUs from them."""
    max_restarts: int = field(default=1, validator=validators.ge(0), kw_only=True)
    """How often a group is judged again after the death of its actor."""
    timeout_s: float = field(default=300.0, validator=validators.gt(0), kw_only=True)
    """For one call, after Ray is up. Keep it below the recipe's judge_timeout_s: then only what hangs abstains."""
    address: str | None = field(default=None, kw_only=True)
    """Of a running Ray; "auto" = there must be one on this machine, "local" = start one; None = either."""

    @property
    def needs(self) -> frozenset[str]:
        """What the judge needs."""
        return self.part.needs

    @property
    def stages(self) -> frozenset[str]:
        """What the judge speaks of."""
        return self.part.stages

    def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        """Returns the judge's verdicts, in order; an actor's death or silence is None with the reason."""
        return self._pool.judged(trajectories)

    def close(self) -> None:
        """Ends the actors, and the Ray that was started for them; judging again starts anew."""
        self._pool.close()

    def __enter__(self) -> OnRay:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def _pool(self) -> Pool:
        from reasonrl_ray.pool import Pool

        return Pool(
            self.part,
            num_actors=self.num_actors,
            num_cpus=self.num_cpus,
            num_gpus=self.num_gpus,
            max_restarts=self.max_restarts,
            timeout_s=self.timeout_s,
            address=self.address,
        )
