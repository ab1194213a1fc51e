import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from attrs import evolve

from reasonrl import cli
from reasonrl.bench import commands, sampler
from reasonrl.bench.measure import Ceilings, Stopwatch, apart, read_rate
from reasonrl.bench.models import SIZES, SPECIAL, build, named_dtypes, named_size
from reasonrl.bench.samplers import SAMPLERS, Task, first_tokens
from reasonrl.errors import ConfigError
from reasonrl.noise import choose
from reasonrl.policies import GoTR1

CPU = torch.device("cpu")
TINY = SIZES["tiny"]
TASK = Task(group=4, prefix=10, text=3, image=16)


@pytest.fixture(scope="module")
def model():
    return build(TINY, dtype="float32", device=CPU)


@pytest.fixture
def in_this_process(monkeypatch):
    """Measures without a process of its own, and without the seconds that ceilings take."""
    monkeypatch.setattr(sampler, "apart", lambda work, device: work())
    monkeypatch.setattr(sampler, "ceilings", lambda device: Ceilings(1e9, {"bfloat16": 1e9, "float32": 1e9}))
    monkeypatch.setattr(sampler, "read_rate", lambda device: 1e9)


@pytest.mark.parametrize("text", [0, 3])
def test_the_same_uniforms_draw_the_same_tokens_from_every_contender(model, monkeypatch, text):
    task = evolve(TASK, text=text)
    words, image = task.uniforms()
    drawn = {}
    for name, draws in SAMPLERS.items():
        uniforms = iter([*words[:, :text].unbind(1), *image.unbind(1)])
        monkeypatch.setattr(
            torch, "multinomial", lambda probs, num_samples, u=uniforms: choose(probs.log(), next(u))[:, None]
        )
        drawn[name] = draws(model, task, Stopwatch(CPU))
        assert name == "reasonrl" or next(uniforms, None) is None, f"{name} drew another number of tokens"
    for name, ids in drawn.items():
        assert ids.shape == (4, 16)
        assert torch.equal(ids, drawn["reasonrl"]), name
    assert len(drawn["reasonrl"].unique()) > 20  # not a constant that everybody agrees on


@pytest.mark.parametrize("name", SAMPLERS)
def test_guidance_moves_what_is_drawn(model, name):
    torch.manual_seed(0)
    weak = SAMPLERS[name](model, evolve(TASK, guidance=1.01), Stopwatch(CPU))
    torch.manual_seed(0)
    strong = SAMPLERS[name](model, evolve(TASK, guidance=40.0), Stopwatch(CPU))
    assert not torch.equal(weak, strong)


def test_ready_weights_are_told_from_the_prompt(model):
    first = first_tokens(model, TASK, CPU)
    assert set(first) == {"prepare", "prefill"}
    assert first["prefill"] > 0


@pytest.mark.parametrize("name", ["tiny", "90m"])
def test_a_model_has_the_parameters_that_its_size_says(name):
    size = SIZES[name]
    language = build(size, dtype="bfloat16", device=torch.device("meta")).model.language_model
    assert sum(parameter.numel() for parameter in language.parameters()) == size.parameters
    assert name == "tiny" or 89e6 < size.parameters < 91e6


def test_weights_are_of_their_seed_and_dtype_and_leave_the_defaults_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second = (build(TINY, dtype="bfloat16", device=CPU).lm_head.weight for _ in range(2))
    assert torch.equal(first, second)
    assert first.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.random.get_rng_state(), before)


def test_control_tokens_are_those_of_the_packaged_tokenizer():
    assert GoTR1("nano").special == SPECIAL


def test_a_step_reads_its_weights_once_and_shared_keys_once(model):
    alone = sampler.step_bytes(model, Task(group=1, prefix=10, text=0, image=1))
    inner = model.model
    parts = (inner.language_model.layers, inner.generation_head, inner.generation_aligner)
    weights = sum(p.nbytes for part in parts for p in part.parameters())
    position = 2 * TINY.layers * TINY.width * 4  # keys and values, float32
    assert alone == weights + 2 * 10 * position
    longer = sampler.step_bytes(model, Task(group=4, prefix=10, text=3, image=17))
    assert longer - alone == (3 + 4 * (3 + 16)) * position


