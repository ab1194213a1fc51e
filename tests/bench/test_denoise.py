import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from attrs import evolve
from torch import nn

from reasonrl import cli
from reasonrl.bench import denoise
from reasonrl.bench.denoise import Kept, gradient_gap, take
from reasonrl.bench.denoisers import CONTENDERS, OURS, STRAIGHT, WHOLE, Job, straight_loop
from reasonrl.bench.measure import Stopwatch, apart, peak_bytes
from reasonrl.bench.sd3 import FULL, MODELS, build, named_model
from reasonrl.errors import ConfigError
from reasonrl.renderers.family import Brief
from reasonrl.renderers.pipelines import Learns

CPU = torch.device("cpu")
TINY = MODELS["tiny"]
JOB = Job(group=3, steps=4, trained=3, rank=4)


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize(
    "changes", [{}, {"rank": 0}, {"recomputes": True}, {"num_rows": 1}], ids=["adapters", "full", "recomputed", "rows"]
)
def test_both_ways_of_ours_have_the_gradient_of_the_straight_loop(changes, guidance):
    assert 0 < gradient_gap(TINY, "float32", evolve(JOB, guidance=guidance, **changes), CPU) < 2e-5


def test_gradients_in_bfloat16_are_within_what_is_stated():
    assert 0 < gradient_gap(TINY, "bfloat16", JOB, CPU) < denoise.TOLERANCES["bfloat16"]


@pytest.mark.parametrize("wrong", [{"trained": 2}, {"guidance": 2.0}], ids=["a step less", "guided"])
def test_a_gap_is_seen_where_there_is_one(wrong, monkeypatch):
    monkeypatch.setitem(
        CONTENDERS, STRAIGHT, lambda family, job, dtype: straight_loop(family, evolve(job, **wrong), dtype)
    )
    assert gradient_gap(TINY, "float32", JOB, CPU) > denoise.TOLERANCES["bfloat16"]


def test_each_contender_takes_a_whole_step_and_its_ratio_is_1():
    found = {name: take(TINY, name, "float32", JOB, CPU) for name in CONTENDERS}
    for taken in found.values():
        assert list(taken.seconds) == list(denoise.PHASES)
        assert min(taken.seconds.values()) > 0
        assert taken.log_ratio < 1e-5
    assert found[WHOLE].kept == pytest.approx(JOB.trained * found[OURS].kept, rel=0.01)
    assert found[STRAIGHT].kept == pytest.approx(found[OURS].kept, rel=0.02)


def test_what_checkpointing_keeps_is_not_called_measured():
    assert take(TINY, OURS, "float32", evolve(JOB, recomputes=True), CPU).kept is None


def test_kept_bytes_are_those_of_each_storage_once_without_the_weights():
    layer, x = nn.Linear(8, 8, bias=False), torch.randn(5, 8, requires_grad=True)
    kept = Kept(layer)
    with kept():
        y = layer(x)  # keeps x, and its own weight
        z = y.exp()  # keeps z
        loss = (z * z[:2].sum()).sum()  # keeps z again, and a sum
    assert kept.now == x.nbytes + z.nbytes + 4
    loss.backward()
    assert (kept.now, kept.most) == (0, x.nbytes + z.nbytes + 4)


def test_kept_bytes_count_what_lives_at_once():
    kept = Kept(nn.Identity())
    with kept():
        for _ in range(3):
            torch.randn(100, requires_grad=True).square().sum().backward()
    assert (kept.now, kept.most) == (0, 400)


@pytest.mark.skipif(peak_bytes(lambda: None, CPU) is None, reason="this system does not tell a process's peak")
def test_streamed_steps_hold_one_step_of_memory():
    model, job = evolve(TINY, head_width=32, side=24), Job(group=4, steps=8, trained=8, rank=4)
    ours, whole = (apart(partial(take, model, name, "float32", job, CPU), CPU) for name in (OURS, WHOLE))
    assert not isinstance(ours, str), ours  # a line that says why its process failed
    assert not isinstance(whole, str), whole
    assert ours.peak < whole.peak / 2  # of a whole process; what autograd keeps is an eighth (tests/renderers)


def test_full_is_the_published_configuration():
    family = build(MODELS[FULL], dtype="bfloat16", learns=Learns(), device=torch.device("meta"))
    assert sum(value.numel() for value in family.denoiser.parameters()) == 2_243_171_520
    assert family.size == (512, 512)
    assert family.latent_shape(family.size) == (16, 64, 64)
    assert next(family.denoiser.parameters()).dtype == torch.bfloat16


