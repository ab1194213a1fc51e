import json
import sys
from pathlib import Path

import pytest
import torch
from attrs import evolve

from reasonrl import cli
from reasonrl.bench import step
from reasonrl.bench.measure import apart, peak_bytes
from reasonrl.bench.models import SIZES, build
from reasonrl.bench.samplers import Task
from reasonrl.bench.steps import LEARNERS, Job, prepare, rollout

CPU = torch.device("cpu")
TINY = SIZES["tiny"]
JOB = Job(Task(group=3, prefix=10, text=5, image=16), rank=4)


def gradients(name, job):
    """Returns a contender's gradient of the whole job, flat, in float32."""
    found = step._gradients(TINY, job, LEARNERS[name], CPU)
    return torch.cat([found[name].flatten() for name in sorted(found)])


@pytest.mark.parametrize("recomputes", [True, False])
@pytest.mark.parametrize("rank", [4, 0], ids=["adapters", "full"])
def test_the_gradient_of_peers_is_ours(rank, recomputes):
    job = evolve(JOB, rank=rank, recomputes=recomputes, num_rows=None if recomputes else 2)
    assert 0 < step.gradient_gap(TINY, job, CPU) < 1e-5 < step.TOLERANCE


def test_the_conditional_gradient_of_peers_is_ours_too_and_another_one():
    guided, conditional = (gradients(name, JOB) for name in ("reasonrl", "reasonrl, conditional"))
    peers = gradients("whole logits, conditional", JOB)
    assert step.relative(conditional, peers) < 1e-5
    assert step.relative(guided, peers) > 0.1


def test_a_gap_is_seen_where_there_is_one(monkeypatch):
    wrong = evolve(LEARNERS["whole logits"], guided=False)
    monkeypatch.setitem(LEARNERS, "whole logits", wrong)
    assert step.gradient_gap(TINY, JOB, CPU) > 0.1


def test_rows_a_pass_do_not_change_the_gradient():
    torch.testing.assert_close(gradients("reasonrl", evolve(JOB, num_rows=1)), gradients("reasonrl", JOB))


def test_adapters_begin_away_from_zero_and_alone_learn():
    model = build(TINY, dtype="float32", device=CPU)
    prepare(model, JOB)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name and bool(p.abs().sum() > 0) for name, p in learning.items())
    assert len(learning) == 2 * 7 * TINY.layers


def test_what_is_learned_from_is_the_same_for_every_contender():
    first, second = (rollout(JOB.task, vocab=TINY.vocab, image_vocab=TINY.image_vocab) for _ in range(2))
    assert torch.equal(first.words, second.words)
    assert torch.equal(first.advantages, second.advantages)
    assert first.image.shape == (3, 16)
    assert first.words.shape == (3, 6)


@pytest.mark.parametrize("name", LEARNERS)
def test_every_contender_takes_a_whole_step(name):
    taken = step.take(TINY, name, "float32", JOB, CPU, samples=True)
    assert set(taken.seconds) == {"forward", "backward", "optimizer", "sample"}
    assert min(taken.seconds.values()) > 0
    assert "sample" not in step.take(TINY, name, "bfloat16", JOB, CPU, samples=False).seconds


def test_drawing_leaves_gradient_checkpointing_as_it_was():
    job = evolve(JOB, recomputes=True)
    model = build(TINY, dtype="float32", device=CPU)
    prepare(model, job)
    assert model.model.language_model.training
    step.timed_sample(LEARNERS["whole logits"], model, job, CPU)
    assert model.model.language_model.training


def peaks() -> list[int | None]:
    """Returns what ours and peers' hold at most, of a job with many words."""
    size = evolve(TINY, vocab=50_000)
    job = evolve(JOB, task=evolve(JOB.task, group=8, text=32))
    names = ("reasonrl", "whole logits")
    return [step.take(size, name, "float32", job, CPU, samples=False).peak for name in names]


@pytest.mark.skipif(peak_bytes(lambda: None, CPU) is None, reason="this system does not tell a process's peak")
def test_peers_hold_the_logits_of_every_position_and_ours_does_not():
    ours, peers = apart(peaks, CPU)
    logits = 8 * (10 + 32) * 50_000 * 4
    assert peers > 1.5 * logits
    assert ours < 0.5 * logits


def test_the_command_prints_a_table_and_writes_json(capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(step, "apart", lambda work, device: work())
    options = ["--size", "tiny", "--group", "2", "--prefix", "8", "--text", "3", "--rank", "4", "--no-sample"]
    monkeypatch.setattr(sys, "argv", ["reasonrl", "bench", "step", "--device", "cpu", *options])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capfd.readouterr().out
    assert not stopped.value.code
    assert "tiny, float32, LoRA 4, checkpointing: 2 rows of 8 + 3 + 16 tokens, guidance 5" in said
    assert "gradients of reasonrl and whole logits, float32: equal, largest relative difference" in said
    result = json.loads(Path("bench-step.json").read_text())
    assert [row["contender"] for row in result["rows"]] == list(LEARNERS)
    assert result["gradients"]["difference"] < step.TOLERANCE


def test_a_contender_without_memory_is_a_line_that_says_so(monkeypatch):
    def refuses(work, device):
        name = work.args[1]
        return "out of memory" if name == "whole logits" else work()

    monkeypatch.setattr(step, "apart", refuses)
    result = step.run(TINY, dtype="float32", job=JOB, device=CPU, repeats=1, samples=False)
    (table,) = step.rendered(result)
    assert list(table.columns[1].cells)[1] == "out of memory"
    assert list(table.columns[2].cells) == ["1.00", "", "1.00", list(table.columns[2].cells)[3]]


def test_gradients_that_could_not_be_compared_are_not_called_equal():
    said = step.said_of_gradients({"gradients": {"difference": "out of memory", "tolerance": 1e-4}})
    assert said == "gradients of reasonrl and whole logits were not compared: out of memory"
    assert "DIFFERENT" in step.said_of_gradients({"gradients": {"difference": 0.5, "tolerance": 1e-4}})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--text", "0"], "a step needs reasoning and rows of at least 1, and a rank of at least 0, got text 0"),
        (["--rows", "0"], "got text 100, rows 0, rank 32"),
        (["--dtype", "bfloat16,float32"], "a step has one --dtype, got 'bfloat16,float32'"),
        (["--only", "us"], "no contender begins with 'us': there are reasonrl; whole logits; reasonrl, conditional"),
    ],
)
def test_options_that_cannot_work_are_refused_in_a_line(options, said, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["reasonrl", "bench", "step", "--size", "tiny", *options])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    error = capfd.readouterr().err
    assert stopped.value.code == 2
    assert said in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())
