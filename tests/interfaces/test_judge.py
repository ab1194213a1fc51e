import math

import pytest
from attrs import frozen
from hypothesis import given
from hypothesis import strategies as st

from reasonrl.errors import ConfigError, ContractError
from reasonrl.interfaces import Judge, PointwiseJudge
from reasonrl.interfaces.judge import Named, On, Product, Scaled, Sum, finite
from reasonrl.testing import ToyJudge, check_judge
from reasonrl.types import EVERY, Prompt, Score, Term, Trajectory

ONE = (Trajectory(Prompt("p", "a red cup")),)
values = st.none() | st.floats(-4, 4)


@frozen
class Says(PointwiseJudge):
    """Scores everything alike."""

    name: str
    value: float | None = 1.0

    def score(self, trajectory):
        return self.value


def said(judge: Judge, stage: str = EVERY) -> float | None:
    (verdict,) = judge.judge(ONE)
    return verdict.total(stage)


def terms(judge: Judge, stage: str = EVERY) -> list[tuple[str, float | None, float]]:
    (verdict,) = judge.judge(ONE)
    return [(term.name, term.value, term.weight) for term in verdict.on(stage) or ()]


# ---- Meaning ---------------------------------------------------------------------------------


@given(a=values, b=values)
def test_a_sum_is_unscored_where_a_summand_is(a, b):
    expected = None if a is None or b is None else a + b
    assert said(Says("a", a) + Says("b", b)) == expected
    assert terms(Says("a", a) + Says("b", b)) == [("a", a, 1.0), ("b", b, 1.0)]


@given(a=values, b=values)
def test_a_product_is_zero_where_a_factor_is_and_unscored_where_another_is(a, b):
    unscored = None in (a, b)
    expected = 0.0 if 0 in (a, b) else None if unscored else a * b
    assert said(Says("a", a) * Says("b", b)) == expected


@given(a=values, weight=st.floats(-4, 4))
def test_a_weight_scales_the_reward_and_not_the_score(a, weight):
    (verdict,) = (weight * Says("a", a)).judge(ONE)
    assert verdict.scores["a"].value == a
    assert verdict.terms[EVERY] == (Term("a", 0.0 if weight == 0 else a, weight),)
    assert weight * Says("a", a) == Says("a", a) * weight == Scaled(Says("a", a), weight)


@given(a=values, b=values, c=values, d=values)
def test_the_published_reward_is_the_expression(a, b, c, d):
    judge = Says("PI", a) * (Says("sem", b) + Says("spa", c)) * Says("RI", d)
    plan = None if b is None or c is None else b + c
    factors = [a, plan, d]
    expected = 0.0 if 0 in factors else None if None in factors else math.prod(factors)
    assert said(judge) == (expected if expected is None else pytest.approx(expected))
    assert {t.name for t in judge.judge(ONE)[0].terms[EVERY]} == {t for t, _, _ in terms(judge)}
    assert set(judge.judge(ONE)[0].scores) == {"PI", "sem", "spa", "RI"}


def test_a_weight_inside_a_product_counts():
    assert said((0.5 * Says("a", 4.0)) * Says("b", 3.0)) == 6.0
    assert said(0.5 * (Says("a", 4.0) * Says("b", 3.0))) == 6.0
    assert terms(0.5 * (Says("a", 4.0) * Says("b", 3.0))) == [("a*b", 12.0, 0.5)]


def test_a_closed_gate_needs_no_second_opinion():
    assert said(Says("format", 0.0) * Says("vlm", None)) == 0.0
    assert said(Says("vlm", None) * Says("format", 0.0)) == 0.0
    assert said(Says("format", 1.0) * Says("vlm", None)) is None


# ---- Stages ----------------------------------------------------------------------------------


def test_a_stage_of_its_own_overrides_every():
    judge = Says("a", 1.0).on("reasoning") + Says("b", 2.0)
    assert judge.stages == {"reasoning", EVERY}
    assert said(judge, "reasoning") == 3.0
    assert said(judge, "image") == said(judge) == 2.0


