"""Registry: components of installed packages by name, imported one at a time, when asked for.

A package offers a component through an entry point of the group `reasonrl.<kind>`; reasonrl's own
are found the same way. `REASONRL_BLOCK=<distribution>,...` ignores distributions everywhere.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from attrs import frozen

from reasonrl.errors import PluginError
from reasonrl.interfaces import Judge, Objective, Policy, Renderer

KINDS = ("policies", "renderers", "judges", "objectives", "tools", "families", "recipes", "benchmarks")
"""`tools` are what judges and renderers use: whom they ask, what locates objects, how a denoising step is drawn.
`families` are adapters of diffusers pipelines, named as the pipeline's class."""
BLOCK = "REASONRL_BLOCK"
"""Environment variable: comma-separated distribution names to ignore."""

_WANTED = {"policies": Policy, "renderers": Renderer, "judges": Judge, "objectives": Objective}


@frozen
class Component:
    """One entry point of an installed distribution, not imported."""

    kind: str
    name: str
    value: str
    """Where it lives: "module:attribute"."""
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.name} from {self.origin}"

    @property
    def origin(self) -> str:
        """The distribution, its version and the entry's value."""
        return f"{self.distribution} {self.version} ({self.value})"

    @property
    def way_out(self) -> str:
        """What a user can do where the distribution is at fault."""
        return f"update or uninstall {self.distribution}, or set {BLOCK}={self.distribution} to ignore it"


def components(kind: str | None = None) -> list[Component]:
    """Returns what is installed, of one kind or of all, sorted by name; imports nothing."""
    kinds = KINDS if kind is None else (_known_kind(kind),)
    return _allowed(_entries({f"reasonrl.{k}": k for k in kinds}))


def entries(group: str, *, kind: str) -> list[Component]:
    """Returns the entry points of a group that are not blocked, sorted by name; imports nothing."""
    return _allowed(_entries({group: kind}))


def load(kind: str, name: str) -> Any:
    """Returns the class (recipes and benchmarks: the callable) of a name, importing it alone.

        load("judges", "dual-stage")    # reasonrl.judges.dual_stage.DualStage

    Raises PluginError where it is unknown, claimed twice, broken, or of the wrong type.
    """
    matches = [found for found in components(kind) if found.name == name]
    if not matches:
        raise PluginError(_unknown_name(kind, name))
    if len(matches) > 1:
        raise PluginError(claimed_twice(matches))
    return _checked(matches[0], imported(matches[0]))


def imported(component: Component) -> Any:
    """Returns what an entry point names, importing its module; raises PluginError."""
    try:
        return EntryPoint(component.name, component.value, "reasonrl").load()
    except Exception as error:
        raise PluginError(f"{component} failed to import: {one_line(error)}; {component.way_out}") from error


def name_of(component: object) -> str | None:
    """Returns "judges/dual-stage" for a registered class or function, or None; imports nothing."""
    home = f"{getattr(component, '__module__', '')}:{getattr(component, '__qualname__', '')}"
    for found in components():
        if found.value == home or _already_imported(found) is component:
            return f"{found.kind}/{found.name}"
    return None


def one_line(error: BaseException) -> str:
    """Returns "ValueError: what it said", without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" where a known name is near, else nothing."""
    near = get_close_matches(wrong, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def normalised(distribution: str) -> str:
    """Returns a distribution's name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution.strip()).lower()


def _allowed(found: Sequence[Component]) -> list[Component]:
    blocked = {normalised(name) for name in os.environ.get(BLOCK, "").split(",")}
    return [component for component in found if normalised(component.distribution) not in blocked]


def _entries(groups: Mapping[str, str]) -> list[Component]:
    # entry_points() keeps the first distribution of a name on sys.path: an editable install and its
    # source folder count once.
    found = [_component(k, entry) for g, k in groups.items() for entry in entry_points(group=g)]
    return sorted(found, key=lambda c: (c.kind, c.name, c.distribution))


def _component(kind: str, entry: EntryPoint) -> Component:
    about: Any = entry.dist.metadata if entry.dist else {}
    distribution = about.get("Name", "an unnamed distribution")
    version = about.get("Version", "of unknown version")
    return Component(kind, entry.name, entry.value, distribution, version)


def _known_kind(kind: str) -> str:
    if kind not in KINDS:
        raise PluginError(f"unknown kind {kind!r}.{did_you_mean(kind, KINDS)} Kinds: {', '.join(KINDS)}")
    return kind


def _unknown_name(kind: str, name: str) -> str:
    for hidden in _entries({f"reasonrl.{kind}": kind}):
        if hidden.name == name:
            return f"{hidden} is ignored: {BLOCK} names {hidden.distribution}, unset it to load it"
    names = list(dict.fromkeys(found.name for found in components(kind)))
    installed = ", ".join(names) or "none"
    return f"no {kind}/{name} is installed.{did_you_mean(name, names)} Installed: {installed}"


def claimed_twice(matches: Sequence[Component]) -> str:
    """Returns the message for several distributions that offer one name."""
    first, *_ = matches
    ours_last = sorted(matches, key=lambda found: normalised(found.distribution) == "reasonrl")
    return (
        f"{len(matches)} packages provide {first.kind}/{first.name}:"
        f" {' and '.join(found.origin for found in matches)};"
        f" uninstall one, or set {BLOCK}={ours_last[0].distribution} to ignore it"
    )


def _already_imported(component: Component) -> object:
    entry = EntryPoint(component.name, component.value, "reasonrl")
    found: object = sys.modules.get(entry.module)
    for part in entry.attr.split(".") if entry.attr else ():
        # Not getattr: a module may import lazily when asked for a name.
        found = getattr(found, "__dict__", {}).get(part)
    return found


def _checked(component: Component, made: Any) -> Any:
    wanted = _WANTED.get(component.kind)
    if wanted is None:
        if callable(made):
            return made
        raise PluginError(f"{component} must be callable, got {described(made)}; {component.way_out}")
    if isinstance(made, type) and issubclass(made, wanted):
        return made
    raise PluginError(
        f"{component} must be a subclass of reasonrl.{wanted.__name__}, got {described(made)}; {component.way_out}"
    )


def described(value: object) -> str:
    """Returns "str 'abc'", "class Sharpness" or "None": a value and its type, for a message."""
    if isinstance(value, type):
        return f"class {value.__qualname__}"
    if value is None:
        return "None"
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"
