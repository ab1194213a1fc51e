import threading
from collections import Counter

import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrl.batch import (
    Row,
    collate,
    join_replays,
    join_stages,
    minibatches,
    passes,
    trained_mask,
)
from reasonrl.interfaces import Trainable
from reasonrl.types import Batch, Prompt, Replay, Segment, Trajectory

BOTH = ("reasoning", "image")
moderate = settings(max_examples=40, deadline=None)


class Toy(Trainable):
    """Names the stages it draws; these tests replay nothing."""

    module = None
    offers = None

    def __init__(self, *stages, factorised=False):
        self._stages, self.factorised = stages, factorised

    @property
    def stages(self):
        return self._stages

    def replay(self, batch, needs):
        raise NotImplementedError

    def save(self, folder):
        raise NotImplementedError


def segment(stage, member, mask, start=1):
    """Actions are start, start + 1, ...; log-probs their negatives; forced where mask is 0."""
    actions = torch.arange(start, start + len(mask))
    mask = torch.tensor(mask, dtype=torch.bool)
    return Segment(stage, member, actions, mask, -actions.float(), {"prefix": actions[:1]})


def row(prompt_id, *segments, trained=BOTH, advantages=None, groups=None):
    found = {s.stage: s for s in segments}
    member = max((s.member for s in segments), key=len, default=())
    return Row(
        Trajectory(Prompt(prompt_id, "a red cup"), member, found),
        {name: (advantages or {}).get(name, 1.0) for name in found},
        {name: (groups or {}).get(name, 0) for name in found},
        frozenset(trained) & found.keys(),
    )


masks = st.lists(st.booleans(), min_size=1, max_size=5)


@st.composite
def steps(draw, sometimes_absent=True):
    """Rows of a step as `credit` makes them: a plan has images, and is trained in one row at most."""
    rows = []
    for p in range(draw(st.integers(1, 3))):
        for g in range(draw(st.integers(1, 3))):
            plan = segment("reasoning", (g,), draw(masks), start=100 * p + 10 * g)
            learns = draw(st.booleans())
            for k in range(draw(st.integers(1, 3))):
                image = segment("image", (g, k), draw(masks), start=1000 * (k + 1))
                drawn = not (sometimes_absent and draw(st.booleans()))
                trained = {"reasoning"} if learns and k == 0 else set()
                trained |= {"image"} if draw(st.booleans()) else set()
                mine = [plan, image] if drawn else [plan]
                groups = {"reasoning": p, "image": 10 * p + g}
                rows.append(row(str(p), *mine, trained=trained, groups={s.stage: groups[s.stage] for s in mine}))
    return rows


def collated_row(batch, i, stage):
    """Returns what a batch holds of one row, without padding."""
    found = batch.stages[stage]
    there = found.present[i]
    return found.actions[i, there], found.mask[i, there], found.log_probs[i, there]


def covered(batches):
    """Counts how often each action, (prompt, stage, member, t), is trained."""
    return Counter(
        (stage.keys[i][0], name, stage.keys[i][1], t)
        for batch in batches
        for name, stage in batch.stages.items()
        for i, t in stage.mask.nonzero().tolist()
    )


def expected(rows, stages):
    return Counter(
        (r.trajectory.prompt.id, name, r.trajectory.segments[name].member, t)
        for r in rows
        for name in stages
        if name in r.trajectory.segments
        for t in r.mask(name).nonzero().flatten().tolist()
    )


def run(rows, trainable, *, num_rows=None, num_actions=None, whole_groups=False, gather=list):
    return list(
        passes(
            rows,
            trainable,
            num_rows=num_rows,
            num_actions=num_actions,
            whole_groups=whole_groups,
            gather=gather,
        )
    )


# ---- Collation -------------------------------------------------------------------------------


