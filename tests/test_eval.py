"""Evaluation: one answer a prompt, the same before and after, and never a training step's noise."""

import pytest

from reasonrl import Draw, PointwiseJudge, Prompt, Score
from reasonrl.eval import EVALUATION_SEED, evaluate
from reasonrl.judges import ScenePromptImage
from reasonrl.policies import GoTR1
from reasonrl.recipe import load_prompts
from reasonrl.renderers import Tokens

PROMPTS = [Prompt(str(i), text) for i, text in enumerate(["a red circle", "a blue cross", "a green square"])]


@pytest.fixture(scope="module")
def policy(nano_folder):
    return GoTR1(str(nano_folder), guidance=1.0, max_tokens=12)


class Fixed(PointwiseJudge):
    """Says what it was told, in order."""

    def __init__(self, *values):
        self.values = list(values)

    def score(self, trajectory):
        return self.values.pop(0)


def test_exact_means_a_score_of_one_and_silence_is_neither(policy):
    judge = Fixed(1.0, 0.999, Score(None, "blind"))
    found = list(evaluate(policy, Tokens(), judge, PROMPTS, split="mine"))
    assert [a.exact for a in found] == [True, False, None]
    assert [a.record()["exact"] for a in found] == [True, False, None]
    assert found[2].record()["notes"] == {"Fixed": "blind"}
    assert "costs" not in found[2].record()


def test_what_an_answer_took_to_judge_is_written_down(policy):
    judge = Fixed(Score(1.0, "", {"calls": 1.0}), 0.5, Score(None, "blind", {"calls": 2.0}))
    found = [a.record() for a in evaluate(policy, Tokens(), judge, PROMPTS, split="mine")]
    assert [line.get("costs") for line in found] == [{"Fixed": {"calls": 1.0}}, None, {"Fixed": {"calls": 2.0}}]


def test_answers_come_in_order_and_do_not_depend_on_how_many_are_drawn_at_once(policy):
    one = [a.record() for a in evaluate(policy, Tokens(), ScenePromptImage(), PROMPTS, split="s", rows=1)]
    three = [a.record() for a in evaluate(policy, Tokens(), ScenePromptImage(), PROMPTS, split="s", rows=3)]
    assert one == three
    assert [line["prompt_id"] for line in one] == ["0", "1", "2"]


def test_a_second_evaluation_is_the_same_and_no_training_step_draws_its_noise(policy):
    first, again = (
        [a.trajectory.reasoning for a in evaluate(policy, Tokens(), ScenePromptImage(), PROMPTS, split="s")]
        for _ in range(2)
    )
    trained = [t.reasoning for t in policy.sample(PROMPTS, group_size=1, draw=Draw(0, 0))]
    assert first == again
    assert first != trained
    assert EVALUATION_SEED != 0


def test_the_category_is_the_prompts_own(policy):
    prompts = [Prompt("a", "a red circle", {"category": "color"}), Prompt("b", "a blue cross")]
    found = list(evaluate(policy, Tokens(), ScenePromptImage(), prompts, split="s"))
    assert [a.category for a in found] == ["color", "all"]


def test_every_split_of_the_drawn_world_can_be_judged(policy):
    for split in ("test", "held_out", "inverted", "counts", "longer"):
        prompts = load_prompts(f"scenes/{split}")[:4]
        assert all(a.exact is not None for a in evaluate(policy, Tokens(), ScenePromptImage(), prompts, split=split))