def test_judges_not_on_a_stage_drop_out_of_a_product():
    judge = Says("gate", 0.0).on("reasoning") * Says("b", 2.0)
    assert said(judge, "reasoning") == 0.0
    assert said(judge, "image") == 2.0
    assert terms(judge, "image") == [("b", 2.0, 1.0)]


def test_nothing_is_said_where_no_judge_is():
    (verdict,) = (Says("a").on("reasoning") + Says("b").on("image")).judge(ONE)
    assert verdict.on("video") is None
    assert verdict.total("video") is None
    assert verdict.on(EVERY) is None


def test_restricting_a_sum_keeps_what_it_says_there():
    judge = (Says("a", 1.0).on("reasoning") + Says("b", 2.0)).on("image")
    assert judge.stages == {"image"}
    assert said(judge, "image") == 2.0
    assert said(judge, "reasoning") is None


# ---- Names -----------------------------------------------------------------------------------


def test_one_name_twice_is_refused_and_renaming_helps():
    with pytest.raises(ContractError, match=r"both score a: rename one with \.named"):
        (Says("a") + Says("a")).judge(ONE)
    with pytest.raises(ContractError, match="both score a"):
        (Says("a") * Says("a")).judge(ONE)
    both = Says("a", 1.0) + Says("a", 2.0).named("again")
    assert terms(both) == [("a", 1.0, 1.0), ("again", 2.0, 1.0)]
    assert set(both.judge(ONE)[0].scores) == {"a", "again"}


def test_renaming_several_puts_the_name_in_front():
    (verdict,) = (Says("a") + 0.5 * Says("b")).named("x").judge(ONE)
    assert [t.name for t in verdict.terms[EVERY]] == ["x.a", "x.b"]
    assert [t.weight for t in verdict.terms[EVERY]] == [1.0, 0.5]
    assert set(verdict.scores) == {"x.a", "x.b"}


def test_renaming_a_product_names_its_one_term():
    (verdict,) = (Says("a") * Says("b")).named("x").judge(ONE)
    assert [t.name for t in verdict.terms[EVERY]] == ["x"]
    assert set(verdict.scores) == {"x.a", "x.b"}


# ---- Shape of expressions --------------------------------------------------------------------


def test_chains_are_flat_and_order_is_kept():
    a, b, c = Says("a"), Says("b"), Says("c")
    assert a + b + c == a + (b + c) == Sum((a, b, c))
    assert a * b * c == a * (b * c) == Product((a, b, c))
    assert a.on("x") == On(a, "x")
    assert a.named("x") == Named(a, "x")


def test_an_expression_needs_and_says_what_its_parts_do():
    @frozen
    class Sees(Says):
        needs = frozenset({"image"})

    judge = 0.5 * (Sees("a") * Says("b").on("reasoning")).named("x") + Says("c").on("image")
    assert judge.needs == {"image"}
    assert judge.stages == {EVERY, "reasoning", "image"}


@pytest.mark.parametrize("other", ["text", None, [1]])
def test_only_judges_and_numbers_combine(other):
    with pytest.raises(TypeError):
        Says("a") * other
    with pytest.raises(TypeError):
        Says("a") + other
    with pytest.raises(TypeError):
        Says("a") + 1.0


def test_a_sum_or_product_of_what_is_no_judge_is_refused():
    with pytest.raises(ConfigError, match=r"needs judges, got \['float'\]"):
        Sum((Says("a"), 1.0))
    with pytest.raises(ConfigError, match="needs judges, got nothing"):
        Product(())


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_weight_must_be_finite(weight):
    with pytest.raises(ConfigError, match="a judge's weight must be finite, got"):
        weight * Says("a")


def test_no_trajectories_give_no_verdicts():
    judge = 0.5 * (Says("a") * Says("b") + Says("c").on("image")).named("x")
    assert list(judge.judge([])) == []


