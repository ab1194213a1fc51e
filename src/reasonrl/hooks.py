"""Hooks: observers of a run, from installed packages. They see everything and change nothing.

A plugin is a module (or an object) with `@reasonrl.hookimpl` functions of the names below, offered
as an entry point of the group `reasonrl`. A function may take any of the arguments of its hook.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from reasonrl import registry
from reasonrl.errors import ContractError, PluginError
from reasonrl.registry import Component

if TYPE_CHECKING:
    import typer

    from reasonrl.recipe import Recipe
    from reasonrl.types import Trajectory, Verdict

hookspec = pluggy.HookspecMarker("reasonrl")
hookimpl = pluggy.HookimplMarker("reasonrl")
"""Marks a plugin's function as an observer."""

HOOKS = ("run_start", "rollout_end", "step_end", "run_end", "cli_commands")


@hookspec
def run_start(recipe: Recipe, directory: Path) -> None:
    """A run begins, or goes on, in a directory."""


@hookspec
def rollout_end(step: int, trajectories: Sequence[Trajectory], verdicts: Sequence[Verdict]) -> None:
    """A step's trajectories were drawn and judged."""


@hookspec
def step_end(step: int, metrics: Mapping[str, float | None]) -> None:
    """The weights were updated; `metrics` is the step's line of metrics.jsonl."""


@hookspec
def run_end(step: int, error: BaseException | None) -> None:
    """A run stopped after `step` finished steps; `error` says why, None = it is complete."""


@hookspec
def cli_commands(app: typer.Typer) -> None:
    """The command line is built: add commands to the app."""


@functools.cache
def manager() -> pluggy.PluginManager:
    """Returns the manager of all installed observers; `manager.cache_clear()` looks again.

    Raises PluginError naming every plugin that cannot be used: a run does not start without an
    observer that its user installed. `manager().register(object)` adds one, for this process.
    """
    plugins = pluggy.PluginManager("reasonrl")
    plugins.add_hookspecs(sys.modules[__name__])
    errors = []
    for component in _installed():
        try:
            _register(plugins, component)
        except PluginError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise PluginError(" | ".join(dict.fromkeys(map(str, errors)))) from errors[0]
    return plugins


def call(hook: str, /, *, strict: bool = False, **facts: Any) -> None:
    """Calls the observers of a hook one by one, the newest first.

    An observer that raises is reported once, as a warning of the logger "reasonrl", and its plugin
    is not called again until the next run_start; `strict` raises PluginError instead.
    """
    plugins = manager()
    _check_facts(plugins, hook, facts)
    muted = _muted(plugins)
    if hook == "run_start":
        muted.clear()
    for observer in reversed(getattr(plugins.hook, hook).get_hookimpls()):
        if observer.plugin_name in muted:
            continue
        try:
            observer.function(*(facts[name] for name in observer.argnames))
        except Exception as error:
            said = f"{_origin(observer.plugin_name)} raised in {hook}: {registry.one_line(error)}"
            if strict:
                raise PluginError(said) from error
            logging.getLogger("reasonrl").warning("%s; it is not called again in this run", said)
            muted.add(observer.plugin_name)


@functools.cache
def _muted(plugins: pluggy.PluginManager) -> set[str]:
    """Names of the plugins that raised in this run; as old as the manager."""
    return set()


def _register(plugins: pluggy.PluginManager, component: Component) -> None:
    same = [c for c in _installed() if c.name == component.name]
    if len(same) > 1:
        raise PluginError(registry.claimed_twice(same))
    plugin = registry.imported(component)
    if isinstance(plugin, type):
        raise _refused(component, f"{registry.described(plugin)} is not a module or an object: make one of it")
    try:
        plugins.register(plugin, name=component.name)
        plugins.check_pending()
    except (pluggy.PluginValidationError, ValueError) as error:
        if plugins.has_plugin(component.name):  # so that the next plugin's check is its own
            plugins.unregister(name=component.name)
        raise _refused(component, " ".join(str(error).split())) from error
    observers = plugins.get_hookcallers(plugin) or []
    if not observers:
        raise _refused(component, "it has no @reasonrl.hookimpl function")
    for caller in observers:
        if any(one.plugin is plugin and (one.wrapper or one.hookwrapper) for one in caller.get_hookimpls()):
            raise _refused(component, f"{caller.name} is a wrapper, but observers are called one by one")


def _installed() -> list[Component]:
    return registry.entries("reasonrl", kind="hooks")


def _refused(component: Component, why: str) -> PluginError:
    specs = ", ".join(HOOKS)
    return PluginError(f"{component} was refused: {why}. Hooks: {specs}; {component.way_out}")


def _check_facts(plugins: pluggy.PluginManager, hook: str, facts: Mapping[str, Any]) -> None:
    if hook not in HOOKS:
        raise ContractError(f"no hook {hook!r}.{registry.did_you_mean(hook, HOOKS)} Hooks: {', '.join(HOOKS)}")
    wanted = getattr(plugins.hook, hook).spec.argnames
    if set(facts) != set(wanted):
        raise ContractError(f"hook {hook} is called with {sorted(wanted)}, got {sorted(facts)}")


def _origin(name: str) -> str:
    found = next((c for c in _installed() if c.name == name), None)
    return str(found) if found else f"hooks/{name} (registered in this process)"
