"""Noised points are a function of their address, and lie where the flow says."""

import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.objectives.flow_of_points import saying, stage

from reasonrl.errors import ContractError
from reasonrl.objectives.noised import trained, velocity, with_points

moderate = settings(max_examples=30, deadline=None)
POINTS = ("noised", "times", "target")


def points(given_stage, **how):
    how = {"times": "uniform", "shift": 1.0, **how}
    context = with_points(given_stage, **how).context
    return {name: context[name] for name in POINTS}


def rows_of(given_stage, rows):
    """Returns a stage of these rows, in this order."""
    picked = {name: getattr(given_stage, name)[rows] for name in ("actions", "present", "mask", "advantages", "groups")}
    context = {name: [values[i] for i in rows] for name, values in given_stage.context.items()}
    return evolve(given_stage, keys=tuple(given_stage.keys[i] for i in rows), context=context, **picked)


@st.composite
def masks(draw):
    num, length = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    torch.manual_seed(draw(st.integers(0, 10_000)))
    return torch.rand(num, length) < 0.7


@moderate
@given(masks(), st.sampled_from([(2,), (3, 4, 4)]), st.sampled_from(["uniform", "logit-normal"]))
def test_a_point_lies_on_the_line_from_the_clean_latent_to_noise(mask, shape, times):
    given_stage = stage(mask, shape=shape)
    found = points(given_stage, times=times)
    assert found["noised"].shape == (*mask.shape, *shape)
    for i, t in mask.nonzero().tolist():
        time, clean = found["times"][i, t], given_stage.context["clean"][i]
        assert 0 <= time < 1
        noise = found["target"][i, t] + clean
        torch.testing.assert_close(found["noised"][i, t], (1 - time) * clean + time * noise)
    assert not any(value[~mask].any() for value in found.values())


@moderate
@given(masks(), st.randoms(use_true_random=False))
def test_other_rows_padding_and_windows_do_not_move_a_point(mask, random):
    given_stage = stage(mask, shape=(3,))
    whole = points(given_stage)
    rows = random.sample(range(len(mask)), random.randint(1, len(mask)))
    part = rows_of(given_stage, rows)
    padded = evolve(
        part,
        mask=torch.nn.functional.pad(part.mask, (0, 3)),
        actions=torch.nn.functional.pad(part.actions, (0, 0, 0, 3)),
    )
    window = evolve(part, mask=part.mask & (torch.arange(mask.shape[1]) == 0))
    for name in POINTS:
        assert torch.equal(points(part)[name], whole[name][rows])
        assert torch.equal(points(padded)[name][:, : mask.shape[1]], whole[name][rows])
        assert torch.equal(points(window)[name][:, 0], whole[name][rows][:, 0])


def test_another_step_member_place_or_stage_is_another_point():
    everything = torch.ones(3, 4, dtype=torch.bool)
    given_stage = stage(everything)
    now, later = points(given_stage), points(stage(everything, step=1))
    elsewhere = points(evolve(given_stage, name="other"))
    every = torch.cat([found["times"].flatten() for found in (now, later, elsewhere)])
    assert len(every.unique()) == 36


def test_rows_of_a_group_can_share_times_and_noise():
    groups = torch.tensor([0, 1, 0, 1])
    given_stage = evolve(
        stage(torch.ones(4, 2, dtype=torch.bool), groups=groups),
        keys=(("p", (0,)), ("q", (0,)), ("p", (1,)), ("q", (1,))),
    )
    found = points(given_stage, shared=True)
    noise = found["target"] + torch.stack(given_stage.context["clean"])[:, None]
    assert torch.equal(found["times"][0], found["times"][2])
    torch.testing.assert_close(noise[0], noise[2])
    assert not (found["times"][0] == found["times"][1]).any()
    assert found["times"][0].unique().numel() == 2


def test_times_have_the_distribution_that_was_asked_for():
    given_stage = stage(torch.ones(40, 50, dtype=torch.bool))
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    flat = points(given_stage)["times"].flatten()
    torch.testing.assert_close(flat.quantile(quantiles), quantiles, atol=0.04, rtol=0)
    normal = points(given_stage, times="logit-normal")["times"].flatten()
    expected = torch.special.ndtri(quantiles).sigmoid()
    torch.testing.assert_close(normal.quantile(quantiles), expected, atol=0.04, rtol=0)
    torch.testing.assert_close(points(given_stage, shift=3.0)["times"].flatten(), 3 * flat / (1 + 2 * flat))


def test_sixteen_bit_latents_are_noised_in_32():
    given_stage = stage(torch.ones(2, 2, dtype=torch.bool))
    half = [x.bfloat16() for x in given_stage.context["clean"]]
    found = points(evolve(given_stage, context={**given_stage.context, "clean": half}))
    assert {value.dtype for value in found.values()} == {torch.float32}


def test_a_row_that_trains_nothing_may_hold_anything():
    mask = torch.tensor([[True, True], [False, False]])
    given_stage = stage(mask)
    for junk in (None, torch.full((2,), torch.nan)):
        context = {**given_stage.context, "clean": [given_stage.context["clean"][0], junk]}
        found = points(evolve(given_stage, context=context))
        assert all(value.isfinite().all() for value in found.values())


def test_a_stage_without_a_trained_action_has_no_points():
    found = with_points(stage(torch.zeros(2, 3, dtype=torch.bool)), times="uniform", shift=1.0)
    assert trained(found, "noised").shape == (0, 2)


@pytest.mark.parametrize("missing", ["clean", "address"])
def test_what_a_trainable_forgot_to_record_is_said(missing):
    given_stage = stage(torch.ones(1, 1, dtype=torch.bool))
    context = {k: v for k, v in given_stage.context.items() if k != missing}
    with pytest.raises(ContractError, match=f"no '{missing}'"):
        points(evolve(given_stage, context=context))


def test_a_loss_without_points_and_a_velocity_of_another_shape_are_refused():
    given_stage = stage(torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ContractError, match="call prepare"):
        trained(given_stage, "target")
    prepared = with_points(given_stage, times="uniform", shift=1.0)
    with pytest.raises(ContractError, match=r"\(1, 1, 2\), expected \(1, 2, 2\)"):
        velocity(saying(torch.zeros(1, 1, 2)), prepared)
