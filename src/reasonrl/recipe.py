"""Recipe: everything a run needs to know, checked when it is built."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from attrs import Converter, Factory, evolve, field, frozen, has, validators

from reasonrl.data import read_prompts
from reasonrl.errors import ConfigError
from reasonrl.fields import fields_of
from reasonrl.interfaces import Judge, Objective, Policy, Renderer, Trainable
from reasonrl.scenes import splits
from reasonrl.scenes.grammar import parse_prompt
from reasonrl.types import EVERY, Member, Prompt

SCENES = "scenes/"
AVERAGE = "average"
"""The name of the weights that `Recipe.average` keeps."""


def by_prompt(prompt_id: str, member: Member) -> object:
    """Groups all draws of a prompt: GRPO's baseline."""
    return prompt_id


def by_parent(prompt_id: str, member: Member) -> object:
    """Groups draws of one parent: the plans of a prompt, and apart from them the images of each plan."""
    return prompt_id, member[:-1]


GROUPINGS: dict[str, Callable[[str, Member], object]] = {"prompt": by_prompt, "parent": by_parent}
"""What a record can name."""


def _named(grouping: Any) -> Any:
    """Returns the name of a function that has one, else what was given."""
    return next((name for name, function in GROUPINGS.items() if function is grouping), grouping)


def _positive(default: float | None) -> object:
    return field(default=default, validator=validators.optional(validators.gt(0)))


def _with_weights_of(test_renderer: Renderer | None, recipe: Any) -> Renderer | None:
    """Returns one of the renderer's own class on the renderer's weights: a recipe.json cannot say that two share."""
    kind: type = type(test_renderer)
    alike = kind is type(recipe.renderer) and has(kind)
    if not alike:
        return test_renderer
    changed: Renderer = evolve(
        recipe.renderer, **{key: getattr(test_renderer, a.name) for key, a in fields_of(kind).items()}
    )
    return changed