def test_the_result_has_a_line_for_each_contender_and_dtype(in_this_process):
    result = sampler.run(TINY, dtypes=["float32", "bfloat16"], task=TASK, device=CPU, repeats=1)
    rows = result["rows"]
    assert [(row["dtype"], row["contender"]) for row in rows] == [
        (d, n) for d in ("float32", "bfloat16") for n in SAMPLERS
    ]
    ours = rows[0]
    assert list(ours["phases"]) == ["prepare", "prefill", "reasoning", "image"]
    assert ours["step_s"] == pytest.approx(ours["phases"]["image"] / 16)
    assert all(row["seconds"] > 0 and row["bandwidth_frac"] > 0 for row in rows)
    first, second = sampler.rendered(result)
    assert "tiny, float32: 4 images of 16 tokens, prompt 10, reasoning 3, guidance 5" in str(first.title)
    assert list(second.columns[0].cells) == list(SAMPLERS)
    assert next(iter(first.columns[2].cells)) == "1.00"


def test_a_contender_that_breaks_is_a_line_that_says_why(in_this_process, monkeypatch):
    def breaks(model, task, watch):
        raise RuntimeError("a peer's trouble\nin two lines")

    monkeypatch.setattr(sampler, "apart", lambda work, device: apart(work, torch.device("cuda")))
    monkeypatch.setitem(SAMPLERS, "plain loop", breaks)
    result = sampler.run(TINY, dtypes=["float32"], task=evolve(TASK, text=0), device=CPU, repeats=2)
    assert result["rows"][-1]["failed"] == "RuntimeError: a peer's trouble"
    assert result["rows"][0]["seconds"] > 0
    (table,) = sampler.rendered(result)
    assert list(table.columns[1].cells)[-1] == "RuntimeError: a peer's trouble"


def test_what_is_measured_apart_cannot_end_this_process():
    assert apart(partial(os._exit, 1), CPU) == "its process died: out of memory?"


def test_reading_is_faster_than_nothing():
    assert 1e8 < read_rate(CPU, least_s=0.0) < 1e13


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--size", "13b"], "--size takes one of tiny, heads, 90m, 1b, 7b, got '13b'"),
        (["--dtype", "int8"], "--dtype takes bfloat16, float32 with commas between them, got 'int8'"),
        (
            ["--guidance", "1"],
            "--guidance must be above 1, got 1: at 1 there is one branch, and transformers draws none",
        ),
        (["--prefix", "1"], "a prefix of at least 2 and text of at least 0, got group 16, image 16, prefix 1, text 0"),
        (["--only", "us"], "no contender begins with 'us': there are reasonrl, transformers generate, plain loop"),
        (["--device", "abacus"], "cannot measure on abacus: this machine has cpu"),
    ],
)
def test_options_that_cannot_work_are_refused_in_a_line(options, said, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["reasonrl", "bench", "sampler", "--size", "tiny", *options])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    error = capfd.readouterr().err
    assert stopped.value.code == 2
    assert said in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_result_that_cannot_be_written_is_still_shown(tmp_path, capfd):
    with pytest.raises(ConfigError, match=r"cannot write .*: Is a directory; the tables above hold the result"):
        commands.report({}, [], tmp_path, "the last line")
    assert "the last line" in capfd.readouterr().out


def test_the_command_prints_a_table_and_writes_json(in_this_process, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = ["--size", "tiny", "--dtype", "float32", "--group", "2", "--repeats", "1", "--only", "reasonrl"]
    monkeypatch.setattr(sys, "argv", ["reasonrl", "bench", "sampler", "--device", "cpu", *options])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capfd.readouterr().out
    assert not stopped.value.code
    assert "tiny, float32: 2 images of 16 tokens, prompt 100, reasoning 0, guidance 5" in said
    assert "ceilings: read 1 GB/s, products 0.001 TFLOP/s in bfloat16" in said
    (row,) = json.loads(Path("bench-sampler.json").read_text())["rows"]
    assert row["contender"] == "reasonrl"


def test_names_of_sizes_and_dtypes():
    assert named_size("7b").width == 4096
    assert named_dtypes("float32, bfloat16") == ["float32", "bfloat16"]
    with pytest.raises(ConfigError, match="--dtype takes"):
        named_dtypes("")
