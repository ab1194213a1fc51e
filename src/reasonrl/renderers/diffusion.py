"""Diffusion: a text-to-image pipeline of diffusers draws the plan, and can be trained by its denoising steps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, final, get_args

import torch
from attrs import converters, evolve, field, frozen, validators
from torch import Tensor, nn

from reasonrl.batch import spread
from reasonrl.errors import ConfigError
from reasonrl.interfaces import Renderer, Trainable
from reasonrl.noise import Draw, normal
from reasonrl.renderers import denoising, steps
from reasonrl.renderers.boxes import Boxes, Native
from reasonrl.renderers.briefs import Text, WithoutPlan, briefed, faulty
from reasonrl.renderers.denoising import Guidance, Guided
from reasonrl.renderers.family import Brief, Conditions, Family, Size
from reasonrl.renderers.pipelines import DTYPES, Learns, Loader, follow, save
from reasonrl.renderers.steps import DDIM, ODE, FlowSDE, Kernel, Reduce, Step
from reasonrl.renderers.windows import Window, trained_steps
from reasonrl.types import Batch, Member, Replay, Segment, Stage, Trajectory

if TYPE_CHECKING:
    from PIL.Image import Image


@final
@frozen
class Diffusion(Renderer, Trainable):
    """Draws plans with Stable Diffusion, FLUX, Qwen-Image and their like, frozen or trained.

    A denoising step is an action: `kernel` draws it, `window` says which steps are random and trained, and replay sees
    the recorded ones again, one prediction each. Steps outside the window follow the ODE. A picture whose latents are
    not finite comes back without an image, as `Stop.FAULT`: nobody scores it, and nothing is trained on it.
    """

    checkpoint: str = "nano"
    """"nano" (packaged, of the drawn world), a folder, or a Hub name of a diffusers pipeline with an adapter."""
    text: Text = field(default="both", validator=validators.in_(get_args(Text)))
    """What the pipeline reads: the plan's prose (without marks and coordinates), the user's prompt, or it and then the
    prose. CLIP reads 77 tokens and no more: with SD 1.5 and SDXL, long plans are cut."""
    boxes: Boxes = field(factory=Native)
    """How the plan's boxes reach the denoiser: what the pipeline takes natively, spatial guidance, regional prompts."""
    without_plan: WithoutPlan = field(default="prompt", validator=validators.in_(get_args(WithoutPlan)))
    """What becomes of a reasoning that gives no object a box: drawn from the prompt alone; no image, which judges score
    0; or neither drawn nor scored."""
    guidance: float = field(default=1.0, validator=validators.ge(0))
    """w of v = u + w (c − u), in sampling and replay alike; 1 = the conditional branch alone, at half the cost. With
    `SpatialGuidance` 1 is its full branch alone, and any other number leaves the weights to it."""
    negative: str = ""
    """The text of the unconditional branch."""
    unconditional: Literal["trained", "detached"] = field(
        default="trained", validator=validators.in_(("trained", "detached"))
    )
    """detached: no gradient through the unconditional branch, as Flow-GRPO has it: less work, another gradient."""
    images_per_plan: int = field(default=1, validator=validators.ge(1))
    """Images of each trajectory it is given; a prompt with one trajectory, as in evaluation, gets one image."""
    size: Size | None = field(default=None, converter=converters.optional(tuple))
    """(height, width) in pixels; None = the pipeline's own."""
    num_steps: int = field(default=10, validator=[validators.instance_of(int), validators.ge(1)])
    kernel: Kernel | None = None
    """The distribution of a recorded step; None = FlowSDE() for flows, DDIM() for variance-preserving models."""
    window: Literal["all", "early", "random", "sliding", "none"] = field(
        default="all", validator=validators.in_(("all", "early", "random", "sliding", "none"))
    )
    """Which steps are random, recorded and trained (`windows.trained_steps`). none: the ODE, and nothing to train."""
    window_size: int | None = field(default=None, validator=validators.optional(validators.ge(1)))
    window_within: int | None = field(default=None, validator=validators.optional(validators.ge(1)))
    """Windows lie in the first so many steps; None = those that have a density."""
    window_every: int = field(default=1, validator=validators.ge(1))
    """Training steps before a sliding window moves on."""
    start: Literal["own", "shared", "branched"] = field(
        default="own", validator=validators.in_(("own", "shared", "branched"))
    )
    """Where pictures of a prompt begin: each at its own noise; at one (DanceGRPO); or branched where the window begins,
    the steps before it drawn once for pictures of one plan (Flow-GRPO-Fast)."""
    reduce: Reduce = field(default="mean", validator=validators.in_(("mean", "sum")))
    """Log-probs in nats per dimension, or of the whole latent: clip ranges follow (`steps`)."""
    record_means: bool = False
    """Keep each step's mean as drawn: ratios from means, and GRPO-Guard's, need it; twice the latents."""
    storage: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", validator=validators.in_(tuple(DTYPES))
    )
    """How recorded latents are kept; densities are those of the rounded numbers."""
    keep_on: Literal["host", "device"] = field(default="host", validator=validators.in_(("host", "device")))
    """Where recorded latents and conditions wait for training."""
    sample_rows: int = field(default=32, validator=validators.ge(1))
    """Pictures drawn at once."""
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", validator=validators.in_(tuple(DTYPES)))
    """Of the weights. Adapters learn in float32 whatever it is; steps and log-probs are float32 too."""
    lora_rank: int = field(default=0, validator=validators.ge(0))
    """Above 0, adapters of the denoiser's attention learn (Flow-GRPO: 32) instead of all of its weights."""
    lora_alpha: float = field(default=64.0, validator=validators.gt(0))
    gradient_checkpointing: bool = False
    stage: str = "image"
    _loader: Loader = field(factory=Loader, eq=False, repr=False)

    factorised = True

    def __attrs_post_init__(self) -> None:
        sized = self.window_size is not None
        if self.window == "all" and sized:
            raise ConfigError(f"window='all' has no window_size, got {self.window_size}: leave it out")
        if self.window not in ("all", "none") and not sized:
            raise ConfigError(f"window={self.window!r} needs window_size: say how many steps are random and trained")
        if not (self.window_size or 1) <= (self.window_within or self.num_steps) <= self.num_steps:
            raise ConfigError(
                f"window_size <= window_within <= num_steps must hold, got {self.window_size}, {self.window_within},"
                f" {self.num_steps}"
            )
        if self.unconditional == "detached" and not next(iter(self.boxes.branches(self.guidance).values())):
            raise ConfigError(
                f"unconditional='detached' leaves nothing to learn at guidance={self.guidance:g}, where the full branch"
                " has no weight: set 'trained', or guidance above 0"
            )

    @property
    def stages(self) -> tuple[str, ...]:
        """The image; none where no step is recorded."""
        return () if self.window == "none" else (self.stage,)

    @property
    def module(self) -> nn.Module:
        """The denoiser, loaded on first use."""
        return self.family.denoiser

    @property
    def family(self) -> Family:
        """The loaded pipeline in its adapter."""
        learns = Learns(self.lora_rank, self.lora_alpha, self.gradient_checkpointing)
        found = self._loader.load(self.checkpoint, self.dtype, learns, self.boxes)
        self._kernel(found)  # what cannot be drawn is refused as soon as it is known, before a run's folder is there
        found.latent_shape(self.size or found.size)
        return found

    @property
    def offers(self) -> Mapping[str, frozenset[str]]:
        """Log-probs and entropies in nats as `reduce` says, and what objectives over steps or noised points ask for."""
        said = {"step_velocity", "step_size", "velocity"}
        if self.kernel is None or self.kernel.random:
            said |= {"log_probs", "entropy", "mean", "std"} | ({"drawn_mean"} if self.record_means else set())
        return {stage: frozenset(said) for stage in self.stages}

    def render(self, trajectories: Sequence[Trajectory], *, draw: Draw) -> list[Trajectory]:
        """Adds an image and, where steps are recorded, their segment; the images of a plan follow each other."""
        leaves = [briefed(t, text=self.text, without_plan=self.without_plan) for t in self._branched(trajectories)]
        drawn = iter(self._drawn([(t, brief) for t, brief in leaves if brief is not None], draw))
        return [next(drawn) if brief is not None else t for t, brief in leaves]

    def replay(self, batch: Batch, needs: Mapping[str, frozenset[str]]) -> dict[str, Replay]:
        """Returns what is asked of the recorded steps, and of noised points; 0 where the mask is False.

        extras: "mean", "step_velocity" and "drawn_mean" (N, T, C, H, W), "std" and "step_size" (N, T), at the recorded
        steps; "velocity" (N, T, C, H, W) at the points that an objective's `prepare` added.
        """
        return {name: self._replayed(batch.stages[name], wanted) for name, wanted in needs.items()}

    def save(self, folder: Path) -> None:
        """Writes the pipeline for diffusers alone; adapters are merged, and apart in adapter/."""
        save(self.family, folder)

    # ---- What is drawn ----

    def _branched(self, trajectories: Sequence[Trajectory]) -> Iterator[Trajectory]:
        alone = Counter(t.prompt.id for t in trajectories)
        for t in trajectories:
            several = self.images_per_plan if alone[t.prompt.id] > 1 else 1
            yield from (evolve(t, member=(*t.member, k)) for k in range(several)) if several > 1 else (t,)

    @torch.no_grad()
    def _drawn(self, leaves: Sequence[tuple[Trajectory, Brief]], draw: Draw) -> list[Trajectory]:
        size = self.sample_rows
        return [t for i in range(0, len(leaves), size) for t in self._chunk(leaves[i : i + size], draw)]

    def _chunk(self, leaves: Sequence[tuple[Trajectory, Brief]], draw: Draw) -> list[Trajectory]:
        family, size = self.family, self.size or self.family.size
        path, shape = self._path(draw), family.latent_shape(size)
        rows = self._conditions([brief for _, brief in leaves], size)
        ids = [(t.prompt.id, t.member) for t, _ in leaves]
        starts = [self._start(t, brief) for t, brief in leaves]
        first = list(dict.fromkeys(starts)) if self.start == "branched" else None
        # Pictures that begin alike go alike up to the window: those steps are drawn once.
        lead = [starts.index(one) for one in first] if first else list(range(len(leaves)))
        device = next(family.denoiser.parameters()).device
        follow(family, device)
        begin = normal([draw.key(*starts[n][:2], self.stage, "start") for n in lead], *shape).to(device)
        x = path.before(begin, _collated(family, rows, lead, device))
        if first:
            x = x[[first.index(one) for one in starts]]
        conditions = _collated(family, rows, range(len(leaves)), device)
        places = [i for i, is_recorded in enumerate(path.recorded) if is_recorded]
        noise = (normal([draw.key(*one, self.stage, f"step/{i}") for one in ids], *shape).to(device) for i in places)
        taken = path.random(x, conditions, noise, keep_means=self.record_means)
        clean = path.after(taken[-1].next if taken else x, conditions)
        finite = torch.isfinite(clean).flatten(1).all(1)
        pictures = iter(family.decode(clean[finite]) if finite.any() else ())
        segments = self._segments(x, taken, clean, rows, path, draw) if taken else [None] * len(leaves)
        return [
            self._finished(leaves[n][0], next(pictures), segments[n])
            if finite[n]
            else faulty(leaves[n][0], "latents are not finite")
            for n in range(len(leaves))
        ]

    def _start(self, trajectory: Trajectory, brief: Brief) -> tuple[str, Member, object]:
        """Returns the address of a picture's first noise, and what makes its first steps its own."""
        if self.start == "own":
            return trajectory.prompt.id, trajectory.member, None
        return trajectory.prompt.id, (), (brief.text, brief.objects)

    def _finished(self, trajectory: Trajectory, picture: Image, segment: Segment | None) -> Trajectory:
        found = evolve(trajectory, images={**trajectory.images, self.stage: picture})
        if segment is None:
            return found
        owned = evolve(segment, member=trajectory.member)
        return evolve(found, segments={**trajectory.segments, self.stage: owned})

    def _segments(
        self,
        x: Tensor,
        taken: Sequence[Step],
        clean: Tensor,
        rows: Sequence[Mapping[str, Conditions]],
        path: denoising.Path,
        draw: Draw,
    ) -> list[Segment]:
        """Returns what replay needs of each row: where its window begins, what was drawn, under which conditions."""
        home = torch.device("cpu") if self.keep_on == "host" else x.device
        places = torch.tensor(path.recorded).nonzero().flatten()
        times, inputs = path.schedule.times, path.schedule.inputs
        schedule = torch.stack([times[places], times[places + 1], inputs[places].double()], 1)
        address = torch.tensor(draw.key("", (), self.stage))
        actions = torch.stack([one.next for one in taken], 1).to(home)
        started, ended = x.to(home), clean.to(home)
        known = [one.log_prob for one in taken if one.log_prob is not None]
        log_probs = torch.stack(known, 1).float().to(home) if len(known) == len(taken) else None
        means = torch.stack([one.mean for one in taken], 1).to(home) if self.record_means else None
        segments = []
        for n, row in enumerate(rows):
            context = {f"{branch}/{name}": value for branch, each in row.items() for name, value in each.items()}
            context |= {"start": started[n], "schedule": schedule, "clean": ended[n], "address": address}
            context |= {} if means is None else {"means": means[n]}
            mask = torch.ones(len(places), dtype=torch.bool)
            segments.append(
                Segment(self.stage, (), actions[n], mask, None if log_probs is None else log_probs[n], context)
            )
        return segments

    def _conditions(self, briefs: Sequence[Brief], size: Size) -> list[dict[str, Conditions]]:
        """Returns the conditions of each brief by branch, those of equal briefs once, where they wait for training."""
        kept: dict[object, int] = {}
        places = [kept.setdefault((b.text, b.objects, id(b.image)), len(kept)) for b in briefs]
        unique = [briefs[places.index(k)] for k in range(len(kept))]
        negative = Brief(self.negative)
        found = self.boxes.conditions(self.family, unique, negative, size, self.guidance)
        if self.keep_on == "host":
            moved: dict[int, Tensor] = {}

            def home(value: Tensor) -> Tensor:
                if id(value) not in moved:
                    moved[id(value)] = value.cpu()
                return moved[id(value)]

            found = {b: [{n: home(v) for n, v in row.items()} for row in rows] for b, rows in found.items()}
        return [{branch: found[branch][place] for branch in self._branches} for place in places]

    @property
    def _guidance(self) -> Guidance:
        return Guidance(self.boxes.branches(self.guidance), self.unconditional == "detached")

    def _path(self, draw: Draw) -> denoising.Path:
        family = self.family
        kernel = self._kernel(family)
        schedule = family.schedule(self.num_steps, self.size or family.size)
        recorded = (False,) * self.num_steps
        if self.window != "none":
            window: Window = self.window
            known = steps.steps_with_density(kernel, schedule.times.tolist())
            recorded = trained_steps(
                self.num_steps,
                window,
                self.window_size,
                draw=draw,
                stage=self.stage,
                within=self.window_within or _random_steps(known),
                every=self.window_every,
            )
            if kernel.random and not all(one for one, taken in zip(known, recorded, strict=True) if taken):
                raise ConfigError(
                    f"{kernel} has no density at some of the steps to train, only at the first {_random_steps(known)}"
                    f" of {self.num_steps}: lower window_within, got {self.window_within}"
                )
        return denoising.Path(family, self._guidance, schedule, kernel, recorded, DTYPES[self.storage], self.reduce)

    def _kernel(self, family: Family) -> Kernel:
        kernel = self.kernel or (FlowSDE() if family.flow else DDIM())
        if isinstance(kernel, ODE) and not family.flow:
            return DDIM(eta=0.0)
        if isinstance(kernel, DDIM) == family.flow:
            path, fitting = ("a rectified flow", "FlowSDE") if family.flow else ("variance-preserving", "DDIM")
            raise ConfigError(f"{self.checkpoint} is {path}, and {kernel} steps over another: use {fitting}, or None")
        return kernel

    # ---- What is seen again ----

    def _replayed(self, stage: Stage, wanted: frozenset[str]) -> Replay:
        conditions = self._recorded_conditions(stage)
        extras: dict[str, Tensor] = {}
        if "velocity" in wanted:
            x, t = stage.context["noised"][stage.mask], stage.context["times"][stage.mask]
            points = denoising.velocity(self.family, self._guidance, x, t, conditions)
            extras["velocity"] = spread(points, stage.mask)
        if not wanted - {"velocity"}:
            return Replay(extras=extras)
        found = self._seen_again(stage, conditions, density=bool(wanted & {"log_probs", "entropy"}))
        extras |= {name: spread(found[name], stage.mask) for name in wanted & found.keys()}
        return Replay(extras.pop("log_probs", None), extras.pop("entropy", None), extras)

    def _recorded_conditions(self, stage: Stage) -> Guided:
        """Returns the conditions of the K trained actions, in their order."""
        rows, device = stage.mask.nonzero()[:, 0].tolist(), stage.actions.device
        names = {b: [k.partition("/")[2] for k in stage.context if k.startswith(f"{b}/")] for b in self._branches}
        return {
            b: self.family.collate([{k: stage.context[f"{b}/{k}"][n].to(device) for k in keys} for n in rows])
            for b, keys in names.items()
        }

    def _seen_again(self, stage: Stage, conditions: Guided, *, density: bool) -> dict[str, Tensor]:
        """Returns what the present weights say of the K trained actions, by name."""
        pairs = [(n, i) for n, i in stage.mask.nonzero().tolist()]
        began = [stage.context["start"][n] if i == 0 else stage.actions[n, i - 1] for n, i in pairs]
        x = torch.stack(began).float()
        s, s_next, inputs = torch.stack([stage.context["schedule"][n][i] for n, i in pairs]).unbind(1)
        kernel = self._kernel(self.family)
        v = denoising.predict(self.family, self._guidance, x, inputs.float(), conditions)
        found = {"step_velocity": v, "step_size": (s - s_next).abs().float()}
        if self.record_means:
            found["drawn_mean"] = torch.stack([stage.context["means"][n][i] for n, i in pairs])
        if not density:
            mean, std = kernel.moments(x, v, s, s_next)
            return {**found, "mean": mean, "std": std.flatten().expand(len(pairs))}
        again = steps.replay(kernel, x, v, s, s_next, stage.actions[stage.mask], reduce=self.reduce)
        assert again.log_prob is not None
        std = again.std.flatten().expand(len(pairs))
        dimensions = again.mean[0].numel() if self.reduce == "sum" else 1
        entropy = dimensions * (std.log() + 0.5 * math.log(2 * math.pi * math.e))
        return {
            **found,
            "mean": again.mean,
            "std": std,
            "log_probs": again.log_prob.float(),
            "entropy": entropy.float(),
        }

    @property
    def _branches(self) -> list[str]:
        return list(self._guidance.branches)


def _collated(
    family: Family, rows: Sequence[Mapping[str, Conditions]], places: Sequence[int], device: torch.device
) -> Guided:
    chosen = [rows[n] for n in places]
    return {
        branch: family.collate([{k: v.to(device) for k, v in row[branch].items()} for row in chosen])
        for branch in rows[0]
    }


def _random_steps(known: Sequence[bool]) -> int | None:
    """Returns how many steps have a density before the first that has none; None for a kernel without any."""
    return (known.index(False) if False in known else len(known)) or None
