import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import reasonrl.hooks
from reasonrl import hooks
from reasonrl.errors import ContractError, PluginError
from reasonrl.hooks import hookimpl

PACKAGES = Path(__file__).parent / "plugin_packages"
Install = Callable[..., None]


@pytest.fixture(autouse=True)
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts plugin packages on sys.path; the manager and their modules are forgotten."""

    def put(*names: str) -> None:
        for name in names:
            monkeypatch.syspath_prepend(str(PACKAGES / name))
        hooks.manager.cache_clear()

    monkeypatch.delenv("REASONRL_BLOCK", raising=False)
    hooks.manager.cache_clear()
    yield put
    hooks.manager.cache_clear()
    for module in [m for m in sys.modules if re.match(r"reasonrl_(good|clash|badhooks|failing)", m)]:
        del sys.modules[module]


def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str) -> None:
    """Installs reasonrl-one, which offers one thing of reasonrl-badhooks."""
    info = tmp_path / "reasonrl_one-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: reasonrl-one\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text(f"[reasonrl]\nmine = reasonrl_badhooks.{entry}\n")
    monkeypatch.syspath_prepend(str(PACKAGES / "badhooks"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("REASONRL_BLOCK", "reasonrl-badhooks")


def refused() -> str:
    with pytest.raises(PluginError) as caught:
        hooks.manager()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_installed_observer_hears_the_arguments_it_asks_for(install: Install) -> None:
    install("good")
    hooks.call("step_end", step=3, metrics={"reward": 0.5})
    assert sys.modules["reasonrl_good.observer"].SEEN == [3]
    assert hooks.manager() is hooks.manager()


def test_a_hook_without_observers_is_no_effort() -> None:
    hooks.call("run_end", step=0, error=None)
    assert "run_end" in reasonrl.hooks.HOOKS


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("misspelt", "unknown hook 'step_ended'"),
        ("argument", "{'stepp'}"),
        ("unmarked", "it has no @reasonrl.hookimpl function"),
        ("wrapper", "step_end is a wrapper"),
        ("raising", "failed to import: RuntimeError: no licence found"),
        ("a_class:Observer", "class Observer is not a module or an object"),
    ],
)
def test_a_broken_observer_stops_the_start_with_its_name_and_the_way_out(
    entry: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(tmp_path, monkeypatch, entry)
    said = refused()
    assert said.startswith(f"hooks/mine from reasonrl-one 2.0 (reasonrl_badhooks.{entry})")
    assert why in said
    assert "set REASONRL_BLOCK=reasonrl-one to ignore it" in said


def test_every_broken_observer_is_named_at_once(install: Install) -> None:
    install("badhooks", "good")
    said = refused()
    assert said.count(" | ") == 5
    assert all(f"hooks/{name} from" in said for name in ("misspelt", "argument", "wrapper"))


def test_a_blocked_distribution_does_not_stop_the_others(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("badhooks", "good")
    monkeypatch.setenv("REASONRL_BLOCK", "reasonrl_badhooks")
    hooks.call("step_end", step=1, metrics={})
    assert sys.modules["reasonrl_good.observer"].SEEN == [1]
    assert "reasonrl_badhooks" not in sys.modules


def test_two_packages_with_one_observer_name_are_both_named(install: Install) -> None:
    install("good", "clash")
    assert refused() == (
        "2 packages provide hooks/tracker: reasonrl-clash 1.4 (reasonrl_clash)"
        " and reasonrl-good 0.3 (reasonrl_good.observer);"
        " uninstall one, or set REASONRL_BLOCK=reasonrl-clash to ignore it"
    )


def test_an_observer_that_raises_is_reported_once_and_blocked_until_the_next_run(
    install: Install, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    install("good", "failing")
    with caplog.at_level(logging.WARNING, logger="reasonrl"):
        for step in range(3):
            hooks.call("step_end", step=step, metrics={})
    assert [record.getMessage() for record in caplog.records] == [
        "hooks/failing from reasonrl-failing 0.1 (reasonrl_failing) raised in step_end:"
        " OSError: disk full; it is not called again in this run"
    ]
    assert sys.modules["reasonrl_failing"].CALLS == [0]
    assert sys.modules["reasonrl_good.observer"].SEEN == [0, 1, 2]
    hooks.call("run_start", recipe=None, directory=tmp_path)
    hooks.call("step_end", step=9, metrics={})
    assert sys.modules["reasonrl_failing"].CALLS == [0, 9]


def test_strict_raises_what_an_observer_raised(install: Install) -> None:
    install("failing")
    with pytest.raises(PluginError, match=r"reasonrl-failing 0\.1 .* OSError: disk full") as caught:
        hooks.call("step_end", strict=True, step=0, metrics={})
    assert isinstance(caught.value.__cause__, OSError)


def test_ctrl_c_in_an_observer_is_never_swallowed(install: Install) -> None:
    install("failing")
    hooks.manager()
    sys.modules["reasonrl_failing"].RAISES.append(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        hooks.call("step_end", step=0, metrics={})


def test_an_object_can_be_registered_for_this_process(caplog: pytest.LogCaptureFixture) -> None:
    class Observer:
        errors: list[Any]

        @hookimpl
        def run_end(self, error: BaseException | None) -> None:
            raise ValueError("mine")

    hooks.manager().register(Observer(), name="mine")
    with caplog.at_level(logging.WARNING, logger="reasonrl"):
        hooks.call("run_end", step=1, error=None)
    assert "hooks/mine (registered in this process) raised in run_end" in caplog.text


def test_a_hook_called_with_other_facts_than_its_specification_is_a_bug_of_ours() -> None:
    with pytest.raises(ContractError, match="Did you mean 'step_end'"):
        hooks.call("step_ends", step=1)
    with pytest.raises(ContractError, match=r"called with \['metrics', 'step'\], got \['step'\]"):
        hooks.call("step_end", step=1)
