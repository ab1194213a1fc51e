"""What judging cost and why it was silent: from verdicts to metrics to the report."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonrl import Judge, Recipe, Trajectory, Verdict, run
from reasonrl.journal import costs, reason, reasons
from reasonrl.report import page, read_run
from reasonrl.spent import hidden, section, spent, spent_evaluating
from reasonrl.types import Score

Tiny = Callable[..., Recipe]


class Paid(Judge):
    """Costs something for each trajectory; every fourth is silent, with a colon in its reason's particulars."""

    def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        cost = {"calls": 1.0, "tokens_in": 100.0, "seconds": 0.5}
        silent = Score(None, "server gone: port 80: refused", cost)
        return [Verdict.of("Paid", silent if k == 3 else Score(k / 4, "", cost)) for k, _ in enumerate(trajectories)]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["calls", "hits"]), st.integers(0, 99))))
def test_costs_add_up_by_name_whatever_the_order(spendings: list[tuple[str, str, int]]) -> None:
    verdicts = [Verdict({}, {name: Score(1.0, "", {what: float(n)})}) for name, what, n in spendings]
    found = costs(verdicts)
    assert found == costs(verdicts[::-1])
    assert sum(found.values()) == sum(n for _, _, n in spendings)


def test_a_reason_is_the_note_up_to_its_colon() -> None:
    assert reason(Score(None, "timed out: no reply in 60 s")) == "timed out"
    assert reason(Score(None, "the image is blank")) == "the image is blank"
    assert reason(Score(None)) == "no reason given"
    assert len(reason(Score(None, "x" * 500))) == 40
    assert "\n" not in reason(Score(None, "two\nlines"))


def test_rare_reasons_are_counted_as_other_and_none_is_lost() -> None:
    verdicts = [Verdict.of("n", Score(None, f"reason {k}")) for k in range(40)] + [Verdict.of("n", 1.0)]
    found = reasons(verdicts)
    assert len(found) <= 13
    assert sum(found.values()) == 40
    assert found["other"] == 28


def test_a_trajectory_whose_two_scores_are_silent_for_one_reason_counts_once() -> None:
    verdict = Verdict({}, {"a": Score(None, "timed out: 1"), "b": Score(None, "timed out: 2")})
    assert reasons([verdict]) == {"timed out": 1}


@pytest.fixture(scope="module")
def paid(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paid") / "run"
    run(tiny(Paid()), folder, quiet=True)
    return folder


def test_a_runs_metrics_tell_costs_silence_and_time_by_step(paid: Path) -> None:
    lines = [json.loads(line) for line in (paid / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    for line in lines:
        assert line["cost/Paid/calls"] == 4
        assert line["cost/Paid/tokens_in"] == 400
        assert line["unscored"] == line["unscored/server gone"] == 0.25
        assert line["judge_s"] > 0
        assert 0 <= line["judge_hidden_frac"] <= 1


def test_the_report_shows_totals_and_reasons(paid: Path) -> None:
    run_read = read_run(paid)
    assert spent(run_read.metrics) == {"Paid": {"calls": 12, "tokens_in": 1200, "seconds": 6}}
    shown = page(run_read)
    assert "<h2>Judging</h2>" in shown
    assert "1,200 <small>400</small>" in shown
    assert "<td>server gone</td><td>25.00%</td>" in shown
    assert "cost/Paid" not in shown


def test_text_from_a_judge_is_escaped() -> None:
    shown = section([{"cost/<b>x</b>/calls": 1.0, "unscored/<script>": 0.5}])
    assert "<script>" not in shown
    assert "<b>" not in shown
    assert "&lt;script&gt;" in shown


def test_what_evaluations_took_has_a_row_of_its_own(paid: Path) -> None:
    lines = [{"costs": {"a": {"calls": 2.0}, "b": {"calls": 1.0, "hits": 4.0}}}, {"scores": {"a": 1.0}}]
    assert spent_evaluating(lines) == {"calls": 3.0, "hits": 4.0}
    shown = section(read_run(paid).metrics, lines)
    assert "<tr><td>evaluations</td><td>3</td>" in shown
    assert "<td>4</td></tr>" in shown


def test_a_run_whose_judge_costs_nothing_has_no_section() -> None:
    assert section([{"judge_s": 0.1, "judge_hidden_frac": 0.0, "reward": 1.0}]) == ""
    assert section([]) == ""


def test_hidden_time_is_weighted_by_the_judges_time() -> None:
    lines = [{"judge_s": 1.0, "judge_hidden_frac": 0.0}, {"judge_s": 3.0, "judge_hidden_frac": 1.0}]
    assert hidden(lines) == (4.0, 0.75)
    assert hidden([{"reward": 1.0}]) is None


def test_a_score_called_all_keeps_its_own_row_beside_the_sum() -> None:
    shown = section([{"cost/all/calls": 3.0, "cost/other/calls": 4.0}])
    assert "<tr class=''><td>all</td><td>3 <small>3</small></td></tr>" in shown
    assert "<tr class='all'><td>all</td><td>7 <small>7</small></td></tr>" in shown
