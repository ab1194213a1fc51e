import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.painted import NOISE, START, Gray, levels, recipe

from reasonrl.errors import ConfigError
from reasonrl.hooks import hookimpl
from reasonrl.interfaces import Objective
from reasonrl.loop import Learner, train
from reasonrl.objectives import GRPO
from reasonrl.rollout import rollouts
from reasonrl.session import Interrupted, run
from reasonrl.weights import AVERAGE, Weights, averaged

MANY = 4096
"""Strokes whose mean is the gray up to NOISE / 64, less than a level of 255."""


def trained(asked):
    """Trains without a folder; returns what each step ended with, and the learner."""
    learner, ends = Learner.of(asked), []

    def observe(event, **said):
        if event == "step_end":
            (weights,) = learner.weights.values()
            ends.append([weights.live[0].item(), *(copy[0].item() for copy in weights.copies.values())])

    train(asked, rollouts(asked, asked.prompts), learner=learner, observe=observe)
    return ends, learner


def learnt(directory, finished):
    return load_file(directory / "checkpoints" / f"step-{finished:06d}" / "learner.safetensors")


def saved_level(directory):
    return load_file(directory / "renderer" / "paint.safetensors")["level"].item()


def evaluated(directory):
    return [json.loads(line) for line in (directory / "evaluations.jsonl").read_text().splitlines()]


# ---- The average ---------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.1, 0.9])
def test_the_average_decays_once_a_step_from_the_starting_weights(decay):
    ends, _ = trained(recipe(average=decay, num_updates=2))
    expected = START
    for live, average in ends:
        expected = decay * expected + (1 - decay) * live
        assert average == pytest.approx(expected, abs=1e-6)
        assert abs(average - live) > 1e-4


def test_a_decay_every_eight_steps_is_its_eighth_root_each_step():
    renderer = Gray()
    often = Weights(renderer, {AVERAGE: lambda step: 0.9 ** (1 / 8)})
    rare = Weights(renderer, {AVERAGE: lambda step: 0.9 if (step + 1) % 8 == 0 else 1.0})
    with torch.no_grad():
        renderer.module.level.zero_()
    for step in range(16):
        for weights in (often, rare):
            weights.update(step)
        if (step + 1) % 8 == 0:
            found, expected = (weights.copies[AVERAGE][0].item() for weights in (often, rare))
            assert found == pytest.approx(expected, rel=1e-5)
    assert found == pytest.approx(START * 0.81, rel=1e-5)


def test_no_replay_is_spent_on_the_average_and_training_does_not_see_it():
    plain, averaging = recipe(), recipe(average=0.5)
    ends, _ = trained(plain)
    with_average, _ = trained(averaging)
    assert [live for (live,) in ends] == [live for live, _ in with_average]
    assert len(plain.renderer._replays) == len(averaging.renderer._replays) == plain.steps
    anchored = recipe(average=0.5, objective=GRPO(kl=0.1))
    trained(anchored)
    assert len(anchored.renderer._replays) == 2 * plain.steps  # live and reference
    assert all(anchored.renderer._replays)


def test_without_it_no_copy_is_kept():
    (weights,) = Learner.of(recipe()).weights.values()
    assert weights.copies == {}
    with averaged([weights]):
        assert weights.live[0].item() == pytest.approx(START)


def test_averages_are_in_place_inside_and_gone_outside_even_after_an_error():
    _, learner = trained(recipe(average=0.5))
    (weights,) = learner.weights.values()
    live, average = weights.live[0].item(), weights.copies[AVERAGE][0].item()
    seen = []

    def fail():
        with averaged(learner.weights.values()):
            seen.append((weights.live[0].item(), torch.is_grad_enabled()))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert seen == [(average, False)]
    assert average != live
    assert (weights.live[0].item(), weights.copies[AVERAGE][0].item()) == (live, average)