@moderate
@given(steps())
def test_what_was_collated_is_found_again_by_presence(rows):
    batch = collate(rows, BOTH)
    assert batch.trajectories == tuple(r.trajectory for r in rows)
    for name, stage in batch.stages.items():
        assert not (stage.mask & ~stage.present).any()
        assert not stage.actions[~stage.present].any()
        assert not stage.log_probs[~stage.present].any()
        for i, r in enumerate(rows):
            held = r.trajectory.segments.get(name)
            actions, mask, log_probs = collated_row(batch, i, name)
            if held is None:
                assert not len(actions)
                assert stage.keys[i] == (r.trajectory.prompt.id, ())
                assert stage.context["prefix"][i] is None
            else:
                assert torch.equal(actions, held.actions)
                assert torch.equal(mask, r.mask(name))
                assert torch.equal(log_probs, held.log_probs)
                assert stage.keys[i] == (r.trajectory.prompt.id, held.member)
                assert torch.equal(stage.context["prefix"][i], held.context["prefix"])


@moderate
@given(steps(), st.data())
def test_other_rows_change_nothing_but_the_padding(rows, data):
    whole = collate(rows, BOTH)
    i = data.draw(st.integers(0, len(rows) - 1))
    alone = collate(rows[i : i + 1], BOTH)
    assert set(alone.stages) == rows[i].trajectory.segments.keys()
    for name in alone.stages:
        pairs = zip(collated_row(whole, i, name), collated_row(alone, 0, name), strict=True)
        assert all(torch.equal(mine, same) for mine, same in pairs)
        assert whole.stages[name].advantages[i] == alone.stages[name].advantages[0]
        assert whole.stages[name].groups[i] == alone.stages[name].groups[0]


def test_golden_batch_of_two_rows_with_a_stage_missing_in_one():
    text, image = segment("reasoning", (0,), [1, 0]), segment("image", (0,), [1, 1, 1], start=7)
    rows = [
        row("a", text, image, trained=["image"], advantages={"reasoning": 0.5, "image": 2.0}),
        row("b", segment("reasoning", (3,), [0, 1, 1]), groups={"reasoning": 4}),
    ]
    batch = collate(rows, BOTH)
    found = batch.stages["reasoning"]
    assert found.actions.tolist() == [[1, 2, 0], [1, 2, 3]]
    assert found.present.tolist() == [[True, True, False], [True, True, True]]
    assert found.mask.tolist() == [[False, False, False], [False, True, True]]
    assert found.advantages.tolist() == [0.5, 1.0]
    assert found.groups.tolist() == [0, 4]
    assert found.keys == (("a", (0,)), ("b", (3,)))
    absent = batch.stages["image"]
    assert absent.actions.tolist() == [[7, 8, 9], [0, 0, 0]]
    assert absent.present.tolist() == [[True] * 3, [False] * 3]
    assert absent.advantages.tolist() == [2.0, 0.0]
    assert absent.keys[1] == ("b", ())


def test_a_forced_action_is_present_but_not_trained():
    (found,) = collate([row("a", segment("image", (0,), [0, 1]))], BOTH).stages.values()
    assert found.present.tolist() == [[True, True]]
    assert found.mask.tolist() == [[False, True]]


def test_one_row_without_a_likelihood_leaves_the_stage_without():
    with_it = segment("image", (0,), [1, 1])
    without = evolve(segment("image", (1,), [1]), log_probs=None)
    assert collate([row("a", with_it)], BOTH).stages["image"].log_probs is not None
    assert collate([row("a", with_it), row("a", without)], BOTH).stages["image"].log_probs is None


def test_vectors_and_latents_are_padded_along_time_alone():
    def drawn(k, length):
        shape = (length, 2, 3)
        return Segment("flow", (k,), torch.ones(shape), torch.ones(length, dtype=torch.bool))

    found = collate([row("a", drawn(0, 1)), row("a", drawn(1, 4))], ["flow"]).stages["flow"]
    assert found.actions.shape == (2, 4, 2, 3)
    assert found.actions.sum((1, 2, 3)).tolist() == [6, 24]


# ---- Passes ----------------------------------------------------------------------------------

trainables = st.sampled_from(
    [
        Toy("reasoning"),
        Toy("image"),
        Toy(*BOTH),
        Toy("image", factorised=True),
        Toy(*BOTH, factorised=True),
    ]
)
sizes = st.none() | st.integers(1, 4)


