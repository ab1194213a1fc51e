import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrl.errors import ConfigError
from reasonrl.noise import Draw
from reasonrl.renderers.windows import trained_steps

moderate = settings(max_examples=60, deadline=None)


@st.composite
def windows(draw):
    num_steps = draw(st.integers(1, 30))
    within = draw(st.integers(1, num_steps))
    size = draw(st.integers(1, within))
    return num_steps, draw(st.sampled_from(["early", "random", "sliding"])), size, within


addresses = st.builds(Draw, st.integers(0, 99), st.integers(0, 99))


@moderate
@given(windows(), addresses, st.text(max_size=3))
def test_a_window_is_one_run_of_its_size_inside_its_bounds(asked, draw, prompt_id):
    num_steps, window, size, within = asked
    found = trained_steps(num_steps, window, size, draw=draw, prompt_id=prompt_id, within=within)
    start = found.index(True)
    assert found == (False,) * start + (True,) * size + (False,) * (num_steps - start - size)
    assert start + size <= within
    assert found == trained_steps(num_steps, window, size, draw=draw, prompt_id=prompt_id, within=within)
    if window == "early":
        assert start == 0


@moderate
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 9))
def test_a_sliding_window_visits_every_place_in_turn(num_places, size, every):
    num_steps = num_places + size - 1
    starts = [
        trained_steps(num_steps, "sliding", size, draw=Draw(0, i), every=every).index(True)
        for i in range(num_places * every + 1)
    ]
    assert starts == [i // every for i in range(num_places * every)] + [0]


def test_a_random_window_is_uniform_over_its_places_and_prompts_may_differ():
    """4,000 addresses, 4 places: counts within 4 standard errors, sqrt(4000 * 1/4 * 3/4)."""
    starts = [trained_steps(10, "random", 2, draw=Draw(0, i), within=5).index(True) for i in range(4000)]
    counts = torch.bincount(torch.tensor(starts))
    assert len(counts) == 4
    assert (counts - 1000).abs().max() < 4 * math.sqrt(4000 * 3 / 16)
    of_prompts = {trained_steps(10, "random", 2, draw=Draw(0, 0), prompt_id=str(i)) for i in range(40)}
    assert len(of_prompts) > 3


def test_all_steps_are_those_within():
    assert trained_steps(3, draw=Draw(0, 0)) == (True, True, True)
    assert trained_steps(3, draw=Draw(0, 0), within=2) == (True, True, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, "random", 5), "got size 5, within 4, num_steps 4"),
        ((4, "random", 0), "got size 0"),
        ((4, "early"), "say how many steps"),
        ((4, "all", 2), "leave it out"),
        ((4, "late", 2), 'window must be "all", "early", "random" or "sliding"'),
    ],
)
def test_a_window_that_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        trained_steps(*arguments, draw=Draw(0, 0))
    with pytest.raises(ConfigError, match="within 5, num_steps 4"):
        trained_steps(4, "early", 2, draw=Draw(0, 0), within=5)
    with pytest.raises(ConfigError, match="every 0"):
        trained_steps(4, "sliding", 2, draw=Draw(0, 0), every=0)
