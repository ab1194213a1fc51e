import re
import threading

import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrl.credit import credit, to_rewards
from reasonrl.errors import ContractError
from reasonrl.interfaces import PointwiseJudge, Policy
from reasonrl.kernels import group_advantages
from reasonrl.objectives import GRPO, Supervised
from reasonrl.recipe import Recipe
from reasonrl.rollout import Guarded
from reasonrl.testing import ToyJudge
from reasonrl.types import EVERY, Prompt, Score, Segment, Term, Trajectory, Verdict

BOTH = ("reasoning", "image")
moderate = settings(max_examples=40, deadline=None)


class Toy(Policy):
    """Names two stages; these tests sample nothing."""

    stages = BOTH
    offers = dict.fromkeys(BOTH, frozenset({"log_probs", "entropy"}))
    module = None
    replay = save = sample = None


def recipe(objective=None, **changes):
    given = {} if "objectives" in changes else {"objective": objective or GRPO()}
    return Recipe(policy=Toy(), judge=ToyJudge(), group_size=4, **given, **changes)


def segment(stage, member):
    return Segment(stage, member, torch.zeros(2, dtype=torch.int64), torch.ones(2).bool())


def leaf(prompt_id, member, *stages):
    """A trajectory whose plan is its first index, and whose image is its whole path."""
    addresses = {"reasoning": member[:1], "image": member}
    segments = {stage: segment(stage, addresses[stage]) for stage in stages or BOTH}
    return Trajectory(Prompt(prompt_id, "a red cup"), member, segments)


def says(value, stage=EVERY, name="r", weight=1.0):
    return Verdict({stage: (Term(name, value, weight),)})


def solo(draws):
    return draws


def advantages(rows, stage):
    return [row.advantages.get(stage) for row in rows]


def grpo(*rewards):
    """Returns the advantages of one group; None = unscored."""
    scored = torch.tensor([reward is not None for reward in rewards])
    filled = torch.tensor([reward or 0.0 for reward in rewards], dtype=torch.float64)
    found, _ = group_advantages(filled, torch.zeros(len(rewards), dtype=torch.int64), scored)
    return found.tolist()


def approx(*rewards):
    return pytest.approx(grpo(*rewards), abs=1e-6)


def trained(rows):
    return [set(row.trained) for row in rows]


# ---- Properties ------------------------------------------------------------------------------

rewards = st.none() | st.sampled_from([0.1 + 0.2, 0.3, 0.0, 0.5, 1.0])


@st.composite
def steps(draw):
    """Leaves of prompts, plans and images, each with a verdict."""
    leaves = []
    for p in range(draw(st.integers(1, 3))):
        for g in range(draw(st.integers(1, 3))):
            for k in range(draw(st.integers(1, 3))):
                stages = BOTH if draw(st.booleans()) else BOTH[:1]
                leaves.append((leaf(str(p), (g, k), *stages), says(draw(rewards))))
    return leaves


def credited(leaves, *, gather=solo, **changes):
    trajectories, verdicts = zip(*leaves, strict=True) if leaves else ((), ())
    return credit(trajectories, verdicts, recipe(**changes), gather=gather)


def shown(rows):
    return [(row.trajectory, row.advantages, row.trained) for row in rows]


@moderate
@given(steps())
def test_every_draw_that_takes_part_is_trained_in_exactly_one_row(leaves):
    rows = credited(leaves, objective=Supervised())
    for stage in BOTH:
        drawn = {
            (row.trajectory.prompt.id, row.trajectory.segments[stage].member)
            for row in rows
            if stage in row.trajectory.segments
        }
        learning = [
            (row.trajectory.prompt.id, row.trajectory.segments[stage].member) for row in rows if stage in row.trained
        ]
        assert sorted(learning) == sorted(drawn)


@moderate
@given(steps())
def test_rows_keep_the_order_and_know_the_stages_of_their_trajectories(leaves):
    rows = credited(leaves)
    assert [row.trajectory for row in rows] == [trajectory for trajectory, _ in leaves]
    for row in rows:
        stages = row.trajectory.segments.keys()
        assert row.advantages.keys() == row.groups.keys() == stages
        assert row.trained <= stages