# ---- Who draws with it ---------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "column"), [(None, 0), (AVERAGE, 1), ("reference", 2)])
def test_rollouts_are_drawn_with_the_last_weights_unless_others_are_named(name, column):
    asked = recipe(
        average=0.8, objective=GRPO(kl=1e-3), sample_with={"image": name} if name else {}, renderer=Gray(num_strokes=2)
    )
    learner, drawn, ends = Learner.of(asked), [], []
    (weights,) = learner.weights.values()

    def observe(event, **facts):
        if event == "rollout_end":
            drawn.append(levels(facts["trajectories"]))
        if event == "step_end":
            ends.append([weights.live[0].item(), weights.copies[AVERAGE][0].item(), START])

    train(asked, rollouts(asked, asked.prompts), learner=learner, observe=observe)
    assert drawn[0] == pytest.approx([START] * 8, abs=1e-6)
    for before, found in zip(ends, drawn[1:], strict=False):
        assert found == pytest.approx([before[column]] * 8, abs=1e-6)
    assert len({round(value, 4) for value in ends[-1]}) == 3


def test_what_is_tested_and_saved_is_the_average_and_checkpoints_hold_both(tmp_path):
    prompts = tmp_path / "mine.txt"
    prompts.write_text("a\nb\n")
    asked = recipe(average=0.8, tests={"mine": str(prompts)}, test_renderer=Gray(num_strokes=MANY))
    run(asked, tmp_path / "run", quiet=True)
    held = learnt(tmp_path / "run", asked.steps)
    live, average = held["trained.0.level"].item(), held["copy.0.average.level"].item()
    assert abs(live - average) > 0.01
    assert saved_level(tmp_path / "run") == average
    assert asked.renderer.module.level.item() == live  # given back
    found = {line["step"]: line["scores"]["Brightness"] for line in evaluated(tmp_path / "run")}
    assert found[0] == pytest.approx(START, abs=1 / 255 + NOISE / 16)
    assert abs(found[asked.steps] - average) < 1 / 255 + NOISE / 16 < abs(found[asked.steps] - live)


class Stops:
    """Presses Ctrl-C in a step."""

    def __init__(self, step):
        self.step = step

    @hookimpl
    def rollout_end(self, step):
        if step == self.step:
            self.step = None
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("stop", [0, 2])
def test_a_stopped_run_resumes_to_the_same_bits(watch, tmp_path: Path, stop):
    def asked():
        return recipe(average=0.7, objective=GRPO(kl=0.01), sample_with={"image": AVERAGE})

    run(asked(), tmp_path / "straight", quiet=True)
    watch(Stops(stop))
    with pytest.raises(Interrupted):
        run(asked(), tmp_path / "run", quiet=True)
    run(asked(), tmp_path / "run", resume=True, quiet=True)
    whole, resumed = (learnt(tmp_path / name, 4) for name in ("straight", "run"))
    assert whole.keys() == resumed.keys() > {"copy.0.average.level", "copy.0.reference.level"}
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert saved_level(tmp_path / "run") == saved_level(tmp_path / "straight")


# ---- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, 1.5])
def test_a_decay_outside_0_to_1_is_refused(decay):
    with pytest.raises(ValueError, match="average"):
        recipe(average=decay)


def test_an_objective_whose_own_weights_have_the_name_is_refused():
    class Averages(Objective):
        shadows = {"average": lambda step: 0.5}  # noqa: RUF012 - a property of the interface
        advantages = loss = None

    with pytest.raises(ConfigError, match=r"Averages names its own weights 'average', and so does average=0.5"):
        recipe(objective=Averages(), average=0.5)
    assert recipe(objective=Averages()).average is None


def test_weights_too_coarse_to_follow_a_decay_are_refused():
    renderer = Gray()
    renderer.module.to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"average needs trained parameters of float32, Gray trains torch.bfloat16"):
        Learner.of(recipe(renderer=renderer, average=0.99))
    assert AVERAGE not in Weights(renderer, {}).copies
