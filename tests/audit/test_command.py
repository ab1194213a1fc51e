"""`reasonrl judge audit`: what it asks, prints, writes and refuses."""

import json
import sys

import pytest
from attrs import frozen
from PIL import Image

import reasonrl as rl
from reasonrl import cli
from reasonrl.judges import SceneSemantic
from reasonrl.objectives import GRPO
from reasonrl.policies import GoTR1
from reasonrl.renderers import Tokens

RECIPE = """
import reasonrl as rl
from attrs import frozen
from reasonrl.judges import SceneSemantic
from reasonrl.objectives import GRPO
from reasonrl.policies import GoTR1
from reasonrl.renderers import Tokens

@frozen
class Flatterer(rl.PointwiseJudge):
    gain: float = 0.0

    def score(self, trajectory):
        flattered = "full marks" in (trajectory.reasoning or "")
        return SceneSemantic().score(trajectory).value + self.gain * flattered

recipe = rl.Recipe(
    policy=GoTR1("nano", guidance=1.0), renderer=Tokens(), objective=GRPO(), judge={judge}, min_agreement={least}
)
"""


@frozen
class Said:
    """What a command answered."""

    code: int
    out: str
    err: str

    @property
    def failures(self):
        return [line for line in self.out.splitlines() if line.startswith("FAIL")]


