import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from reasonrl import registry
from reasonrl.errors import PluginError

PACKAGES = Path(__file__).parent / "plugin_packages"
Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts plugin packages on sys.path, and forgets their modules afterwards."""

    def put(*names: str) -> None:
        for name in names:
            monkeypatch.syspath_prepend(str(PACKAGES / name))

    monkeypatch.delenv("REASONRL_BLOCK", raising=False)
    yield put
    for module in [m for m in sys.modules if re.match(r"reasonrl_(good|broken|clash|odd)\b", m)]:
        del sys.modules[module]


def loaded(kind: str, name: str) -> str:
    with pytest.raises(PluginError) as caught:
        registry.load(kind, name)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_listing_tells_what_is_installed_and_imports_nothing(install: Install) -> None:
    install("good", "broken", "odd")
    found = {str(c): c for c in registry.components("judges")}
    assert found["judges/sharpness from reasonrl-good 0.3 (reasonrl_good:Sharpness)"].version == "0.3"
    assert "judges/broken from reasonrl-broken 0.2 (reasonrl_broken:Broken)" in found
    assert "recipes/tiny" in {f"{c.kind}/{c.name}" for c in registry.components()}
    assert not {"reasonrl_good", "reasonrl_broken", "reasonrl_odd"} & set(sys.modules)


def test_one_name_loads_one_module(install: Install) -> None:
    install("good", "broken")
    assert registry.load("judges", "sharpness").__name__ == "Sharpness"
    assert registry.load("recipes", "tiny")() == "a recipe"
    assert "reasonrl_broken" not in sys.modules


def test_an_unknown_name_suggests_the_near_one_and_lists_the_others(install: Install) -> None:
    install("good")
    said = loaded("judges", "sharpnes")
    assert said.startswith("no judges/sharpnes is installed. Did you mean 'sharpness'? Installed: ")
    assert "plain, " in said


def test_an_unknown_kind_suggests_the_near_one() -> None:
    assert loaded("judge", "sharpness") == (
        "unknown kind 'judge'. Did you mean 'judges'?"
        " Kinds: policies, renderers, judges, objectives, tools, families, recipes, benchmarks"
    )


def test_a_kind_with_nothing_installed_says_none(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("good")
    monkeypatch.setenv("REASONRL_BLOCK", "reasonrl")
    assert loaded("benchmarks", "clip-score") == "no benchmarks/clip-score is installed. Installed: none"


def test_two_packages_with_one_name_are_both_named_with_the_way_out(install: Install) -> None:
    install("good", "clash")
    assert loaded("judges", "sharpness") == (
        "2 packages provide judges/sharpness: reasonrl-clash 1.4 (reasonrl_clash:Sharpness)"
        " and reasonrl-good 0.3 (reasonrl_good:Sharpness);"
        " uninstall one, or set REASONRL_BLOCK=reasonrl-clash to ignore it"
    )
    assert registry.load("judges", "plain").__name__ == "Plain"


def test_a_blocked_distribution_is_ignored_however_it_is_spelt(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("good", "clash")
    monkeypatch.setenv("REASONRL_BLOCK", " other , Reasonrl_CLASH")
    cls = registry.load("judges", "sharpness")
    assert cls.__module__ == "reasonrl_good.judge"
    monkeypatch.setenv("REASONRL_BLOCK", "reasonrl-clash,reasonrl.good")
    assert "REASONRL_BLOCK names reasonrl-clash, unset it" in loaded("judges", "sharpness")
    assert not [c for c in registry.components() if c.distribution == "reasonrl-good"]
    assert registry.name_of(cls) is None


def test_a_failing_import_names_distribution_version_entry_cause_and_way_out(
    install: Install,
) -> None:
    install("good", "broken")
    with pytest.raises(PluginError) as caught:
        registry.load("judges", "broken")
    assert str(caught.value) == (
        "judges/broken from reasonrl-broken 0.2 (reasonrl_broken:Broken) failed to import:"
        " ModuleNotFoundError: No module named 'a_package_that_nobody_has'; update or uninstall"
        " reasonrl-broken, or set REASONRL_BLOCK=reasonrl-broken to ignore it"
    )
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    assert registry.load("judges", "sharpness").__name__ == "Sharpness"


def test_a_missing_attribute_is_a_failing_import(install: Install) -> None:
    install("odd")
    assert "failed to import: AttributeError: module 'reasonrl_odd'" in loaded("judges", "missing")


def test_a_wrong_type_says_what_it_got_and_wanted(install: Install) -> None:
    install("odd")
    assert "must be a subclass of reasonrl.Judge, got class Unrelated" in loaded("judges", "unrelated")
    assert "(reasonrl_odd:TEXT) must be callable, got str 'hello'" in loaded("recipes", "text")


def test_a_class_knows_its_name_though_it_is_offered_from_another_module(install: Install) -> None:
    install("good", "broken")
    sharpness = registry.load("judges", "sharpness")
    assert sharpness.__module__ == "reasonrl_good.judge"
    assert registry.name_of(sharpness) == "judges/sharpness"
    assert registry.name_of(registry.load("recipes", "tiny")) == "recipes/tiny"
    assert registry.name_of(Path) is None
    assert registry.name_of("a string") is None
    assert "reasonrl_broken" not in sys.modules


def test_a_distribution_seen_twice_counts_once(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("good")
    shutil.copytree(PACKAGES / "good", tmp_path / "again")
    monkeypatch.syspath_prepend(str(tmp_path / "again"))
    assert [c.name for c in registry.components("judges")].count("sharpness") == 1
    assert registry.load("judges", "sharpness").__name__ == "Sharpness"


def test_a_distribution_without_metadata_stops_nobody(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("good")
    info = tmp_path / "reasonrl_bare-1.0.dist-info"
    info.mkdir()
    (info / "entry_points.txt").write_text("[reasonrl.judges]\nbare = reasonrl_bare:Bare\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert {"bare", "sharpness"} <= {c.name for c in registry.components("judges")}
    assert "failed to import" in loaded("judges", "bare")


def test_importing_registry_hooks_and_config_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, reasonrl.registry, reasonrl.hooks, reasonrl.config;"
        "print(sorted({'torch', 'transformers', 'typer'} & set(sys.modules)))"
    )
    source = Path(__file__).parents[1] / "src"
    environment = {**os.environ, "PYTHONPATH": str(source)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
