import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from attrs import frozen
from PIL import Image
from safetensors.torch import save_file

from reasonrl import __version__, cli, registry
from reasonrl.hooks import hookimpl

COMMANDS = {
    "train": "Train a recipe and write a report.",
    "sample": "Draw a prompt and print its plan.",
    "plugins": "List installed components, with package and version.",
    "check": "Check that a component keeps its promises.",
    "report": "Write a run's report, one self-contained page.",
    "doctor": "Check a recipe before money is spent.",
    "judge": "Look into judges.",
    "bench": "Measure this machine, beside the peers that are installed on it.",
}
PROMPT = "a red circle"
RECIPE = """
import reasonrl as rl
from reasonrl.judges import SceneSemantic
from reasonrl.objectives import GRPO
from reasonrl.policies import GoTR1
from reasonrl.renderers import Tokens

recipe = rl.Recipe(
    policy=GoTR1({folder!r}, guidance=1.0, max_tokens=12),
    renderer=Tokens(),
    judge=SceneSemantic(){on},
    {objective},
    prompts={prompts!r},
    prompts_per_step=2,
    group_size=2,
    steps=3,
    tests={tests!r},
)
"""


@frozen
class Said:
    """What a command answered."""

    code: int
    out: str
    err: str

    def refusal(self) -> str:
        """The one line of a refusal."""
        assert self.code == 2, self
        assert len(self.err.splitlines()) == 1, self
        assert "Traceback" not in self.out + self.err
        return self.err.strip()


Command = Callable[..., Said]
Write = Callable[..., Path]


class CtrlC:
    """Presses Ctrl-C once, during the first step."""

    pressed = False

    @hookimpl
    def rollout_end(self, step: int) -> None:
        if not self.pressed:
            self.pressed = True
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def reasonrl(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Runs the command line in this process, in an empty folder."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def run(*arguments: object) -> Said:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["reasonrl", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        found = capfd.readouterr()
        return Said(int(stopped.value.code or 0), found.out, found.err)

    return run


@pytest.fixture
def write_recipe(nano_folder: Path, prompts_file: Path, tmp_path: Path) -> Write:
    """Writes a tiny recipe file of registered components."""

    def write(*, stage: str | None = None, tests: dict[str, str] | None = None) -> Path:
        path = tmp_path / "tiny_recipe.py"
        text = RECIPE.format(
            folder=str(nano_folder),
            on=f".on({stage!r})" if stage else "",
            objective=f"objectives={{{stage!r}: GRPO()}}" if stage else "objective=GRPO()",
            prompts=str(prompts_file),
            tests=tests or {},
        )
        path.write_text(text)
        return path

    return write


@pytest.fixture
def recipe(write_recipe: Write) -> Path:
    return write_recipe()


def nothing_written() -> bool:
    return not list(Path().iterdir())


# ---- what is installed ----


@pytest.mark.parametrize(("command", "what"), COMMANDS.items())
def test_help_says_what_a_command_does(reasonrl: Command, command: str, what: str) -> None:
    said = reasonrl(command, "--help")
    assert said.code == 0
    assert what in " ".join(said.out.split())
    overview = reasonrl("--help")
    assert f"{command} {what}" in " ".join(overview.out.split())  # whole, not cut with dots


def test_plugins_lists_every_shipped_component_with_its_version(reasonrl: Command) -> None:
    said = reasonrl("plugins")
    assert said.code == 0
    for found in registry.components():
        assert f"{found.kind}/{found.name}" in said.out
    assert __version__ in said.out
    assert said.err == ""


def test_plugins_of_a_kind_lists_that_kind_a_line_each(reasonrl: Command) -> None:
    said = reasonrl("plugins", "judges")
    _, *rows = said.out.splitlines()
    assert [row.split()[:3] for row in rows] == [
        [f"judges/{c.name}", c.distribution, c.version] for c in registry.components("judges")
    ]
    assert [row.split()[3] for row in rows] == [c.value for c in registry.components("judges")]


@pytest.mark.parametrize(
    "component", ["judges/scene-semantic", "judges/dual-stage", "renderers/tokens", "objectives/grpo"]
)
def test_shipped_components_pass_their_own_check(reasonrl: Command, component: str) -> None:
    said = reasonrl("check", component)
    assert (said.code, said.err) == (0, "")
    assert f"{component}: ok" in said.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "judges/scene-semantc"], ["PluginError", "Did you mean 'scene-semantic'?"]),
        (["check", "judgs/scene-semantic"], ["ConfigError", "judges", "'judgs/scene-semantic'"]),
        (["check", "judges"], ["ConfigError", "KIND/NAME"]),
        (["check", "judges/on"], ["PluginError", "cannot be built without settings"]),
        (["check", "judges/sum"], ["PluginError", "cannot be built without settings"]),
        (["plugins", "judgse"], ["PluginError", "Did you mean 'judges'?"]),
        (["train", "got-r1-nanoo"], ["PluginError", "no recipes/got-r1-nanoo is installed"]),
        (["report", "."], ["DataError", "holds no run"]),
        (["report", "nowhere"], ["DataError", "nowhere holds no run"]),
        (["train"], ["ConfigError", "give a recipe to start, or --resume"]),
        (["train", "--resume", "nowhere"], ["nowhere"]),
        (["train", "--resume", "r", "--out", "s"], ["ConfigError", "--resume takes no --out"]),
        (["train", "nowhere.py"], ["ConfigError", "no recipe file at nowhere.py"]),
        (["doctor", "nowhere.py"], ["ConfigError", "no recipe file at nowhere.py"]),
        (["bench", "kernels", "--rows", "512,many"], ["ConfigError", "--rows takes whole numbers", "got many"]),
        (["bench", "kernels", "--device", "abacus"], ["ConfigError", "cannot measure on abacus: this machine has c"]),
        (["bench", "kernels", "--only", "us"], ["ConfigError", "no contender begins with 'us'", "torch eager"]),
        (["bench", "kernels", "--tables", "heads"], ["ConfigError", "--tables takes logits, linear, guidance"]),
        (["sample", "./nowhere", PROMPT], ["CheckpointError", "no checkpoint at ./nowhere"]),
        (["sample", "/no/where", PROMPT], ["CheckpointError", "no checkpoint at /no/where"]),
        (["sample", "nowhere", PROMPT], ["CheckpointError", "no checkpoint at nowhere"]),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(reasonrl: Command, arguments: list[str], words: Sequence[str]) -> None:
    said = reasonrl(*arguments).refusal()
    assert all(word in said for word in words), said
    assert nothing_written()


