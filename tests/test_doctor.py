"""What the doctor finds before money is spent."""

import pytest

import reasonrl as rl
from reasonrl.doctor import examine
from reasonrl.judges import DualStage
from reasonrl.objectives import GRPO
from reasonrl.policies import GoTR1
from reasonrl.renderers import Tokens


def recipe(**policy):
    return rl.Recipe(
        policy=GoTR1("nano", **{"guidance": 5.0, "max_tokens": 60, **policy}),
        renderer=Tokens(),
        judge=DualStage("arxiv-v1"),
        objective=GRPO(),
        prompts="scenes/train",
        group_size=4,
        prompts_per_step=2,
        steps=1,
    )


def findings(**policy):
    return examine(recipe(**policy))


def about(found, words):
    (one,) = [f for f in found if words in f.text]
    return one


def test_it_says_how_many_rows_are_drawn_at_once_and_how_exact_replay_is():
    found = findings()
    assert about(found, "trajectories at once").text.startswith("draws 256 ")
    gap = about(found, "stage image: replayed")
    assert gap.ok
    assert "in 16 bits" not in gap.text


def test_in_16_bits_it_judges_the_share_of_ratios_that_clipping_would_meet():
    found = findings(dtype="bfloat16")
    gap = about(found, "stage image: replayed")
    assert "in 16 bits: mean |ratio - 1| " in gap.text
    assert gap.ok


def test_a_step_that_16_bits_round_away_is_found_and_adapters_are_not_accused():
    lost = about(findings(dtype="bfloat16"), "as they are")
    assert not lost.ok
    assert "a step of 1e-05 would leave" in lost.text
    assert not [f for f in findings(dtype="bfloat16", lora_rank=4, trained=("language_model",)) if "as they" in f.text]
    assert not [f for f in findings() if "as they are" in f.text]


def test_it_says_how_far_conditional_log_probs_are_from_the_draw():
    found = findings(log_probs="conditional")
    apart = about(found, "trained on other log-probs")
    assert apart.ok
    assert "stage image" in apart.text


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_replay_of_another_distribution_is_found(guidance, monkeypatch):
    """The fault that peers ship: the loss forgets what shaped the draw."""
    sick = recipe(guidance=guidance)
    replay = GoTR1.replay

    def forgets(self, batch, needs):
        from attrs import evolve

        return replay(evolve(self, temperature=1.3), batch, needs)

    monkeypatch.setattr(GoTR1, "replay", forgets)
    gap = about(examine(sick), "stage image: replayed")
    assert not gap.ok


def test_log_probs_that_are_no_numbers_are_found_in_16_bits_too(monkeypatch):
    replay = GoTR1.replay

    def broken(self, batch, needs):
        found = replay(self, batch, needs)
        return {name: rl.Replay(one.log_probs * float("nan")) for name, one in found.items()}

    monkeypatch.setattr(GoTR1, "replay", broken)
    for dtype in ("float32", "bfloat16"):
        assert not about(findings(dtype=dtype), "stage image: replayed").ok