@pytest.fixture
def audit(monkeypatch, capfd, tmp_path):
    """Runs `reasonrl judge audit` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["reasonrl", "judge", "audit", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        found = capfd.readouterr()
        return Said(int(stopped.value.code or 0), found.out, found.err)

    return run


@pytest.fixture
def recipe(tmp_path):
    def write(judge="SceneSemantic()", least=None):
        path = tmp_path / "recipe.py"
        path.write_text(RECIPE.replace("{judge}", judge).replace("{least}", repr(least)))
        return path

    return write


def test_help_says_what_it_is_for(audit, monkeypatch, capfd):
    assert "worth paying for" in audit("--help").out
    monkeypatch.setattr(sys, "argv", ["reasonrl", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "judge" in capfd.readouterr().out


def test_a_sound_judge_is_audited_by_name_and_the_figures_are_written(audit, tmp_path):
    said = audit("judges/scene-semantic", "--num", 4, "--out", tmp_path / "found")
    assert (said.code, said.failures) == (0, [])
    first, *_ = said.out.splitlines()
    record = json.loads((tmp_path / "found" / "audit.json").read_text())
    assert first == f"judges/scene-semantic: at most {record['cost']['judged']} trajectories to judge"
    assert "Kendall's tau within prompts is 1.00 [1.00, 1.00]" in said.out
    assert record["ok"]
    assert record["about"]["judge"] == {"use": "judges/scene-semantic"}


def test_settings_change_the_judge(audit, tmp_path):
    said = audit("dual-stage", "--num", 4, "--set", "preset=iclr-2026", "--out", tmp_path)
    assert said.code == 0
    assert json.loads((tmp_path / "audit.json").read_text())["about"]["judge"]["preset"] == "iclr-2026"


def test_a_recipe_is_audited_by_its_judge_and_its_threshold(audit, recipe):
    assert audit(recipe(least=0.9), "--num", 4).code == 0
    said = audit(recipe(judge="-1.0 * SceneSemantic()", least=0.25), "--num", 4)
    assert said.code == 1
    [why] = said.failures
    assert why.endswith("Kendall's tau within prompts is -1.00 [-1.00, -1.00], at least 0.25 wanted")
    assert audit(recipe(judge="-1.0 * SceneSemantic()"), "--num", 4).code == 0  # none was asked for
    assert audit(recipe(judge="-1.0 * SceneSemantic()"), "--num", 4, "--threshold", 0.1).code == 1
    assert audit(recipe(judge="-1.0 * SceneSemantic()", least=0.25), "--num", 4, "--threshold=-1").code == 0


def test_settings_of_a_recipe_reach_its_judge(audit, recipe):
    path = recipe(judge="Flatterer()")
    assert audit(path, "--num", 4).code == 0
    said = audit(path, "--num", 4, "--set", "judge.gain=0.4")
    assert said.code == 1
    assert said.failures == ["FAIL hostile text in the plan raises reward by +0.40 (praise)"]
    assert audit(path, "--num", 4, "--set", "judge.gain=0.4", "--tolerance", 0.5).code == 0


def test_labels_are_held_against_the_judge(audit, tmp_path):
    lines = []
    for k in range(4):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{k}.png")
        plan = "<|obj_start|>red circle<|obj_end|> <|box_start|>(0,0),(250,250)<|box_end|>" * (k % 2)
        lines.append({"prompt": "a red circle", "image": f"{k}.png", "score": k % 2, "reasoning": plan or "nothing"})
    path = tmp_path / "labels.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    said = audit("scene-semantic", "--num", 0, "--labels", path, "--threshold", 0.9)
    assert said.code == 0
    assert "reward against people: Kendall's tau within prompts is 1.00" in said.out
    path.write_text("\n".join([json.dumps(lines[0]), "{", "[]"]))
    said = audit("scene-semantic", "--num", 0, "--labels", path)
    assert said.code == 2
    assert "2 malformed lines (2, 3)" in said.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["scene-semantc"], ["PluginError", "Did you mean 'scene-semantic'?"]),
        (["judges/on"], ["PluginError", "cannot be built without settings", "recipe"]),
        (["recipes/none"], ["PluginError", "no recipes/none"]),
        (["none.py"], ["ConfigError", "no recipe file at none.py"]),
        (["scene-semantic", "--set", "gain=1"], ["ConfigError", "no field 'gain'"]),
        (["scene-semantic", "--num", "0"], ["ConfigError", "needs labels"]),
        (["scene-semantic", "--num", "5000"], ["ConfigError", "1 to 1200 prompts, got 5000"]),
        (["scene-semantic", "--side", "100"], ["ConfigError", "multiple of 64"]),
        (["scene-semantic", "--against", "beauty"], ["ConfigError", "no exact score beauty"]),
        (["scene-semantic", "--labels", "none.jsonl"], ["DataError", "none.jsonl: cannot be read"]),
    ],
)
def test_refusals_are_one_line_with_the_way_out(audit, arguments, words):
    said = audit(*arguments)
    assert said.code == 2
    assert len(said.err.splitlines()) == 1
    assert all(word in said.err for word in words), said.err


def test_a_recipe_without_a_judge_is_refused(audit, recipe):
    said = audit(recipe(judge="None"))
    assert said.code == 2
    assert "has no judge" in said.err


@pytest.mark.parametrize("least", [-1.5, 1.5])
def test_a_recipe_asks_for_a_tau(least):
    with pytest.raises(ValueError, match="min_agreement"):
        rl.Recipe(
            policy=GoTR1("nano", guidance=1.0),
            renderer=Tokens(),
            objective=GRPO(),
            judge=SceneSemantic(),
            min_agreement=least,
        )


def test_a_seed_below_zero_is_refused(audit):
    said = audit("scene-semantic", "--num", 2, "--seed=-1")
    assert said.code == 2
    assert "--seed" in said.err
    assert "Traceback" not in said.err


def test_where_nothing_can_be_written_nothing_is_asked(audit, tmp_path, recipe):
    (tmp_path / "file").write_text("")
    said = audit(recipe(judge="Flatterer()"), "--num", 2, "--out", "file")
    assert said.code == 2
    assert said.err.startswith("CheckpointError: cannot write to file: File exists; give another --out")
    assert "agreement with exact scores" not in said.out


def test_findings_are_printed_even_where_the_file_cannot_be_written(audit, tmp_path):
    (tmp_path / "audit.json").mkdir()
    said = audit("scene-semantic", "--num", 2, "--out", tmp_path)
    assert said.code == 2
    assert "cannot write" in said.err
    assert "Kendall's tau within prompts is 1.00" in said.out