# ---- recipes ----


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("judge = 1", ["ConfigError", "defines no `recipe"]),
        ("recipe = 1", ["ConfigError", "defines no `recipe", "int"]),
        ("recipe = (", ["ConfigError", "failed to run: SyntaxError"]),
        ("import no_such_module", ["ConfigError", "ModuleNotFoundError", "no_such_module"]),
        ("raise ValueError('first\\nsecond')", ["ConfigError", "ValueError: first second"]),
        ("import sys; sys.exit('stop')", ["ConfigError", "SystemExit"]),
        ("import reasonrl\nreasonrl.Recipe(policy=None, steps=0)", ["ConfigError", "'steps'", "0"]),
        ("\0", ["ConfigError", "failed to run"]),
    ],
)
@pytest.mark.parametrize("command", ["train", "doctor"])
def test_a_recipe_file_that_does_not_run_is_refused_in_one_line(
    reasonrl: Command, tmp_path: Path, command: str, text: str, words: Sequence[str]
) -> None:
    path = tmp_path / "broken_recipe.py"
    path.write_text(text)
    said = reasonrl(command, path).refusal()
    assert str(path) in said
    assert all(word in said for word in words), said
    assert nothing_written()


def test_a_recipe_refused_by_its_own_check_keeps_its_message(reasonrl: Command, recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("group_size=2", "group_size=1"))
    assert "group_size must be at least 2 for GRPO, got 1" in reasonrl("train", recipe).refusal()
    assert nothing_written()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("objective.clp=0.1", ["GRPO has no field 'clp'. Did you mean 'clip'?"]),
        ("objctive.clip=0.1", ["Did you mean 'objective'?"]),
        ("steps.more=1", ["steps.more"]),
        ("steps=many", ["steps=many", "many"]),
        ("steps=1.5", ["steps=1.5"]),
        ("steps=0", ["steps=0"]),
        ("schedule=linear", ["schedule=linear", "cosine"]),
        ("objective.clip=-1", ["objective.clip=-1"]),
        ("group_size=1", ["at least 2 for GRPO"]),
        ("steps", ["expected PATH=VALUE"]),
        ("=3", ["empty part"]),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(
    reasonrl: Command, recipe: Path, setting: str, words: Sequence[str]
) -> None:
    said = reasonrl("train", recipe, "--set", setting).refusal()
    assert said.startswith("ConfigError: --set")
    assert all(word in said for word in words), said
    assert nothing_written()