@settings(max_examples=120, deadline=None)
@given(steps(), trainables, sizes, sizes, st.booleans())
def test_passes_train_every_action_exactly_once(rows, trainable, num_rows, num_actions, whole):
    found = run(rows, trainable, num_rows=num_rows, num_actions=num_actions, whole_groups=whole)
    assert covered(batch for _, batch in found) == expected(rows, trainable.stages)
    assert all(share == 1 for share, _ in found)
    for _, batch in found:
        assert any(stage.mask.any() for stage in batch.stages.values())
        if num_rows is not None and not whole:
            assert len(batch.trajectories) <= num_rows


@moderate
@given(steps(), st.integers(1, 3))
def test_a_window_of_actions_holds_no_more_than_asked(rows, num_actions):
    trainable = Toy("image", factorised=True)
    for _, batch in run(rows, trainable, num_actions=num_actions):
        assert batch.stages["image"].mask.sum(1).max() <= num_actions
    joint = run(rows, Toy("image"), num_actions=num_actions)
    assert len(joint) <= 1  # not factorised: windows would be wrong


@moderate
@given(steps(), st.integers(1, 4))
def test_minibatches_split_whole_prompts(rows, num_updates):
    parts = list(minibatches(rows, num_updates))
    assert sorted(map(id, (r for part in parts for r in part))) == sorted(map(id, rows))
    found = [{r.trajectory.prompt.id for r in part} for part in parts]
    assert sum(map(len, found)) == len(set().union(*found))
    assert all(found)
    assert max(map(len, found)) - min(map(len, found)) <= 1


@moderate
@given(steps())
def test_the_number_of_trained_actions_adds_over_rows(rows):
    for claim in (("reasoning",), ("image",), BOTH):
        number = trained_mask(rows, claim).sum()
        assert number == sum(trained_mask([r], claim).sum() for r in rows)
        assert number == expected(rows, claim).total()


def shared_plan():
    plan = segment("reasoning", (0,), [1, 1])
    images = [segment("image", (0, k), [1, 1, 1], start=10 * k) for k in range(3)]
    return [row("a", plan, images[k], trained=BOTH if k == 0 else ["image"]) for k in range(3)]


def test_a_shared_plan_is_trained_once_by_a_unified_policy_and_replayed_with_each_image():
    ((_, batch),) = run(shared_plan(), Toy(*BOTH))
    assert batch.stages["reasoning"].present.sum() == 6
    assert batch.stages["reasoning"].mask.sum() == 2
    assert batch.stages["image"].mask.sum() == 9


def test_a_shared_plan_is_replayed_once_by_a_planner():
    ((_, batch),) = run(shared_plan(), Toy("reasoning"))
    assert len(batch.trajectories) == 1
    assert batch.stages["reasoning"].mask.sum() == 2


def test_a_shared_plan_is_trained_wherever_its_training_row_stands():
    ((_, batch),) = run(shared_plan()[::-1], Toy("reasoning"))
    assert batch.stages["reasoning"].mask.tolist() == [[True, True]]


def test_equal_members_of_two_prompts_are_two_draws():
    rows = [row(name, segment("reasoning", (0,), [1])) for name in "ab"]
    ((_, batch),) = run(rows, Toy("reasoning"))
    assert len(batch.trajectories) == 2


def test_rows_that_train_nothing_are_left_out():
    rows = [*shared_plan(), row("b", segment("reasoning", (0,), [1]), trained=[])]
    ((_, batch),) = run(rows, Toy(*BOTH))
    assert {t.prompt.id for t in batch.trajectories} == {"a"}


def beside(*ranks, whole_groups=False):
    """Runs `passes` of several ranks, each in a thread of its own, and returns what each yields."""
    barrier, said, found = threading.Barrier(len(ranks), timeout=10), {}, {}

    def work(rank):
        def gather(values):
            said[rank] = values
            barrier.wait()
            every = [value for other in range(len(ranks)) for value in said[other]]
            barrier.wait()
            return every

        rows, trainable, num_rows = ranks[rank]
        found[rank] = run(rows, trainable, num_rows=num_rows, whole_groups=whole_groups, gather=gather)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(len(ranks))]


