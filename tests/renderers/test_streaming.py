"""Trained steps stream: activations of one step at a time, measured as the bytes that autograd keeps."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attrs import evolve
from tests.renderers import tiny_pipelines
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from reasonrl.batch import Row, passes, trained_mask
from reasonrl.bench.denoise import Kept
from reasonrl.errors import ConfigError
from reasonrl.loop import pass_loss
from reasonrl.noise import Draw
from reasonrl.objectives import DenoisingGRPO
from reasonrl.renderers import Diffusion
from reasonrl.renderers.steps import Step
from reasonrl.types import Prompt, Trajectory
from reasonrl.weights import Weights

DRAW = Draw(0, 0)
LEAVES = [Trajectory(Prompt("a", "a red circle"), (g,)) for g in range(2)]
CREDIT = (1.0, -0.5)
STREAMED, WHOLE = 1, None


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Diffusion:
    """Draws with a real pipeline of Stable Diffusion 3, and trains all of its transformer."""
    folder: Path = tmp_path_factory.mktemp("pipeline")
    tiny_pipelines.stable_diffusion_3().save_pretrained(folder)
    return Diffusion(str(folder))


@pytest.fixture(scope="module")
def replayed(renderer: Diffusion) -> Callable[..., tuple[Kept, int, dict[str, Tensor]]]:
    """Replays T trained steps as the loop does; returns what was kept, how many passes, and gradients; each once."""
    known: dict[tuple[int, int | None], tuple[Kept, int, dict[str, Tensor]]] = {}

    def replay(num_steps: int, num_actions: int | None) -> tuple[Kept, int, dict[str, Tensor]]:
        if (num_steps, num_actions) not in known:
            known[num_steps, num_actions] = learned(evolve(renderer, num_steps=num_steps), num_actions)
        return known[num_steps, num_actions]

    return replay


def learned(renderer: Diffusion, num_actions: int | None) -> tuple[Kept, int, dict[str, Tensor]]:
    rows = [
        Row(t, {"image": credit}, {"image": 0}, frozenset({"image"}))
        for t, credit in zip(renderer.render(LEAVES, draw=DRAW), CREDIT, strict=True)
    ]
    assert all(row.mask("image").all() for row in rows)
    claims, weights, kept = {("image",): DenoisingGRPO()}, Weights(renderer, {}), Kept(renderer.module)
    counts = {claim: objective.count(trained_mask(rows, claim)) for claim, objective in claims.items()}
    renderer.module.zero_grad()
    num_passes = 0
    with kept():
        for share, batch in passes(rows, renderer, num_rows=None, num_actions=num_actions, whole_groups=False):
            loss, _ = pass_loss(claims, renderer, batch, weights, counts)
            (share * loss).backward()
            num_passes += 1
    slopes = {name: p.grad.clone() for name, p in renderer.module.named_parameters() if p.grad is not None}
    return kept, num_passes, slopes


@pytest.mark.parametrize("num_steps", [2, 8])
def test_a_step_a_pass_keeps_a_step_of_activations(num_steps, replayed):
    (streamed, num_passes, _), (whole, once, _) = replayed(num_steps, STREAMED), replayed(num_steps, WHOLE)
    assert (num_passes, once) == (num_steps, 1)
    assert streamed.most == pytest.approx(whole.most / num_steps, rel=0.01)


def test_what_is_kept_grows_with_the_steps_unless_they_stream(replayed):
    assert replayed(8, STREAMED)[0].most == pytest.approx(replayed(2, STREAMED)[0].most, rel=0.01)
    assert replayed(8, WHOLE)[0].most == pytest.approx(4 * replayed(2, WHOLE)[0].most, rel=0.01)


def test_windows_between_keep_their_share(replayed):
    assert replayed(8, 4)[0].most == pytest.approx(replayed(8, WHOLE)[0].most / 2, rel=0.01)


def test_backward_lets_everything_go(replayed):
    assert [replayed(8, size)[0].now for size in (STREAMED, WHOLE)] == [0, 0]


@pytest.mark.parametrize("num_actions", [STREAMED, 3])
def test_streaming_does_not_change_the_gradient(num_actions, replayed):
    streamed, whole = replayed(8, num_actions)[2], replayed(8, WHOLE)[2]
    assert streamed.keys() == whole.keys()
    assert sum(float(slope.abs().sum()) for slope in whole.values()) > 0
    most = max(float(slope.abs().max()) for slope in whole.values())
    for name, slope in whole.items():
        torch.testing.assert_close(streamed[name], slope, atol=1e-5 * most, rtol=1e-4, msg=name)


def places(renderer: Diffusion, keep_on: str, x: Tensor) -> set[str]:
    """Returns where what was drawn on x's device waits; x has no numbers, but a place."""
    told = evolve(renderer, keep_on=keep_on, num_steps=3, record_means=True)
    steps = [Step(x, x, x.new_empty(()), x.new_empty(2)) for _ in range(3)]
    segments = told._segments(x, steps, x, [{}, {}], told._path(DRAW), DRAW)
    names = ("start", "clean", "means")
    return {
        each.device.type for s in segments for each in (s.actions, s.log_probs, *(s.context[name] for name in names))
    }


def test_what_is_kept_on_the_host_leaves_the_device(renderer):
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 4, 8, 8, device="cuda")  # where there is no GPU too
    assert places(renderer, "host", x) == {"cpu"}


def test_what_is_kept_on_the_device_stays_there(renderer):
    assert places(renderer, "device", torch.empty(2, 4, 8, 8, device="meta")) == {"meta"}


def test_recorded_latents_and_conditions_wait_on_the_host(renderer):
    (trajectory, _) = renderer.render(LEAVES, draw=DRAW)
    segment = trajectory.segments["image"]
    waiting = [segment.actions, segment.log_probs, *segment.context.values()]
    assert {each.device.type for each in waiting} == {"cpu"}


def test_there_are_two_places_to_wait():
    with pytest.raises((ConfigError, ValueError), match="keep_on"):
        Diffusion(keep_on="disk")