@frozen
class Recipe:
    """What is trained, on what, judged how, for how long. A variant is `attrs.evolve(recipe, seed=1)`.

    Give `objective` for all stages alike, or `objectives` by stage; a stage that nobody names is frozen. A tuple of
    stages gives one objective their joined actions.
    """

    policy: Policy
    judge: Judge | None = None
    prompts: str | Sequence[Prompt] = "scenes/train"
    """A file or folder of prompts, `scenes/<split>` of the drawn world, or the prompts themselves."""
    renderer: Renderer | None = None
    objective: Objective | None = None
    objectives: Mapping[str | tuple[str, ...], Objective] = Factory(dict)

    steps: int = field(default=100, validator=validators.ge(1))
    prompts_per_step: int = field(default=8, validator=validators.ge(1))
    group_size: int = field(default=16, validator=validators.ge(1))
    """Trajectories a prompt (GoT-R1: 16)."""
    num_updates: int = field(default=1, validator=validators.ge(1))
    """Optimizer steps on each step's rollouts."""
    num_rows: int | None = _positive(None)  # type: ignore[assignment]
    """Trajectories a backward pass, None = all; changes memory, never the gradient."""
    num_actions: int | None = _positive(None)  # type: ignore[assignment]
    """Actions a backward pass of a factorised trainable, None = all."""

    sharded: bool = False
    """With several processes, FSDP2: parameters, gradients and optimizer state are split over them; else replicas."""

    learning_rate: float = field(default=1e-5, validator=validators.gt(0))
    schedule: Literal["constant", "cosine"] = field(
        default="constant", validator=validators.in_(("constant", "cosine"))
    )
    warmup_steps: int = field(default=0, validator=validators.ge(0))
    weight_decay: float = field(default=0.0, validator=validators.ge(0))
    max_grad_norm: float = field(default=1.0, validator=validators.gt(0))
    average: float | None = field(
        default=None, validator=validators.optional(validators.and_(validators.gt(0.0), validators.lt(1.0)))
    )
    """Decay a step of an average over steps of every trained parameter (EMA): what is tested, and saved at the end.
    None = none: the last weights are. A decay d every k steps is d ** (1 / k) here: Flow-GRPO's 0.9 every 8 is 0.987.

    It begins at the starting weights, and after n steps still holds average ** n of them. Rollouts are drawn with the
    last weights, unless `sample_with` says "average"."""

    seed: int = 0
    max_unscored: float = field(default=0.5, validator=[validators.ge(0), validators.le(1)])
    """Largest fraction of a step's trajectories that may stay unscored before the run stops."""
    judge_timeout_s: float = field(default=600.0, validator=validators.gt(0))
    """After this long a judge's whole answer counts as unscored."""
    min_agreement: float | None = field(
        default=None, validator=validators.optional(validators.and_(validators.ge(-1), validators.le(1)))
    )
    """Kendall's tau within prompts that `reasonrl judge audit` asks of the judge, or it refuses; None = none."""
    overlap: int = field(default=1, validator=validators.ge(1))
    """Parts in which a step's prompts are drawn, each judged while the next is drawn; 1 = all drawn, then judged.

    For judges that wait: a server, another GPU. The weights are the same for every part: the step stays on-policy.
    """
    group_by: Literal["prompt", "parent"] | Callable[[str, Member], object] = field(default="prompt", converter=_named)
    """Which draws share a baseline: all of a prompt; those of one parent, so that the images of a plan are compared
    with each other (`by_parent`); or a function of prompt id and member, which a record cannot hold."""
    sample_with: Mapping[str, str] = Factory(dict)
    """Named weights to sample a stage's trainable with, e.g. {"image": "old"}."""

    save_every: int = field(default=25, validator=validators.ge(1))
    keep: int = field(default=2, validator=validators.ge(1))
    """Checkpoints to keep, the newest."""
    show_every: int = field(default=10, validator=validators.ge(1))
    """Steps between saved samples."""
    tests: Mapping[str, str] = Factory(dict)
    """Prompt sources by split name, judged before and after by `test_judge`; exact = a score of 1."""
    test_judge: Judge | None = None
    test_renderer: Renderer | None = field(
        default=None,
        converter=Converter(_with_weights_of, takes_self=True),  # type: ignore[misc] # mypy knows functions alone
    )
    """Draws what is tested, e.g. in more steps: `attrs.evolve(renderer, num_steps=40)`; None = `renderer`.

    One of the same class gets the weights of `renderer`."""

    def __attrs_post_init__(self) -> None:
        _check_claims(self)
        _check_judge(self)
        _check_tests(self)
        _check_groups(self)
        _check_sample_with(self)

    @property
    def group_of(self) -> Callable[[str, Member], object]:
        """The function of prompt id and member that `group_by` names or is."""
        return GROUPINGS[self.group_by] if isinstance(self.group_by, str) else self.group_by

    @property
    def claims(self) -> dict[tuple[str, ...], Objective]:
        """Objectives by the stages each claims."""
        if self.objective is not None:
            return {(stage,): self.objective for stage in self.stages}
        return {(k,) if isinstance(k, str) else tuple(k): o for k, o in self.objectives.items()}

    @property
    def trainables(self) -> tuple[Trainable, ...]:
        """Policy and renderer, where they draw stages of their own."""
        return tuple(p for p in (self.policy, self.renderer) if isinstance(p, Trainable))

    @property
    def stages(self) -> tuple[str, ...]:
        """Every stage that is drawn, in order."""
        return tuple(stage for trainable in self.trainables for stage in trainable.stages)

    @property
    def trained(self) -> tuple[str, ...]:
        """Every stage that some objective trains, in the order they are drawn."""
        claimed = {stage for claim in self.claims for stage in claim}
        return tuple(stage for stage in self.stages if stage in claimed)

    @property
    def learning(self) -> tuple[Trainable, ...]:
        """Policy and renderer, where some objective trains a stage of theirs."""
        return tuple(t for t in self.trainables if set(self.trained) & set(t.stages))

    @property
    def provides(self) -> frozenset[str]:
        """What a judge may need: texts, images and the artifacts of policy and renderer."""
        return _provided(self.policy, self.renderer)

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step (0-based): warm-up, then constant or cosine to 0 (GoT-R1: cosine)."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.schedule == "constant":
            return self.learning_rate * warm
        done = min(1.0, step / self.steps)
        return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * done))

    def read(self) -> tuple[Prompt, ...]:
        """Returns the training prompts, checked by the policy."""
        prompts = load_prompts(self.prompts)
        self.policy.check(prompts)
        return prompts


def load_prompts(source: str | Sequence[Prompt]) -> tuple[Prompt, ...]:
    """Returns prompts from `scenes/<split>`, a file or folder, or as given; raises DataError."""
    if not isinstance(source, str):
        return tuple(source)
    if source.startswith(SCENES) and not Path(source).exists():
        name = source.removeprefix(SCENES)
        return tuple(
            Prompt(f"{name}:{i}", text, {"category": parse_prompt(text).category})
            for i, text in enumerate(splits.load(name), start=1)
        )
    return read_prompts(source)


def _check_claims(recipe: Recipe) -> None:
    if (recipe.objective is None) == (not recipe.objectives):
        raise ConfigError("a recipe needs either objective= (all stages) or objectives= (by stage), one of the two")
    claimed = [stage for claim in recipe.claims for stage in claim]
    for stage in claimed:
        if stage not in recipe.stages:
            raise ConfigError(f"objectives name {_unknown(stage, recipe.stages)}")
    twice = sorted({stage for stage in claimed if claimed.count(stage) > 1})
    if twice:
        raise ConfigError(f"stage {', '.join(twice)} is claimed by two objectives: give each stage to one")
    drawn = list(recipe.stages)
    if len(set(drawn)) < len(drawn):
        raise ConfigError(f"policy and renderer both draw one of the stages {drawn}: stage names must differ")
    for claim, objective in recipe.claims.items():
        _check_needs(recipe, claim, objective)
        if recipe.average is not None and AVERAGE in objective.shadows:
            raise ConfigError(
                f"{type(objective).__name__} names its own weights {AVERAGE!r}, and so does average={recipe.average}:"
                " leave out average, or rename the objective's"
            )