def test_an_idle_rank_repeats_its_work_with_share_zero():
    busy, idle = beside((shared_plan(), Toy(*BOTH), 1), (shared_plan(), Toy(*BOTH), 2))
    assert [share for share, _ in busy] == [1.0, 1.0, 1.0]
    assert [share for share, _ in idle] == [1.0, 1.0, 0.0]
    assert covered([idle[2][1]]) == covered([idle[0][1]])


@pytest.mark.parametrize("mine", [[], [row("b", segment("reasoning", (0,), [1]), trained=[])]])
def test_a_rank_without_work_repeats_a_row_of_another_with_share_zero(mine):
    idle, busy = beside((mine, Toy(*BOTH), None), (shared_plan(), Toy(*BOTH), 2))
    assert [share for share, _ in busy] == [1.0, 1.0]
    assert [share for share, _ in idle] == [0.0, 0.0]
    for _, batch in idle:
        assert covered([batch]) == covered([collate(shared_plan()[:1], BOTH)])


def test_what_is_lent_for_a_loss_of_whole_groups_is_a_whole_group():
    rows = group_rows([3, 2])
    idle, busy = beside(([], Toy(*BOTH), None), (rows, Toy(*BOTH), None), whole_groups=True)
    assert covered([idle[0][1]]) == covered([collate(rows[:3], BOTH)])
    assert [share for share, _ in busy] == [1.0]


def test_nobody_has_work_and_nobody_passes():
    assert beside(([], Toy(*BOTH), None), ([], Toy(*BOTH), None)) == [[], []]


def test_minibatches_are_of_the_prompts_of_all_ranks():
    rows = [row(name, segment("reasoning", (0,), [1])) for name in "abc"]
    mine = {
        rank: [[r.trajectory.prompt.id for r in part] for part in minibatches(held, 2, gather=lambda _: list("abc"))]
        for rank, held in {0: rows[:2], 1: rows[2:], 2: []}.items()
    }
    assert mine == {0: [["a"], ["b"]], 1: [["c"], []], 2: [[], []]}


# ---- Whole groups ----------------------------------------------------------------------------


def group_rows(sizes, *, without_image=()):
    return [
        row(
            str(p),
            segment("reasoning", (g,), [1, 1]),
            *([] if (p, g) in without_image else [segment("image", (g,), [1])]),
            groups={"reasoning": p, "image": p},
        )
        for p, size in enumerate(sizes)
        for g in range(size)
    ]


def passes_of_group(found, stage="reasoning"):
    """Returns in how many passes each group of a stage is trained."""
    return Counter(
        group
        for _, batch in found
        for group in set(batch.stages[stage].groups[batch.stages[stage].mask.any(1)].tolist())
    )


@moderate
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(1, 6))
def test_whole_groups_share_a_pass(sizes, num_rows):
    found = run(group_rows(sizes), Toy(*BOTH), num_rows=num_rows, whole_groups=True)
    assert set(passes_of_group(found).values()) == {1}
    for _, batch in found:
        several = len(set(batch.stages["reasoning"].groups.tolist())) > 1
        assert not several or len(batch.trajectories) <= num_rows


def test_a_group_is_split_where_nothing_couples_it():
    found = run(group_rows([4]), Toy(*BOTH), num_rows=2)
    assert passes_of_group(found) == {0: 2}


def test_a_group_stays_whole_though_some_of_its_images_are_missing():
    rows = group_rows([2, 2], without_image=[(0, 0), (1, 0)])
    rows = [rows[0], rows[2], rows[1], rows[3]]
    found = run(rows, Toy(*BOTH), num_rows=2, whole_groups=True)
    assert passes_of_group(found) == {0: 1, 1: 1}


