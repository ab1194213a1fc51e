"""Who may import whom (DESIGN.md, section 3): a module imports its own line or lines above it."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "reasonrl"
ORDER = """
errors
types plan relations
interfaces
kernels noise gaussian batch sharding
registry fields
hooks config data formats
scenes
policies renderers judges objectives
recipe
distributed
credit weights rollout
checkpoint curves spent report journal progress folder
loop eval
session
doctor bench testing audit
cli
"""
RANKS = {name: rank for rank, line in enumerate(ORDER.split("\n")) for name in line.split()}
COMPONENTS = ("policies", "renderers", "judges", "objectives")
SHARED = {
    "policies": {
        "cascade_cache",
        "janus",
        "janus_sampler",
        "layout",
        "llama_decoder",
        "packed_attention",
        "planner_loading",
        "planner_model",
        "sampling_plan",
        "stepper",
        "trained_parts",
    },
    "judges": {
        "asking",
        "cached",
        "completions",
        "detectors",
        "geometry",
        "grounding",
        "layout",
        "local",
        "local_model",
        "loop_thread",
        "png",
        "prompt_reading",
        "retries",
        "server",
        "together",
        "vlm",
    },
    "objectives": {"noised"},
    "renderers": {
        "adapting",
        "boxes",
        "briefs",
        "denoising",
        "family",
        "packing",
        "pipelines",
        "spatial_guidance",
        "steps",
        "windows",
    },
}
"""Files that the others in their folder may import."""
COMPOSED = {"judges.dual_stage"}
"""Files made of the other files in their folder."""
HEAVY = {"torch", "transformers", "diffusers", "triton"}
LIGHT = "errors types plan interfaces noise registry hooks config data cli recipe"


def modules() -> dict[str, Path]:
    """Returns "judges.scene" -> its file; a package has its folder's name, reasonrl is exempt."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: path for name, path in found.items() if name}


MODULES = modules()


def imports(node: ast.AST, *, inside: bool = True) -> Iterator[str]:
    """Yields "torch.nn" or "reasonrl.judges.scene.SceneSemantic", but not for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            yield from (name for part in child.orelse for name in imports(ast.Module([part], [])))
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"a relative import on line {child.lineno}: write it in full"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif inside or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(child, inside=inside)


def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def targets(name: str) -> Iterator[str]:
    """Yields the modules of reasonrl that a module imports, by their longest known name."""
    for imported in imports(tree(name)):
        root, *parts = imported.split(".")
        if root != "reasonrl" or parts == ["__version__"]:
            continue
        known = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
        found = next((target for target in known if target in MODULES), None)
        assert found or (MODULES.keys().isdisjoint(known) and parts[0] in RANKS), (
            f"{name} imports {imported}: inside reasonrl, import a name from its own module"
        )
        yield found or known[-1]


def may_import(name: str, target: str) -> bool:
    home, other = name.split(".")[0], target.split(".")[0]
    if home != other:
        apart = {home, other} <= set(COMPONENTS)
        return RANKS.get(other, 0) <= RANKS[home] and not apart
    is_door = "." not in name  # a package's __init__ collects what it holds
    if home not in COMPONENTS or is_door or name in COMPOSED:
        return True
    return target.rpartition(".")[2] in SHARED.get(home, ())


def test_every_module_has_a_place_in_the_order() -> None:
    unknown = sorted({name.split(".")[0] for name in MODULES} - set(RANKS))
    assert not unknown, f"add {', '.join(unknown)} to ORDER here, and to DESIGN.md section 3"


@pytest.mark.parametrize("name", MODULES)
def test_no_module_imports_a_later_one(name: str) -> None:
    assert name.split(".")[0] in RANKS, f"add {name} to ORDER"
    wrong = sorted({target for target in targets(name) if not may_import(name, target)})
    assert not wrong, f"reasonrl.{name} may not import {', '.join(wrong)}"


@pytest.mark.parametrize("name", [n for n in MODULES if n.split(".")[0] in LIGHT.split()])
def test_light_modules_import_nothing_heavy_at_module_level(name: str) -> None:
    heavy = {imported.split(".")[0] for imported in imports(tree(name), inside=False)} & HEAVY
    assert not heavy, f"reasonrl.{name} imports {', '.join(heavy)}: do it where it is used"


def test_the_rules_catch_what_they_forbid() -> None:
    assert not may_import("types", "loop")
    assert not may_import("judges.scene", "policies.got_r1")
    assert not may_import("judges.scene", "judges.semantic")
    assert may_import("judges.dual_stage", "judges.semantic")
    assert may_import("judges.semantic", "judges.vlm")
    assert may_import("hooks", "config")
    source = "if TYPE_CHECKING:\n import a\nelse:\n import b\ndef f():\n from c import d"
    assert list(imports(ast.parse(source))) == ["b", "c.d"]
    assert list(imports(ast.parse(source), inside=False)) == ["b"]


def test_importing_reasonrl_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, reasonrl; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
