import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrl.noise import Draw, choose, normal, uniform

moderate = settings(max_examples=40, deadline=None)

ids = st.text(max_size=4)
members = st.lists(st.integers(0, 30), max_size=3).map(tuple)
names = st.sampled_from(["reasoning", "image", "sample", "noise"])
addresses = st.tuples(st.integers(0, 9), st.integers(0, 9), ids, members, names, names)
keys = st.integers(0, 2**63 - 1)
below_one = st.floats(0, 1, exclude_max=True)
ALMOST_ONE = math.nextafter(1.0, 0.0)


def key_of(address):
    seed, step, *rest = address
    return Draw(seed, step).key(*rest)


# ---- Addresses -------------------------------------------------------------------------------


@moderate
@given(addresses, addresses)
def test_a_key_differs_for_every_changed_part_of_the_address(one, other):
    found = key_of(one)
    assert 0 <= found < 2**63
    for i, part in enumerate(other):
        changed = (*one[:i], part, *one[i + 1 :])
        assert (key_of(changed) == found) == (changed == one)


def test_neighbouring_addresses_have_their_own_keys():
    draw = Draw(0, 0)
    found = [
        draw.key("a", (1, 2), "s"),
        draw.key("a", (12,), "s"),
        draw.key("a", (1,), "s"),
        draw.key("a", (), "s"),
        draw.key("a', (", (), "s"),
        draw.key("a", (1,), "s", "render"),
        draw.key("as", (1,), ""),
        Draw(0, 1).key("a", (1,), "s"),
        Draw(1, 0).key("a", (1,), "s"),
    ]
    assert len(set(found)) == len(found)


def test_the_last_bit_of_63_is_used():
    found = [Draw(0, 0).key("p", (i,), "s") for i in range(64)]
    assert max(found) >= 2**62
    assert {key % 2 for key in found} == {0, 1}


def test_golden_key_is_the_same_on_every_machine_and_day():
    assert Draw(1, 2).key("p", (0, 3), "image") == 505682300098902815


# ---- Rows ------------------------------------------------------------------------------------


@moderate
@given(st.lists(keys, max_size=5), st.randoms(use_true_random=False))
def test_a_row_of_noise_depends_on_its_own_key_alone(rows, random):
    for draw in (uniform, normal):
        found = draw(rows, 2, 3)
        assert found.shape == (len(rows), 2, 3)
        order = random.sample(range(len(rows)), len(rows))
        assert torch.equal(draw([rows[i] for i in order], 2, 3), found[order])
        for row, key in zip(found, rows, strict=True):
            assert torch.equal(draw([key], 2, 3)[0], row)


def test_uniforms_are_float64_in_the_unit_interval():
    found = uniform([1, 2, 3], 500)
    assert found.dtype == torch.float64
    assert ((found >= 0) & (found < 1)).all()
    assert found.mean().item() == pytest.approx(0.5, abs=0.03)
    assert len(found.unique()) == found.numel()


def test_normals_are_float32_of_unit_variance():
    found = normal([1, 2, 3], 500)
    assert found.dtype == torch.float32
    assert found.mean().item() == pytest.approx(0, abs=0.1)
    assert found.std().item() == pytest.approx(1, abs=0.1)


def test_noise_neither_reads_nor_moves_the_global_generator():
    before = torch.get_rng_state()
    uniform([5], 2)
    normal([5], 2)
    assert torch.equal(torch.get_rng_state(), before)


# ---- Choice ----------------------------------------------------------------------------------

weights = st.lists(st.sampled_from([0.0, 0.0, 1e-30, 1e-9, 0.1, 0.3, 1.0, 7.0]), min_size=1)
tables = weights.filter(any)


def log_probs_of(table, dtype=torch.float32):
    return (torch.tensor(table, dtype=dtype) / sum(table)).log()


@settings(max_examples=150, deadline=None)
@given(tables, below_one | st.sampled_from([0.0, 5e-324, 0.1 + 0.2, 0.3, ALMOST_ONE]))
def test_a_token_of_probability_zero_is_never_chosen(table, u):
    for dtype in (torch.float32, torch.float64):
        (token,) = choose(log_probs_of(table, dtype)[None], torch.tensor([u], dtype=torch.float64))
        assert table[token] > 0


@moderate
@given(st.lists(tables, min_size=1, max_size=4), st.integers(0, 9), st.data())
def test_a_row_chooses_whatever_the_other_rows_are(rows, seed, data):
    width = max(map(len, rows))
    padded = torch.stack([log_probs_of([*row, *[0.0] * (width - len(row))]) for row in rows])
    uniforms = uniform([seed], len(rows))[0]
    found = choose(padded, uniforms)
    assert found.dtype == torch.int64
    i = data.draw(st.integers(0, len(rows) - 1))
    assert choose(padded[i : i + 1], uniforms[i : i + 1]).item() == found[i]


@moderate
@given(st.integers(0, 2**31), st.floats(-1e-3, 1e-3))
def test_a_sum_that_rounding_left_off_one_is_safe(seed, off):
    logits = torch.randn(1, 3000, generator=torch.Generator().manual_seed(seed))
    log_probs = logits.log_softmax(-1) + off
    found = choose(log_probs, torch.tensor([ALMOST_ONE], dtype=torch.float64))
    assert found.item() == 2999
    same = choose(log_probs, torch.tensor([0.5], dtype=torch.float64))
    exact = choose(logits.double().log_softmax(-1), torch.tensor([0.5], dtype=torch.float64))
    assert abs(same.item() - exact.item()) <= 1


@pytest.mark.parametrize("seed", range(3))
def test_frequencies_match_the_probabilities(seed):
    table, num_draws = [0.05, 0.0, 0.15, 0.5, 0.3], 4000
    log_probs = log_probs_of(table).expand(num_draws, -1)
    found = choose(log_probs, uniform([seed], num_draws)[0])
    counts = found.bincount(minlength=5).double()
    assert counts[1] == 0
    expected = torch.tensor([p for p in table if p]) * num_draws
    chi_square = ((counts[counts > 0] - expected).square() / expected).sum().item()
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001


def test_golden_choices_at_the_edges_of_the_distribution():
    log_probs = torch.tensor([0.0, 0.25, 0.25, 0.0, 0.5, 0.0]).log().expand(6, -1)
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.4999, 0.5, ALMOST_ONE], dtype=torch.float64)
    assert choose(log_probs, uniforms).tolist() == [1, 1, 2, 2, 4, 4]


def test_rows_in_any_memory_layout_are_read_without_a_warning():
    log_probs = torch.tensor([[0.5, 0.25], [0.5, 0.25], [0.0, 0.5]]).log().T
    uniforms = torch.tensor([[0.1, 0.0], [0.9, 0.0]], dtype=torch.float64)[:, 0]
    assert choose(log_probs, uniforms).tolist() == [0, 2]