def test_plans_of_a_prompt_stay_whole_though_images_are_grouped_by_plan():
    rows = [
        row(
            "a",
            segment("reasoning", (g,), [1]),
            segment("image", (g, k), [1]),
            trained=BOTH if k == 0 else ["image"],
            groups={"reasoning": 0, "image": g},
        )
        for g in range(2)
        for k in range(2)
    ]
    found = run(rows, Toy(*BOTH), num_rows=2, whole_groups=True)
    assert passes_of_group(found, "reasoning") == {0: 1}
    assert passes_of_group(found, "image") == {0: 1, 1: 1}


# ---- Joining ---------------------------------------------------------------------------------


def test_one_stage_joined_is_itself():
    batch = collate([row("a", segment("image", (0,), [1]))], BOTH)
    assert join_stages(batch, ("image",)) is batch.stages["image"]
    assert join_stages(batch, BOTH) is batch.stages["image"]
    only = Replay(torch.zeros(1, 1))
    assert join_replays({"image": only}, BOTH) is only


@moderate
@given(steps(sometimes_absent=False))
def test_joined_stages_stand_side_by_side(rows):
    batch = collate(rows, BOTH)
    text, image = (batch.stages[name] for name in BOTH)
    joined = join_stages(batch, BOTH)
    assert joined.name == "reasoning+image"
    cut = text.mask.shape[1]
    for name in ("actions", "present", "mask", "log_probs"):
        whole = getattr(joined, name)
        assert torch.equal(whole[:, :cut], getattr(text, name))
        assert torch.equal(whole[:, cut:], getattr(image, name))
    assert joined.mask.sum() == trained_mask(rows, BOTH).sum()
    assert joined.keys == image.keys
    assert set(joined.context) == {"reasoning.prefix", "image.prefix"}


def test_a_row_without_its_last_stage_keeps_its_advantage_and_group_when_joined():
    rows = [
        row("a", segment("reasoning", (0,), [1]), segment("image", (0,), [1])),
        row("a", segment("reasoning", (1,), [1]), advantages={"reasoning": -1.0}),
    ]
    joined = join_stages(collate(rows, BOTH), BOTH)
    assert joined.advantages.tolist() == [1.0, -1.0]
    assert joined.groups.tolist() == [0, 0]
    assert joined.keys == (("a", (0,)), ("a", (1,)))


def test_joined_replays_stand_side_by_side_in_the_order_of_the_claim():
    one = Replay(torch.zeros(2, 3), torch.ones(2, 3), {"x": torch.zeros(2, 3), "y": torch.ones(2)})
    other = Replay(torch.full((2, 1), 5.0), None, {"x": torch.ones(2, 1)})
    found = join_replays({"image": other, "reasoning": one}, BOTH)
    assert found.log_probs.tolist() == [[0, 0, 0, 5]] * 2
    assert found.entropy is None
    assert found.extras.keys() == {"x"}
    assert found.extras["x"].tolist() == [[0, 0, 0, 1]] * 2


def test_a_joined_stage_has_a_likelihood_where_all_its_parts_have_one():
    text, image = segment("reasoning", (0,), [1]), segment("image", (0,), [1])
    bare = collate([row("a", text, evolve(image, log_probs=None))], BOTH)
    assert join_stages(bare, BOTH).log_probs is None


def test_live_context_is_seen_by_its_stage_alone():
    batch = collate([row("a", segment("reasoning", (0,), [1]), segment("image", (0,), [1]))], BOTH)
    found = batch.with_context("image", hidden=torch.ones(1))
    assert isinstance(found, Batch)
    assert found.stages["image"].context.keys() == {"prefix", "hidden"}
    assert batch.stages["image"].context.keys() == {"prefix"}
    assert found.stages["reasoning"] is batch.stages["reasoning"]


def test_trained_mask_of_nothing_is_empty():
    assert trained_mask([], BOTH).shape == (0, 0)
    assert list(minibatches([], 2)) == []


@pytest.mark.parametrize("whole_groups", [False, True])
def test_nothing_to_train_makes_no_pass(whole_groups):
    assert run([], Toy(*BOTH), whole_groups=whole_groups) == []