# ---- prompts ----


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("gone.txt", None, ["gone.txt", "no such file"]),
        ("empty.txt", "", ["empty.txt", "holds no prompts"]),
        ("notes.txt", "# only\n\n# comments\n", ["notes.txt", "holds no prompts"]),
        ("mine.jsonl", '{"text": "a red circle"}\n{"text": \n', ["mine.jsonl:2", "broken JSON"]),
        ("mine.jsonl", '{"text": "a red circle"}\n{"txt": "b"}\n', ["mine.jsonl:2", "no text"]),
        ("mine.txt", "a red circle\na puce circle\n", ["mine:2", "unknown word 'puce'"]),
        ("mine.txt", "a red circle <|pad|>\n", ["mine:1", "control token '<|pad|>'"]),
        ("mine.csv", "a red circle\n", ["mine.csv", ".txt"]),
        ("latin.txt", b"a red circle\na caf\xe9\n", ["latin.txt:2", "not UTF-8"]),
    ],
)
def test_prompts_that_cannot_be_read_are_refused_by_file_and_line(
    reasonrl: Command,
    recipe: Path,
    tmp_path: Path,
    name: str,
    text: str | bytes | None,
    words: Sequence[str],
) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = reasonrl("train", recipe, "--prompts", path, "--out", "run").refusal()
    assert said.startswith("DataError: ")
    assert all(word in said for word in words), said
    assert nothing_written()


def test_a_prompt_file_may_have_any_name(reasonrl: Command, recipe: Path, tmp_path: Path, prompts_file: Path) -> None:
    path = tmp_path / "a = [1], 'b'.txt"  # nothing of it is a setting's value
    shutil.copy(prompts_file, path)
    said = reasonrl("train", recipe, "--prompts", path, "--set", "steps=0")
    assert "steps=0" in said.refusal()


# ---- checkpoints ----


