import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from attrs import evolve

from reasonrl.bench import kernels
from reasonrl.bench.commands import report
from reasonrl.bench.contenders import CONTENDERS, Contender
from reasonrl.bench.measure import Ceilings, ceilings, machine, peak_bytes
from reasonrl.bench.problems import CFG_WEIGHT, Shape, operands, solved
from reasonrl.errors import ConfigError
from reasonrl.kernels import reference

CPU = torch.device("cpu")
LIMITS = Ceilings(1e9, {"bfloat16": 1e9, "float32": 1e9})
SHAPES = [Shape("logits", 70, 300, 0), Shape("linear", 70, 300, 16), Shape("guidance", 70, 300, 16)]
HERE = [c for c in CONTENDERS if not c.needs and not c.compiled and c.missing("cpu") is None]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.table)
def test_the_answer_is_that_of_the_specification_in_float64(shape):
    problem = operands(shape, CPU)
    target, answer = solved(shape, problem)
    wide = [value.double().requires_grad_() for value in problem.operands]
    if shape.table == "logits":
        log_prob = reference.selective_log_prob(wide[0][:-1], target).log_prob
    else:
        uncond = wide[1] if shape.table == "guidance" else None
        log_prob = reference.linear_log_prob(
            wide[0], wide[-1], target, uncond_hidden=uncond, cfg_weight=CFG_WEIGHT
        ).log_prob
    slopes = torch.autograd.grad(log_prob, wide, problem.slopes.double())
    scale = CFG_WEIGHT if shape.table == "guidance" else 1.0
    torch.testing.assert_close(answer.log_prob, log_prob.detach())
    torch.testing.assert_close(answer.of_rows * scale, slopes[0][answer.rows])
    if shape.width:
        torch.testing.assert_close(answer.of_words, slopes[-1][answer.words])


def test_targets_are_drawn_from_the_distribution():
    shape = Shape("logits", 20000, 6, 0, spread=0.0)
    problem = operands(shape, CPU)
    skewed = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.06, 0.04])
    target, _ = solved(shape, evolve(problem, logits=skewed.log().expand(shape.rows + 1, 6)))
    torch.testing.assert_close(target.bincount(minlength=6) / shape.rows, skewed, atol=0.012, rtol=0)


@pytest.mark.parametrize("contender", HERE, ids=lambda c: f"{c.table}: {c.name}")
def test_every_contender_answers_the_same_question(contender):
    shape = next(s for s in SHAPES if s.table == contender.table)
    problem = operands(shape, CPU)
    target, answer = solved(shape, problem)
    errors = kernels._errors(contender, evolve(problem, target=target), answer)
    ours = contender.name.startswith("reasonrl") and "fast" not in contender.name
    guided = shape.table == "guidance" and "exact" not in contender.name
    assert errors["log_prob"] <= (5e-5 if ours and not guided else 0.3)
    assert errors["rows"] <= (4e-3 if ours and not guided else 5e-2)


def test_a_contender_is_measured_in_every_phase():
    shape = SHAPES[1]
    target, answer = solved(shape, operands(shape, CPU))
    ours = next(c for c in CONTENDERS if c.table == "linear")
    row = kernels.measured(shape, ours, target, answer, LIMITS, least_s=0.0)
    assert not row.failed
    assert set(row.seconds) == set(row.rate) == {"forward", "both", "frozen"}
    assert row.rate["both"] == pytest.approx(8 * 70 * 300 * 16 / row.seconds["both"])
    assert row.share["both"] == pytest.approx(row.rate["both"] / 1e9)


def test_a_contender_that_fails_is_a_row_that_says_why():
    shape = SHAPES[1]
    target, answer = solved(shape, operands(shape, CPU))
    huge = evolve(shape, vocab=10**13)
    row = kernels.measured(huge, CONTENDERS[7], target, answer, LIMITS, least_s=0.0)
    assert "DefaultCPUAllocator" in row.failed
    assert row.seconds == row.errors == {}


def allocate(megabytes: int) -> int | None:
    return peak_bytes(lambda: torch.ones(megabytes * 2**18).sum(), CPU)


@pytest.mark.skipif(peak_bytes(lambda: None, CPU) is None, reason="this system does not tell a process's peak")
def test_peak_memory_is_what_a_call_holds_at_most():
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(allocate, 64).result() == pytest.approx(64 * 2**20, rel=0.1)


def test_the_result_is_written_and_every_contender_has_a_line(tmp_path, monkeypatch):
    few = [c for c in CONTENDERS if c.table == "logits" and c.name in ("reasonrl", "torch eager, float32")]
    absent = Contender("a peer", "logits", lambda p: p.target, "no_such_module")
    monkeypatch.setattr(kernels, "CONTENDERS", (*few, absent))
    result = kernels.run(["logits"], device=CPU, rows=[40], vocab=[200], least_s=0.0)
    (table,) = kernels.rendered(result)
    report(result, [table], tmp_path / "deep" / "bench.json", "")
    assert json.loads((tmp_path / "deep" / "bench.json").read_text())["rows"][0]["contender"] == "reasonrl"
    assert list(table.columns[0].cells) == ["reasonrl", "", "torch eager, float32", "", "a peer"]
    assert list(table.columns[1].cells)[-1] == "not installed"
    assert list(table.columns[3].cells)[:2] == ["1.00", "1.00"]


def test_ceilings_and_machine_say_what_a_figure_needs():
    limits = ceilings(CPU, least_s=0.0)
    assert limits.copy > 1e8
    assert set(limits.products) == {"bfloat16", "float32"}
    about = machine(CPU)
    assert about["device"]
    assert about["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("tables", ["", "logits,heads"])
def test_a_table_that_is_none_is_refused(tables):
    with pytest.raises(ConfigError, match="--tables takes logits, linear, guidance with commas"):
        kernels.named(tables)


def test_a_size_below_one_is_refused():
    with pytest.raises(ConfigError, match=r"sizes must be at least 1, got rows \[0\]"):
        kernels.shapes(["linear"], device=CPU, rows=[0], vocab=[], width=[])