def test_a_part_that_miscounts_is_named():
    @frozen
    class Short(Judge):
        def judge(self, trajectories):
            return []

    with pytest.raises(ContractError, match="Short returned 0 verdicts for 1 trajectories"):
        (Short() + Says("a")).judge(ONE)


@given(st.data())
def test_any_expression_keeps_the_contract_of_a_judge(data):
    leaves = iter(f"j{n}" for n in range(99))
    leaf = st.builds(lambda value: Says(next(leaves), value), values)

    def grow(inner):
        pairs = st.tuples(inner, inner)
        return st.one_of(
            pairs.map(lambda ab: ab[0] + ab[1]),
            pairs.map(lambda ab: ab[0] * ab[1]),
            st.tuples(st.sampled_from([0.5, -1.0]), inner).map(lambda wa: wa[0] * wa[1]),
        )

    check_judge(data.draw(st.recursive(leaf, grow, max_leaves=6)))


# ---- Pointwise judges ------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_the_judges_fault(value):
    (verdict,) = Says("a", value).judge(ONE)
    assert verdict.total() is None
    assert verdict.scores["a"].note == f"not finite: {value}"
    assert finite(Score(value)).value is None


def test_a_pointwise_judge_is_named_after_its_class():
    assert [t.name for t in ToyJudge().judge(ONE)[0].terms[EVERY]] == ["ToyJudge"]


def test_a_missing_artifact_is_unscored_without_asking():
    @frozen
    class Saliency(PointwiseJudge):
        needs = frozenset({"saliency"})

        def score(self, trajectory):
            raise AssertionError("was asked")

    (verdict,) = Saliency().judge(ONE)
    assert verdict.scores["Saliency"] == Score(None, "no saliency")


def test_a_judge_without_judge_fails_at_construction_with_its_name():
    class Nothing(PointwiseJudge):
        pass

    with pytest.raises(TypeError, match="score"):
        Nothing()


def test_a_score_is_neither_true_nor_false():
    with pytest.raises(ContractError, match=r"score\.value is None"):
        bool(Score(0.0))


# ---- Corners ---------------------------------------------------------------------------------


def test_a_generator_of_parts_is_not_lost():
    assert Sum(Says(name) for name in "ab").parts == (Says("a"), Says("b"))


def test_restricting_to_a_stage_the_judge_never_speaks_of_is_refused():
    with pytest.raises(ConfigError, match="image"):
        Says("a").on("reasoning").on("image")


def test_a_weight_of_zero_times_unscored_is_zero():
    assert said(0.0 * Says("vlm", None) + Says("a", 2.0)) == 2.0


def test_the_name_of_a_product_of_a_sum_has_its_brackets():
    judge = Says("a") * (Says("b") + Says("c"))
    assert [name for name, _, _ in terms(judge)] == ["a*(b+c)"]


def test_a_score_is_a_plain_float_however_it_was_given():
    import numpy as np

    assert type(finite(Score(np.float32(0.5))).value) is float


def test_a_product_that_overflows_is_unscored():
    assert said(Says("a", 1e200) * Says("b", 1e200)) is None


def test_a_part_that_returns_numbers_is_named():
    @frozen
    class Numbers(Judge):
        def judge(self, trajectories):
            return [1.0 for _ in trajectories]

    with pytest.raises(ContractError, match="Numbers"):
        (Numbers() + Says("a")).judge(ONE)


def test_no_image_is_a_zero_because_it_is_the_policys_fault():
    @frozen
    class Sees(Says):
        needs = frozenset({"image"})

    assert said(Sees("a")) == 0.0


def test_renaming_gives_a_term_one_name_at_all_stages():
    judge = (Says("a").on("reasoning") + Says("b")).named("x")
    assert {name for name, _, _ in terms(judge)} <= {n for n, _, _ in terms(judge, "reasoning")}