def spoilt(nano_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(nano_folder, folder)
    return folder


def test_a_truncated_model_is_refused_on_one_line_of_the_error_stream(nano_folder: Path, tmp_path: Path) -> None:
    """In a process of its own: no bar, warning or log of a library joins the line."""
    folder = spoilt(nano_folder, tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    found = subprocess.run(
        [sys.executable, "-m", "reasonrl.cli", "sample", str(folder), PROMPT],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    said = Said(found.returncode, found.stdout, found.stderr).refusal()
    assert said.startswith(f"CheckpointError: {folder}/model.safetensors cannot be read")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_foreign_safetensors_file_is_refused(reasonrl: Command, nano_folder: Path, tmp_path: Path) -> None:
    folder = spoilt(nano_folder, tmp_path)
    save_file({"unet.weight": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    said = reasonrl("sample", folder, PROMPT).refusal()
    assert said.startswith(f"CheckpointError: {folder} does not fit")
    assert nothing_written()


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("model.safetensors", None, ["holds no weights"]),
        ("config.json", None, ["holds no config.json"]),
        ("config.json", "{", ["config.json cannot be read"]),
        ("config.json", '{"model_type": "llama"}', ["model_type 'llama', expected 'janus'"]),
        ("tokenizer.json", "{", ["holds no tokenizer"]),
        ("model.safetensors", "", ["model.safetensors cannot be read"]),
    ],
)
def test_a_model_folder_with_a_missing_or_broken_file_is_refused(
    reasonrl: Command,
    nano_folder: Path,
    tmp_path: Path,
    name: str,
    text: str | None,
    words: Sequence[str],
) -> None:
    folder = spoilt(nano_folder, tmp_path)
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    said = reasonrl("sample", folder, PROMPT).refusal()
    assert said.startswith(f"CheckpointError: {folder}")
    assert all(word in said for word in words), said
    assert nothing_written()


# ---- sample ----


def test_sample_writes_a_picture_and_prints_its_plan(reasonrl: Command, nano_folder: Path) -> None:
    said = reasonrl("sample", nano_folder, "a red circle left of a blue square")
    assert (said.code, said.err) == (0, "")
    plan, *_, wrote = said.out.strip().splitlines()
    assert plan
    assert wrote == "wrote sample.png"
    with Image.open("sample.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(10**6) or []) > 1


def test_sample_draws_the_same_picture_for_the_same_seed_and_another_for_another(
    reasonrl: Command, nano_folder: Path
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert reasonrl("sample", nano_folder, PROMPT, "--out", f"{name}.png", "--seed", seed).code == 0
    a, b, c = (Path(f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_an_empty_prompt_is_refused(reasonrl: Command, nano_folder: Path) -> None:
    assert "the prompt is empty" in reasonrl("sample", nano_folder, "  ").refusal()
    assert nothing_written()


def test_sample_numbers_several_pictures(reasonrl: Command, nano_folder: Path) -> None:
    assert reasonrl("sample", nano_folder, PROMPT, "--num", 2, "--out", "x.png").code == 0
    assert sorted(p.name for p in Path().iterdir()) == ["x-0.png", "x-1.png"]


@pytest.mark.parametrize("path", ["no/such/folder/x.png", "x.nonsense", "x", ".", "/dev/full/x.png"])
def test_a_picture_that_cannot_be_written_is_refused_in_one_line(
    reasonrl: Command, nano_folder: Path, path: str
) -> None:
    said = reasonrl("sample", nano_folder, PROMPT, "--out", path).refusal()
    assert said.startswith("ConfigError: cannot write")
    assert nothing_written()


def test_a_prompt_with_unknown_words_is_refused(reasonrl: Command, nano_folder: Path) -> None:
    said = reasonrl("sample", nano_folder, "a chartreuse zeppelin").refusal()
    assert said.startswith("DataError: ")
    assert "unknown word 'chartreuse', 'zeppelin'" in said
    assert nothing_written()


# ---- train, report, resume, doctor ----


def test_a_run_is_stopped_resumed_reported_and_sampled_from_the_command_line(
    reasonrl: Command,
    write_recipe: Write,
    watch: Callable[[object], None],
    prompts_file: Path,
    tmp_path: Path,
) -> None:
    watch(CtrlC())
    mine = tmp_path / "my scenes.txt"
    shutil.copy(prompts_file, mine)
    recipe = write_recipe(tests={"test": str(mine)})
    stopped = reasonrl(
        "train", recipe, "--prompts", mine, "--set", "steps=2", "--set", "objective.kl=0.1",
        "--out", "my run",
    )  # fmt: skip
    assert stopped.code == 130, stopped
    assert "run: my run" in stopped.out
    [advice] = [s for s in stopped.out.splitlines() if s.startswith("stopped after step 0, saved.")]
    program, *arguments = shlex.split(advice.split("Go on with: ")[1])
    assert program == "reasonrl"
    assert arguments == ["train", "--resume", "my run"]  # pasted as it stands, it works

    resumed = reasonrl(*arguments)
    assert resumed.code == 0, resumed
    assert "report: my run/report.html" in resumed.out
    assert "test" in resumed.out
    metrics = Path("my run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [0, 1]
    assert "Traceback" not in resumed.err

    Path("my run/report.html").unlink()
    assert reasonrl("report", "my run").code == 0
    assert Path("my run/report.html").is_file()
    for folder in ("my run", "my run/checkpoints/step-000002", "my run/model"):
        assert reasonrl("sample", folder, PROMPT, "--out", "x.png").code == 0

    before = sorted(Path("my run").rglob("*"))
    assert "is not empty" in reasonrl("train", recipe, "--out", "my run").refusal()
    Path("my run/checkpoints/step-000002/learner.safetensors").write_bytes(b"cut")
    assert "learner.safetensors" in reasonrl("train", "--resume", "my run").refusal()
    assert "learner.safetensors" in reasonrl("sample", "my run", PROMPT).refusal()
    Path("my run/recipe.json").write_text("{")
    assert "recipe.json" in reasonrl("train", "--resume", "my run").refusal()
    assert sorted(Path("my run").rglob("*")) == before


def test_a_run_of_a_recipe_with_its_own_judge_goes_on_when_the_recipe_is_named_again(
    reasonrl: Command, recipe: Path, watch: Callable[[object], None]
) -> None:
    recipe.write_text(
        "from attrs import frozen\n"
        "from reasonrl.judges import SceneSemantic\n"
        "@frozen\nclass Mine(SceneSemantic):\n    pass\n" + recipe.read_text().replace("SceneSemantic()", "Mine()")
    )
    watch(CtrlC())
    assert reasonrl("train", recipe, "--out", "mine").code == 130
    refused = reasonrl("train", "--resume", "mine").refusal()
    assert "tiny_recipe:Mine' is not registered" in refused
    assert "reasonrl train RECIPE --resume RUN" in refused
    assert reasonrl("train", recipe, "--resume", "mine", "--quiet").code == 0
    steps = [json.loads(line)["step"] for line in Path("mine/metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2]


def test_train_without_out_writes_below_runs(reasonrl: Command, recipe: Path) -> None:
    said = reasonrl("train", recipe, "--set", "steps=1", "--quiet")
    assert said.code == 0, said
    [directory] = Path("runs").iterdir()
    assert directory.name.startswith("tiny_recipe-")
    assert f"report: {directory}/report.html" in said.out
    assert "step 0" not in said.err


def test_an_out_that_cannot_be_written_is_refused_before_training(
    reasonrl: Command, recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file" / "run", "/proc/reasonrl", tmp_path / "file"):
        said = reasonrl("train", recipe, "--out", out).refusal()
        assert str(out) in said
    assert (tmp_path / "file").read_text() == "mine"
    assert nothing_written()


def test_doctor_says_what_it_looked_at(reasonrl: Command, recipe: Path) -> None:
    said = reasonrl("doctor", recipe)
    assert said.err == ""
    findings = said.out.strip().splitlines()
    assert all(line.startswith(("ok  ", "SICK")) for line in findings)
    assert said.code == (1 if any(line.startswith("SICK") for line in findings) else 0)
    for words in ("ok   3 prompts read", "ok   stage reasoning: replayed", "ok   stage image: replayed"):
        assert words in said.out
    assert "0% of trajectories unscored" in said.out
    assert "groups have an advantage" in said.out
    assert nothing_written()


def test_doctor_asks_a_judge_of_one_stage_about_that_stage_only(reasonrl: Command, write_recipe: Write) -> None:
    said = reasonrl("doctor", write_recipe(stage="reasoning"))
    assert "ok   0% of trajectories unscored" in said.out


def test_doctor_survives_reasoning_that_is_forced_to_its_last_token(reasonrl: Command, recipe: Path) -> None:
    said = reasonrl("doctor", recipe, "--set", "policy.max_tokens=1")
    assert said.code in (0, 1)
    assert "stage image: replayed" in said.out


# ---- bench ----


def test_bench_prints_a_table_and_writes_json(reasonrl: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from reasonrl.bench import kernels

    monkeypatch.setattr(kernels, "CONTENDERS", [c for c in kernels.CONTENDERS if c.name == "reasonrl"])
    options = ["--tables", "linear", "--rows", 16, "--vocab", 100, "--width", 8, "--seconds", 0, "--device", "cpu"]
    said = reasonrl("bench", "kernels", *options, "--out", "kernels.json")
    assert said.code == 0
    assert "log-probs from hidden states and a head: N=16 V=100 H=8, bfloat16" in said.out
    assert "peak: copy" in said.out
    (row,) = json.loads(Path("kernels.json").read_text())["rows"]
    assert row["errors"]["log_prob"] < 5e-5