@moderate
@given(steps(), st.data())
def test_two_ranks_credit_like_one(leaves, data):
    whole = credited(leaves)
    prompts = sorted({trajectory.prompt.id for trajectory, _ in leaves})
    first = data.draw(st.sets(st.sampled_from(prompts)))
    parts = [[one for one in leaves if (one[0].prompt.id in first) == here] for here in (True, False)]
    calls = [[], []]
    for part, seen in zip(parts, calls, strict=True):
        credited(part, gather=lambda draws, seen=seen: seen.append(draws) or draws)
    gathered = [a + b for a, b in zip(*calls, strict=True)]
    rows = []
    for part in parts:
        answers = iter(gathered)
        rows += credited(part, gather=lambda _, answers=answers: next(answers))
    found = {id(trajectory): rest for trajectory, *rest in shown(rows)}
    assert found == {id(trajectory): rest for trajectory, *rest in shown(whole)}


# ---- Sharing ---------------------------------------------------------------------------------


def test_a_shared_plan_is_rewarded_by_the_mean_of_its_scored_leaves():
    leaves = [
        (leaf("a", (0, 0)), says(1.0)),
        (leaf("a", (0, 1)), says(None)),
        (leaf("a", (0, 2)), says(0.5)),
        (leaf("a", (1, 0)), says(0.25)),
        (leaf("a", (1, 1)), says(0.0)),
    ]
    rows = credited(leaves)
    plan = grpo(0.75, 0.125)
    assert advantages(rows, "reasoning") == pytest.approx([plan[0]] * 3 + [plan[1]] * 2)
    assert advantages(rows, "image") == approx(1.0, None, 0.5, 0.25, 0.0)
    assert trained(rows) == [{"reasoning", "image"}, set(), {"image"}, set(BOTH), {"image"}]


def test_a_plan_none_of_whose_leaves_is_scored_trains_nothing():
    leaves = [
        (leaf("a", (0, 0)), says(None)),
        (leaf("a", (0, 1)), says(None)),
        (leaf("a", (1, 0)), says(0.5)),
        (leaf("a", (2, 0)), says(1.0)),
    ]
    rows = credited(leaves)
    assert trained(rows) == [set(), set(), set(BOTH), set(BOTH)]
    assert advantages(rows, "reasoning") == approx(None, None, 0.5, 1.0)


def test_each_term_of_a_shared_plan_is_its_own_mean():
    def two(x, y):
        return Verdict({EVERY: (Term("x", x, 2.0), Term("y", y))})

    leaves = [
        (leaf("a", (0, 0)), two(1.0, None)),
        (leaf("a", (0, 1)), two(0.0, 0.25)),
        (leaf("a", (1, 0)), two(1.0, 1.0)),
    ]
    rows = credited(leaves, objectives={"reasoning": GRPO()})
    expected = grpo(2 * 0.5 + 0.25, 2 + 1)
    assert advantages(rows, "reasoning") == pytest.approx([expected[0], *expected])


# ---- Unscored --------------------------------------------------------------------------------


def test_an_unscored_member_does_not_move_the_baseline_and_trains_nothing():
    leaves = [(leaf("a", (g,)), says(value)) for g, value in enumerate([0.0, None, 1.0, 0.5])]
    rows = credited(leaves)
    assert advantages(rows, "reasoning") == approx(0.0, None, 1.0, 0.5)
    assert advantages(rows, "reasoning")[1] == 0
    assert trained(rows) == [set(BOTH), set(), set(BOTH), set(BOTH)]
    without = credited([one for i, one in enumerate(leaves) if i != 1])
    found = advantages(rows, "image")
    assert advantages(without, "image") == [found[0], *found[2:]]


def test_a_judge_that_says_nothing_leaves_the_row_unscored():
    leaves = [(leaf("a", (g,)), verdict) for g, verdict in enumerate([says(1.0), Verdict({})])]
    leaves.append((leaf("a", (2,)), says(0.0)))
    assert trained(credited(leaves)) == [set(BOTH), set(), set(BOTH)]