def _check_needs(recipe: Recipe, claim: tuple[str, ...], objective: Objective) -> None:
    owners = [t for t in recipe.trainables if set(claim) & set(t.stages)]
    if len(owners) > 1:
        raise ConfigError(f"{type(objective).__name__} claims {claim}, stages of two trainables: split the claim")
    for stage in claim:
        missing = objective.needs - owners[0].offers[stage]
        if missing:
            raise ConfigError(
                f"{type(objective).__name__} needs {sorted(missing)} of stage {stage!r}, but"
                f" {type(owners[0]).__name__} offers {sorted(owners[0].offers[stage])}"
            )


def _provided(policy: Policy, renderer: Renderer | None) -> frozenset[str]:
    said = policy.provides | frozenset({"reasoning", "plan"})
    return said | (renderer.provides if renderer else frozenset())


def _check_judge(recipe: Recipe) -> None:
    for judge in (recipe.judge, None if recipe.test_renderer else recipe.test_judge):
        missing = (judge.needs if judge else frozenset()) - recipe.provides
        if missing:
            raise ConfigError(
                f"the judge needs {sorted(missing)}, but policy and renderer provide {sorted(recipe.provides)}:"
                " add a renderer or another judge"
            )
    if recipe.judge is None:
        return
    for stage in sorted(recipe.judge.stages - {EVERY}):
        if stage not in recipe.stages:
            raise ConfigError(f"the judge is .on {_unknown(stage, recipe.stages)}")
    silent = [s for claim in recipe.claims for s in claim if not recipe.judge.stages & {s, EVERY}]
    if silent:
        raise ConfigError(
            f"no judge speaks of stage {', '.join(silent)}, which an objective trains: add one .on it, or leave the"
            " stage out of objectives"
        )


def _check_tests(recipe: Recipe) -> None:
    renderer, judge = recipe.test_renderer, recipe.test_judge or recipe.judge
    if renderer is None:
        return
    provided = _provided(recipe.policy, renderer)
    own = renderer.stages if isinstance(renderer, Trainable) else ()
    if twice := sorted(set(recipe.policy.stages) & set(own)):
        raise ConfigError(f"policy and test_renderer both draw {twice}: stage names must differ")
    if missing := (judge.needs if judge else frozenset()) - provided:
        raise ConfigError(
            f"the judge of tests needs {sorted(missing)}, but policy and test_renderer provide {sorted(provided)}:"
            " give another test_renderer or test_judge"
        )
    known = tuple(
        dict.fromkeys((*recipe.stages, *own, "image"))
    )  # a renderer without stages draws an image all the same
    for stage in sorted((judge.stages if judge else frozenset()) - {EVERY, *known}):
        raise ConfigError(f"the judge of tests is .on {_unknown(stage, known)}")


def _check_groups(recipe: Recipe) -> None:
    if isinstance(recipe.group_by, str) and recipe.group_by not in GROUPINGS:
        raise ConfigError(
            f"group_by must be {' or '.join(map(repr, GROUPINGS))}, or a function, got {recipe.group_by!r}"
        )
    for objective in recipe.claims.values():
        if recipe.group_size < objective.smallest_group:
            raise ConfigError(
                f"group_size must be at least {objective.smallest_group} for {type(objective).__name__},"
                f" got {recipe.group_size}: a group of one has no baseline"
            )


def _check_sample_with(recipe: Recipe) -> None:
    for stage, name in recipe.sample_with.items():
        if stage not in recipe.stages:
            raise ConfigError(f"sample_with names {_unknown(stage, recipe.stages)}")
        owner = next(t for t in recipe.trainables if stage in t.stages)
        known = {n for claim, o in recipe.claims.items() if set(claim) & set(owner.stages) for n in o.shadows}
        known |= {AVERAGE} if recipe.average is not None and owner in recipe.learning else set()
        if name not in known:
            raise ConfigError(
                f"sample_with draws {stage!r} with weights {name!r}, and nobody keeps them. Kept:"
                f" {', '.join(sorted(known)) or 'none'}; set average=, or take an objective that keeps copies"
            )
        if len({recipe.sample_with[s] for s in owner.stages if s in recipe.sample_with}) > 1:
            raise ConfigError(f"sample_with names two weights for the stages {owner.stages} of one model: give one")


def _unknown(stage: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(stage, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"stage {stage!r}, which nobody draws.{hint} Stages: {', '.join(known)}"
