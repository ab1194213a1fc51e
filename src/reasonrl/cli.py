"""The command line: train, sample, plugins, check, doctor, bench, judge, report."""

from __future__ import annotations

import importlib.util
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from reasonrl import hooks, registry
from reasonrl.bench.commands import bench
from reasonrl.config import overrides
from reasonrl.errors import ConfigError, PluginError, RankError, ReasonRLError

if TYPE_CHECKING:
    from reasonrl.interfaces import Judge
    from reasonrl.recipe import Recipe
    from reasonrl.types import Trajectory

app = typer.Typer(
    help="Reinforcement learning for models that think before they draw.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(bench, name="bench")
judges = typer.Typer(help="Look into judges.", no_args_is_help=True)
app.add_typer(judges, name="judge")
out = Console(highlight=False)


@app.command()
def train(
    recipe: Annotated[
        str | None,
        typer.Argument(help="A Python file that defines `recipe`, or the name of an installed recipe."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change a field: --set objective.clip=0.1"),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="Train on this file of prompts: text lines, JSONL, or a T2I-CompBench file."),
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option("--out", help="Where to write the run. Default: runs/<recipe>-<time>."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Go on with the run in this folder; with its recipe if that has classes of its own."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Train a recipe and write a report.

    Evaluates its test prompts before and after. Ctrl-C finishes the step, saves, and says how to go on.
    """
    from reasonrl.distributed import best_device, launched
    from reasonrl.session import Interrupted, run

    if resume is not None and directory is not None:
        raise ConfigError("--resume takes no --out: a run goes on in its folder")
    changes = [*(settings or []), *([f"prompts={prompts}"] if prompts else [])]
    if recipe is not None:
        built = overrides(find_recipe(recipe), changes)
    elif resume is not None:
        built = overrides(resumed(resume), changes)
    else:
        raise ConfigError("give a recipe to start, or --resume RUN to go on")
    directory = resume or directory or Path("runs") / f"{Path(str(recipe)).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    world = launched(best_device())
    out.quiet = world.rank > 0  # one process speaks for all
    directory = Path(world.gather([str(directory)])[0])
    out.print(f"run: {directory}", markup=False)
    command = shlex.join(["reasonrl", *sys.argv[1:]])
    try:
        report = run(built, directory, resume=resume is not None, quiet=quiet, command=command, world=world)
    except Interrupted as stopped:
        out.print(str(stopped), markup=False)
        raise typer.Exit(130) from None
    except RankError:
        if world.rank:
            raise typer.Exit(2) from None
        raise
    print_accuracy(directory)
    out.print(f"report: {report}", markup=False)


@app.command()
def sample(
    checkpoint: Annotated[str, typer.Argument(help="A run, a checkpoint folder, a model folder, or `nano`.")],
    prompt: Annotated[str, typer.Argument(help='What to draw: "a red circle left of a blue square".')],
    path: Annotated[Path, typer.Option("--out", help="The picture to write.")] = Path("sample.png"),
    number: Annotated[int, typer.Option("--num", min=1, help="How many pictures.")] = 1,
    seed: Annotated[int, typer.Option(help="Same seed, same picture.")] = 0,
) -> None:
    """Draw a prompt and print its plan.

    The PNG shows the planned boxes over the picture.
    """
    if not prompt.strip():
        raise ConfigError('the prompt is empty: say what to draw, "a red circle left of a blue square"')
    from reasonrl.distributed import Solo, best_device
    from reasonrl.noise import Draw
    from reasonrl.rollout import draw_trajectories
    from reasonrl.types import Prompt

    policy, renderer = loaded(checkpoint)
    Solo(best_device()).place(policy.module, sharded=False)
    drawn = draw_trajectories(policy, renderer, [Prompt("prompt", prompt)], group_size=number, draw=Draw(seed, 0))
    for index, trajectory in enumerate(drawn):
        target = path if number == 1 else path.with_stem(f"{path.stem}-{index}")
        out.print(trajectory.reasoning or "(no plan)", markup=False, soft_wrap=True)
        save_sample(trajectory, target)


@app.command()
def plugins(
    kind: Annotated[str | None, typer.Argument(help="policies, renderers, judges, objectives, ...")] = None,
) -> None:
    """List installed components, with package and version."""
    rows = [("component", "package", "version", "defined in")]
    rows += [(f"{c.kind}/{c.name}", c.distribution, c.version, c.value) for c in registry.components(kind)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:  # whole names a line each, however narrow the terminal: people copy and grep them
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        out.print(line.rstrip(), markup=False, soft_wrap=True)


@app.command()
def check(
    component: Annotated[str, typer.Argument(help="Which: judges/contrast, policies/got-r1, ...")],
) -> None:
    """Check that a component keeps its promises.

    The promises of its interface: docs/interfaces.md.
    """
    from reasonrl import testing

    kind, _, name = component.partition("/")
    checks: dict[str, Callable[[Any], None]] = {
        "judges": testing.check_judge,
        "renderers": testing.check_renderer,
        "objectives": testing.check_objective,
        "policies": testing.check_policy,
    }
    if kind not in checks or not name:
        raise ConfigError(f"check needs KIND/NAME with a kind of {', '.join(checks)}, got {component!r}")
    made = registry.load(kind, name)
    try:
        built = made()
    except TypeError as error:
        raise PluginError(f"{component} cannot be built without settings: {error}") from error
    try:
        checks[kind](built)
    except AssertionError as error:
        raise PluginError(f"{component} breaks its promise: {error}") from error
    out.print(f"{component}: ok")


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="The folder of a run.")],
) -> None:
    """Write a run's report, one self-contained page."""
    from reasonrl.report import write_report

    page = write_report(directory)
    print_accuracy(directory)
    out.print(f"report: {page}", markup=False)


@app.command()
def doctor(
    recipe: Annotated[
        str,
        typer.Argument(help="A Python file that defines `recipe`, or an installed recipe's name."),
    ],
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="PATH=VALUE")] = None,
) -> None:
    """Check a recipe before money is spent.

    On a few prompts: is the ratio 1, is everything scored, do groups have something to say. Exit code 1 if sick.
    """
    from reasonrl.doctor import examine

    built = overrides(find_recipe(recipe), settings or [])
    findings = examine(built)
    for finding in findings:
        out.print(f"{'ok  ' if finding.ok else 'SICK'} {finding.text}", markup=False, soft_wrap=True)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


@judges.command("audit")
def judge_audit(
    judge: Annotated[
        str,
        typer.Argument(help="A judge (judges/dual-stage), or a recipe (file.py, recipes/nano) whose judge is meant."),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change a field of the judge, or of the recipe."),
    ] = None,
    number: Annotated[
        int, typer.Option("--num", min=0, help="Prompts, of 8 to 11 scenes each; 0 = labels alone.")
    ] = 24,
    labels: Annotated[Path | None, typer.Option(help="JSONL: prompt, image, score, maybe reasoning, group.")] = None,
    threshold: Annotated[
        float | None,
        typer.Option(min=-1, max=1, help="Kendall's tau within prompts to reach. Default: the recipe's min_agreement."),
    ] = None,
    against: Annotated[
        str,
        typer.Option(help="Exact scores to hold the reward against: prompt-image,semantic,spatial,reasoning-image."),
    ] = "",
    tolerance: Annotated[
        float, typer.Option(min=0, max=1, help="Largest gain by hostile text, as a share of the scores' range.")
    ] = 0.05,
    side: Annotated[
        int | None, typer.Option(help="Pixels of a picture. Default: 448, or what the judge reads.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same questions.")] = 0,
    directory: Annotated[Path | None, typer.Option("--out", help="Write audit.json into this folder.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Find out whether a judge is worth paying for.

    On drawn scenes whose truth is known: does it rank them, does it answer twice alike, does order or hostile text move
    its scores; with labels, does it agree with people. Exit code 1 if not.
    """
    from reasonrl.audit import tables
    from reasonrl.audit.exam import Plan, foretold
    from reasonrl.audit.verdict import examine

    found, recipe = find_judge(judge, settings or [])
    plan = Plan(
        num=number,
        seed=seed,
        side=side,
        against=tuple(name.strip() for name in against.split(",") if name.strip()),
        threshold=threshold if threshold is not None or recipe is None else recipe.min_agreement,
        tolerance=tolerance,
        labels=labels,
        **({} if recipe is None else {"max_unscored": recipe.max_unscored, "timeout_s": recipe.judge_timeout_s}),
    )
    more = f", and the labels of {labels}" if labels else ""
    out.print(f"{judge}: at most {foretold(found, plan)} trajectories to judge{more}", markup=False, soft_wrap=True)
    if directory is not None:
        tables.prepare(directory)  # before money is spent
    audit = examine(found, plan, quiet=quiet)
    for table in tables.rendered(audit):
        Console(width=max(out.width, tables.WIDTH), highlight=False).print(table, "")
    for finding in audit.findings:
        out.print(f"{'ok  ' if finding.ok else 'FAIL'} {finding.text}", markup=False, soft_wrap=True)
    if directory is not None:
        out.print(f"wrote {tables.write(audit, directory)}", markup=False, soft_wrap=True)
    if not audit.ok:
        raise typer.Exit(1)


def find_judge(name: str, changes: list[str]) -> tuple[Judge, Recipe | None]:
    """Returns the judge of that name, or a recipe's and the recipe; `changes` are the judge's, or the recipe's."""
    if name.endswith(".py") or name.startswith("recipes/"):
        recipe = overrides(find_recipe(name.removeprefix("recipes/")), changes)
        if recipe.judge is None:
            raise ConfigError(f"{name} has no judge: name one, as in judges/dual-stage")
        return recipe.judge, recipe
    made = registry.load("judges", name.removeprefix("judges/"))
    try:
        built: Judge = made()
    except TypeError as error:
        raise PluginError(
            f"{name} cannot be built without settings: {error}; give a recipe's file, whose judge has them"
        ) from error
    return overrides(built, changes), None


def find_recipe(name: str) -> Recipe:
    """Returns the `recipe` of a Python file, or an installed recipe by name."""
    from reasonrl.recipe import Recipe

    found = imported(Path(name)) if name.endswith(".py") else registry.load("recipes", name)()
    recipe = getattr(found, "recipe", None) if isinstance(found, ModuleType) else found
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"{name} defines no `recipe = reasonrl.Recipe(...)`, found {type(recipe).__name__}")
    return recipe


def imported(path: Path) -> ModuleType:
    """Returns a Python file as a module; raises ConfigError where it is missing or broken."""
    if not path.is_file():
        raise ConfigError(f"no recipe file at {path}: give a path to a Python file that defines `recipe`")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    try:
        spec.loader.exec_module(module)
    except ReasonRLError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{path} failed to run: {registry.one_line(error)}") from error
    return module


def resumed(directory: Path) -> Recipe:
    """Returns the recipe that a run began with, from its recipe.json: registered names only."""
    from reasonrl.folder import read_recipe

    recipe: Recipe = read_recipe(directory / "recipe.json")
    return recipe


def loaded(checkpoint: str) -> tuple[Any, Any]:
    """Returns policy and renderer of a run, a checkpoint, a model folder, or a packaged name."""
    from reasonrl.checkpoint import load_trained, saved
    from reasonrl.policies.got_r1 import GoTR1
    from reasonrl.recipe import AVERAGE
    from reasonrl.renderers.tokens import Tokens

    folder = Path(checkpoint)
    newest = saved(folder / "checkpoints") if folder.is_dir() else []
    folder = newest[-1] if newest else folder
    if (folder / "learner.safetensors").is_file():
        built = resumed(folder)
        load_trained(folder, built.learning, copy=None if built.average is None else AVERAGE)
        return built.policy, built.test_renderer or built.renderer
    policy = GoTR1(checkpoint, guidance=1.0)
    patches = policy.num_image_tokens == 64
    return policy, Tokens() if patches else Tokens(checkpoint)


def save_sample(trajectory: Trajectory, path: Path) -> None:
    """Writes the picture with its planned boxes drawn over it."""
    from reasonrl.report import planned_boxes_over

    if trajectory.image is None:
        raise ReasonRLError(f"nothing was drawn for {trajectory.prompt.text!r}")
    try:
        planned_boxes_over(trajectory.image, trajectory.plan).save(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write {path}: {error}") from error
    out.print(f"wrote {path}", markup=False)


def print_accuracy(directory: Path) -> None:
    """Prints exact accuracy by split, before and after, with 95% bootstrap intervals."""
    from reasonrl.report import accuracy, ends, read_run

    rows = [row for row in accuracy(read_run(directory).evaluations) if row.category == "all"]
    if not rows:
        return
    steps = ends({row.step for row in rows})
    table = Table("split", *(f"step {s}: exact [95% interval]" for s in steps), box=None)
    for split in dict.fromkeys(row.split for row in rows):
        found = {row.step: row for row in rows if row.split == split}
        table.add_row(split, *(_interval(found.get(s)) for s in steps))
    out.print(table)


def _interval(row: Any) -> str:
    if row is None or row.mean is None:
        return "not measured"
    return f"{row.mean:.1%} [{row.low:.1%}, {row.high:.1%}] n={row.n}"


def main() -> None:
    """Runs the command line; refusals are one line on the error stream and exit code 2."""
    try:
        hooks.call("cli_commands", app=app)
        app()
    except ReasonRLError as error:
        notes = " ".join(getattr(error, "__notes__", []))
        line = " ".join(f"{type(error).__name__}: {error} {notes}".split())
        Console(stderr=True, highlight=False).print(line, markup=False, soft_wrap=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