def test_adapters_begin_away_from_zero_and_alone_learn():
    family = build(TINY, dtype="bfloat16", learns=Learns(rank=4), device=CPU)
    learning = {name: p for name, p in family.denoiser.named_parameters() if p.requires_grad}
    assert all(".lora_" in name and p.dtype == torch.float32 for name, p in learning.items())
    assert all(bool(p.abs().sum() > 0) for p in learning.values())


def test_a_text_has_conditions_of_its_own_whatever_is_beside_it():
    family = build(TINY, dtype="float32", learns=Learns(), device=CPU)
    first, second = family.encode([Brief("a"), Brief("b")], family.size)
    (alone,) = family.encode([Brief("b")], family.size)
    assert first["embeds"].shape == (TINY.words, TINY.text_width)
    assert all(torch.equal(second[name], alone[name]) for name in alone)
    assert not torch.equal(first["pooled"], second["pooled"])


def test_a_picture_shows_its_first_three_channels():
    family = build(TINY, dtype="float32", learns=Learns(), device=CPU)
    latents = torch.full((1, 4, 8, 8), -50.0)
    latents[0, 1, 2, 5] = 50.0
    (picture,) = family.decode(latents)
    assert picture.getpixel((5, 2)) == (0, 255, 0)
    assert picture.getpixel((2, 5)) == (0, 0, 0)


def test_the_command_prints_a_table_and_writes_json(capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(denoise, "apart", lambda work, device: work())
    options = ["--size", "tiny", "--group", "2", "--steps", "3", "--trained", "2", "--rank", "4"]
    monkeypatch.setattr(sys, "argv", ["reasonrl", "bench", "denoise", "--device", "cpu", *options])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capfd.readouterr().out
    assert not stopped.value.code
    assert "tiny, float32, LoRA 4, no checkpointing: 2 pictures of 64 px, 3 steps, 2 trained, guidance 1" in said
    assert "and of the straight loop, float32: equal, largest relative difference" in said
    assert f"torch {torch.__version__}" in said
    result = json.loads(Path("bench-denoise.json").read_text())
    assert [row["contender"] for row in result["rows"]] == list(CONTENDERS)
    assert result["gradients"]["float32"]["difference"] < denoise.TOLERANCES["float32"]


def test_a_contender_without_memory_is_a_line_that_says_so(monkeypatch):
    def refuses(work, device):
        return "out of memory" if WHOLE in work.args else work()

    monkeypatch.setattr(denoise, "apart", refuses)
    result = denoise.run(TINY, dtype="float32", job=JOB, device=CPU, repeats=2)
    (table,) = denoise.rendered(result)
    assert list(table.columns[1].cells)[1] == "out of memory"
    assert list(table.columns[2].cells)[:2] == ["1.00", ""]


def test_gradients_that_could_not_be_compared_are_not_called_equal():
    found = {"difference": "out of memory", "tolerance": 1e-4}
    assert denoise._said_of_gradients("bfloat16", found) == "gradients in bfloat16 were not compared: out of memory"
    assert "DIFFERENT" in denoise._said_of_gradients("float32", {"difference": 0.5, "tolerance": 1e-4})


def test_both_dtypes_are_compared_where_the_step_is_in_bfloat16(monkeypatch):
    monkeypatch.setattr(denoise, "apart", lambda work, device: work())
    result = denoise.run(TINY, dtype="bfloat16", job=JOB, device=CPU, repeats=1, only="straight")
    assert {name: found["difference"] < found["tolerance"] for name, found in result["gradients"].items()} == {
        "float32": True,
        "bfloat16": True,
    }


def test_phases_are_timed_however_often_they_come():
    watch = Stopwatch(CPU)
    family = build(TINY, dtype="float32", learns=JOB.learns, device=CPU)
    CONTENDERS[OURS](family, JOB, "float32")(watch)
    assert set(watch.seconds) == {"sample", "forward", "backward"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--trained", "11"], "trained steps between 1 and all steps, and a rank of at least 0, got group 4, rows 4"),
        (["--rows", "0"], "got group 4, rows 0, guidance 1, trained 4 of 10, rank 32"),
        (["--guidance", "0.5"], "guidance 0.5"),
        (["--dtype", "bfloat16,float32"], "a step has one --dtype, got 'bfloat16,float32'"),
        (["--size", "huge"], "--size takes one of tiny, small, sd3.5-medium, got 'huge'"),
        (["--only", "us"], "no contender begins with 'us': there are reasonrl; reasonrl, at once; straight loop"),
    ],
)
def test_options_that_cannot_work_are_refused_in_a_line(options, said, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["reasonrl", "bench", "denoise", "--device", "cpu", *options])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    error = capfd.readouterr().err
    assert stopped.value.code == 2
    assert said in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_names_of_sizes():
    assert named_model(FULL).layers == 24
    with pytest.raises(ConfigError, match="--size takes one of"):
        named_model("large")
