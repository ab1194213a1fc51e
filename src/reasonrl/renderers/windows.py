"""Windows: which denoising steps are random and trained."""

from __future__ import annotations

from typing import Literal

from reasonrl.errors import ConfigError
from reasonrl.noise import Draw

Window = Literal["all", "early", "random", "sliding"]


def trained_steps(
    num_steps: int,
    window: Window = "all",
    size: int | None = None,
    *,
    draw: Draw,
    prompt_id: str = "",
    stage: str = "image",
    within: int | None = None,
    every: int = 1,
) -> tuple[bool, ...]:
    """Returns which of the steps, in the order they are taken, are random and trained: one run of `size` steps.

    "all" takes all `within`, and no size; "early" the first; "random" (Flow-GRPO-Fast) a uniform place; "sliding"
    (MixGRPO, arXiv 2507.21802) moves one on after `every` training steps, and from the last place to the first.
    `within` keeps windows in the first so many steps (None = all steps): those that have a density, or the first half.
    The place is a function of the address (seed, step, prompt id, stage): a group's members share it, and with the
    default prompt id the whole step does. ConfigError where sizes do not fit.
    """
    end = num_steps if within is None else within
    length = end if window == "all" and size is None else size
    if window not in ("all", "early", "random", "sliding"):
        raise ConfigError(f'window must be "all", "early", "random" or "sliding", got {window!r}')
    if length is None or (window == "all" and size is not None):
        raise ConfigError(
            f"window {window!r} has size {size}: {'leave it out' if window == 'all' else 'say how many steps'}"
        )
    if not 1 <= length <= end <= num_steps or every < 1:
        raise ConfigError(
            f"1 <= size <= within <= num_steps and every >= 1 must hold, got size {length}, within {end}, "
            f"num_steps {num_steps}, every {every}"
        )
    num_places = end - length + 1
    start = {
        "random": draw.key(prompt_id, (), stage, "window") % num_places,
        "sliding": draw.step // every % num_places,
    }.get(window, 0)
    return tuple(start <= i < start + length for i in range(num_steps))
