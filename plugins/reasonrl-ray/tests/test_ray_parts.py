from hypothesis import given
from hypothesis import strategies as st
from reasonrl_ray.parts import Part, split

from reasonrl import Prompt, Trajectory


@given(st.lists(st.sampled_from("abcdefgh"), max_size=40), st.integers(1, 9))
def test_parts_hold_every_row_once_and_groups_whole(ids, number):
    parts = split([Trajectory(Prompt(i, "text"), (k,)) for k, i in enumerate(ids)], number)
    assert sorted(row for part in parts for row in part.rows) == list(range(len(ids)))
    assert len(parts) == min(number, len(set(ids)))
    homes = [{ids[row] for row in part.rows} for part in parts]
    assert sum(map(len, homes)) == len(set(ids))
    assert all(part.rows == sorted(part.rows) for part in parts)


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 8))
def test_equal_groups_are_shared_out_evenly(num_groups, size, number):
    rows = [Trajectory(Prompt(f"p{k // size}", "text"), (k,)) for k in range(num_groups * size)]
    loads = [len(part.rows) for part in split(rows, number)]
    assert max(loads) - min(loads) <= size


def test_a_part_falls_apart_into_groups_with_one_death_more():
    assert Part(((0, 3), (1, 2)), 1).apart() == [Part(((0, 3),), 2), Part(((1, 2),), 2)]