def test_a_step_in_which_nobody_was_scored_trains_nothing():
    rows = credited([(leaf("a", (g,)), Verdict({})) for g in range(4)])
    assert advantages(rows, "image") == [0.0] * 4
    assert trained(rows) == [set()] * 4


def test_a_step_whose_judge_ran_out_of_time_trains_nothing():
    finished = threading.Event()

    class Slow(PointwiseJudge):
        def score(self, trajectory):
            return float(finished.wait(60))

    trajectories = [leaf("a", (g,)) for g in range(3)]
    verdicts = Guarded(Slow(), 0.01).judge([t.shown() for t in trajectories])
    finished.set()
    assert trained(credited(list(zip(trajectories, verdicts, strict=True)))) == [set()] * 3


def test_a_draw_with_one_unscored_term_is_unscored():
    def two(x, y):
        return Verdict({EVERY: (Term("x", x), Term("y", y))})

    pairs = [(1.0, None), (0.0, 1.0), (1.0, 1.0)]
    rows = credited([(leaf("a", (g,)), two(*pair)) for g, pair in enumerate(pairs)])
    assert advantages(rows, "image") == approx(None, 1.0, 2.0)
    assert trained(rows)[0] == set()


def test_a_demonstration_without_a_judge_is_trained():
    rows = credited([(leaf("a", (g,)), Verdict({})) for g in range(2)], objective=Supervised())
    assert advantages(rows, "image") == [1.0, 1.0]
    assert trained(rows) == [set(BOTH)] * 2


# ---- Stages and claims -----------------------------------------------------------------------


def test_a_term_on_a_stage_credits_only_that_stage():
    rewards = [(0.0, 1.0), (1.0, 0.0), (0.5, 0.0)]
    leaves = [
        (
            leaf("a", (g,)),
            Verdict({"reasoning": (Term("plan", x),), "image": (Term("picture", y),)}),
        )
        for g, (x, y) in enumerate(rewards)
    ]
    rows = credited(leaves)
    assert advantages(rows, "reasoning") == approx(*(x for x, _ in rewards))
    assert advantages(rows, "image") == approx(*(y for _, y in rewards))


def test_a_stage_of_its_own_is_preferred_to_every():
    leaves = [
        (leaf("a", (g,)), Verdict({EVERY: (Term("r", x),), "image": (Term("picture", y),)}))
        for g, (x, y) in enumerate([(0.0, 1.0), (1.0, 0.0)])
    ]
    rows = credited(leaves)
    assert advantages(rows, "reasoning") == approx(0.0, 1.0)
    assert advantages(rows, "image") == approx(1.0, 0.0)


def test_a_stage_nobody_claims_gets_no_credit():
    rows = credited([(leaf("a", (g,)), says(g / 2)) for g in range(3)], objectives={"image": GRPO()})
    assert advantages(rows, "reasoning") == [None] * 3
    assert trained(rows) == [{"image"}] * 3


def test_a_trajectory_without_a_claimed_stage_does_not_enter_its_group():
    leaves = [
        (leaf("a", (0,)), says(0.0)),
        (leaf("a", (1,), "reasoning"), says(0.25)),
        (leaf("a", (2,)), says(1.0)),
    ]
    rows = credited(leaves)
    both = grpo(0.0, 1.0)
    assert advantages(rows, "image") == [pytest.approx(both[0]), None, pytest.approx(both[1])]
    assert advantages(rows, "reasoning") == approx(0.0, 0.25, 1.0)


joint = {"objectives": {BOTH: GRPO()}}
JOINT = {(0, 0): 0.0, (0, 1): 1.0, (1, 0): 0.5}


def test_a_joint_claim_is_credited_at_the_address_of_its_last_draw():
    leaves = [(leaf("a", member), says(value)) for member, value in JOINT.items()]
    seen = []
    rows = credited(leaves, gather=lambda draws: seen.extend(draws) or draws, **joint)
    assert [(draw.prompt_id, draw.member) for draw in seen] == [("a", member) for member in JOINT]
    assert advantages(rows, "reasoning") == approx(*JOINT.values())
    assert advantages(rows, "image") == approx(*JOINT.values())


def test_a_joint_claim_counts_a_term_on_every_stage_once():
    leaves = [(leaf("a", (g,)), says(g / 2, weight=3.0)) for g in range(3)]
    seen = []
    credited(leaves, gather=lambda draws: seen.extend(draws) or draws, **joint)
    assert to_rewards(seen, [0, 0, 0]).total.tolist() == [0.0, 1.5, 3.0]


def test_a_joint_claim_counts_a_term_on_every_stage_once_beside_a_term_on_one_stage():
    judge = ToyJudge(full=10).named("length") + ToyJudge(full=20).named("half").on("image")
    trajectories = [evolve(leaf("a", (0,)), texts={"reasoning": "12345"})]
    seen = []
    credit(
        trajectories,
        judge.judge(trajectories),
        recipe(**joint),
        gather=lambda draws: seen.extend(draws) or draws,
    )
    found = to_rewards(seen, [0])
    assert sorted(found.names) == ["half", "length"]
    assert found.total.tolist() == [0.5 + 0.25]


# ---- Groups ----------------------------------------------------------------------------------


def by_siblings(prompt_id, member):
    return prompt_id, member[:-1]


TREE = {(0, 0): 0.0, (0, 1): 1.0, (1, 0): 0.5, (1, 1): 1.0}


def test_all_draws_of_a_prompt_share_a_baseline_by_default():
    rows = credited([(leaf("a", member), says(value)) for member, value in TREE.items()])
    assert len({row.groups["image"] for row in rows}) == 1
    assert advantages(rows, "image") == approx(*TREE.values())


def test_siblings_share_a_baseline_where_the_recipe_says_so():
    leaves = [(leaf("a", member), says(value)) for member, value in TREE.items()]
    rows = credited(leaves, group_by=by_siblings)
    groups = [row.groups["image"] for row in rows]
    assert groups[0] == groups[1] != groups[2] == groups[3]
    expected = [*grpo(0.0, 1.0), *grpo(0.5, 1.0)]
    assert advantages(rows, "image") == pytest.approx(expected)
    plans = grpo(0.5, 0.75)
    assert advantages(rows, "reasoning") == pytest.approx([plans[0]] * 2 + [plans[1]] * 2)


def test_two_prompts_have_two_baselines():
    leaves = [
        (leaf(name, (g,)), says(value))
        for g, row in enumerate([(0.0, 5.0), (1.0, 7.0)])
        for name, value in zip("ab", row, strict=True)
    ]
    rows = credited(leaves)
    one, other = grpo(0.0, 1.0), grpo(5.0, 7.0)
    assert advantages(rows, "image") == pytest.approx([one[0], other[0], one[1], other[1]])


# ---- Refusals and edges ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        Verdict({EVERY: (Term("other", 1.0),)}),
        Verdict({EVERY: (Term("r", 1.0, 2.0),)}),
        Verdict({EVERY: (Term("r", 1.0), Term("extra", 1.0))}),
        Verdict({EVERY: ()}),
    ],
)
@pytest.mark.parametrize("members", [((0,), (1,)), ((0, 0), (0, 1))])
def test_verdicts_with_different_terms_are_refused(other, members):
    leaves = [(leaf("a", members[0]), says(1.0)), (leaf("a", members[1]), other)]
    with pytest.raises(ContractError, match=re.escape("have different terms: [")):
        credited(leaves)


def test_verdicts_must_be_one_a_trajectory():
    with pytest.raises(ValueError, match="shorter"):
        credit([leaf("a", (0,)), leaf("a", (1,))], [says(1.0)], recipe(), gather=solo)


def test_no_trajectories_are_no_rows():
    assert credited([]) == []


def test_raw_scores_are_not_rewards():
    verdicts = [Verdict({EVERY: (Term("r", 0.5),)}, {"x": Score(float(g))}) for g in range(2)]
    rows = credited([(leaf("a", (g,)), verdict) for g, verdict in enumerate(verdicts)])
    assert advantages(rows, "image") == [0.0, 0.0]
