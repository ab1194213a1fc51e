import enum
import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
from attrs import Factory, field, frozen, validators
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrl import registry
from reasonrl.config import from_record, override, overrides, to_record
from reasonrl.errors import ConfigError, PluginError
from reasonrl.interfaces.judge import Judge, Named, On, Product, Scaled, Sum
from reasonrl.types import EVERY, Prompt

if TYPE_CHECKING:
    from nowhere import Unresolved

TESTS = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Installs reasonrl's own entry points, as pyproject.toml has them, and reasonrl-good."""
    project = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["project"]
    site = tmp_path_factory.mktemp("site")
    info = site / "reasonrl-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: reasonrl\nVersion: 0.1.0\n")
    lines = [
        line
        for group, entries in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in entries.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("REASONRL_BLOCK", raising=False)
        patch.syspath_prepend(str(site))
        patch.syspath_prepend(str(TESTS / "plugin_packages" / "good"))
        yield
    for module in [name for name in sys.modules if name.startswith("reasonrl_good")]:
        del sys.modules[module]


def sharpness(**settings: Any) -> Judge:
    judge: Judge = registry.load("judges", "sharpness")(**settings)
    return judge


class Colour(enum.Enum):
    RED = "red"
    ZERO = 0


@frozen
class Part:
    clip: float = field(default=0.2, validator=validators.gt(0))
    high: float | None = None


@frozen
class Whole:
    """One field of each type that a recipe may hold."""

    part: Part = Part()
    parts: tuple[Part, ...] = ()
    by_stage: Mapping[str | tuple[str, ...], Part] = Factory(dict)
    steps: int = field(default=3, validator=validators.ge(1))
    flag: bool = False
    name: str = "n"
    scale: Literal["std", "none"] = "std"
    path: Path = Path("here")
    colour: Colour = Colour.RED
    sizes: list[int] = Factory(list)
    pair: tuple[int, str] = (1, "a")
    prompts: str | Sequence[Prompt] = "file"
    parsed: int = field(default=1, converter=int)
    loose: Any = None
    unresolved: "Unresolved | None" = None
    function: Callable[[int], int] | None = None
    judge: Judge | None = None
    marks: Mapping[str, str] = Factory(dict)
    _private: int = 7
    computed: int = field(default=1, init=False)


ROOTS = {"whole": Whole}


def refusal(do: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        do()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("assignment", "changed"),
    [
        ("part.clip=0.1", Whole(part=Part(0.1))),
        ("part.clip=1e-4", Whole(part=Part(1e-4))),
        ("part.clip=1", Whole(part=Part(1.0))),
        ("part.high=0.5", Whole(part=Part(high=0.5))),
        ("steps = 5", Whole(steps=5)),
        ("flag=True", Whole(flag=True)),
        ("name=0.1", Whole(name="0.1")),
        ("name=None", Whole(name="None")),
        ("name='quoted'", Whole(name="quoted")),
        ("name=a=b", Whole(name="a=b")),
        ("name=", Whole(name="")),
        ("scale=none", Whole(scale="none")),
        ("path=a/b", Whole(path=Path("a/b"))),
        ("colour=0", Whole(colour=Colour.ZERO)),
        ("sizes=(1, 2)", Whole(sizes=[1, 2])),
        ("pair=[2, 'b']", Whole(pair=(2, "b"))),
        ("pair.1=5", Whole(pair=(1, "5"))),
        ("prompts=data/train.jsonl", Whole(prompts="data/train.jsonl")),
        ("parsed=4", Whole(parsed=4)),
        ("loose=2", Whole(loose=2)),
        ("loose=two", Whole(loose="two")),
        ("unresolved=x", Whole(unresolved="x")),  # type: ignore[arg-type]
        ("marks={'a': 'b'}", Whole(marks={"a": "b"})),
    ],
)
def test_a_setting_is_read_as_its_field_wants_it(assignment: str, changed: Whole) -> None:
    found = override(Whole(), assignment)
    assert found == changed
    assert type(found.part.clip) is float


@pytest.mark.parametrize("text", ["none", "None"])
def test_an_optional_field_accepts_none(text: str) -> None:
    assert override(Part(high=0.5), f"high={text}").high is None


def test_paths_walk_tuples_by_index_and_mappings_by_key() -> None:
    whole = Whole(parts=(Part(), Part()), by_stage={"reasoning": Part(), ("a", "b"): Part()})
    assert override(whole, "parts.1.clip=0.5").parts == (Part(), Part(0.5))
    assert override(whole, "by_stage.reasoning.clip=0.5").by_stage["reasoning"] == Part(0.5)
    assert override(whole, "by_stage.a+b.clip=0.5").by_stage["a", "b"] == Part(0.5)
    assert whole.parts == (Part(), Part())


def test_a_judge_in_an_expression_is_reached_by_its_place() -> None:
    judge = sharpness() + 0.25 * sharpness(label="b")
    found = override(judge, "parts.1.factor=0.5")
    assert found == sharpness() + 0.5 * sharpness(label="b")


def test_settings_apply_in_order() -> None:
    assert overrides(Part(), ["clip=0.5", "high=1", "clip=0.7"]) == Part(0.7, 1.0)


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        (
            "part.clipp=0.1",
            "--set part.clipp=0.1: Part has no field 'clipp'. Did you mean 'clip'? Fields: clip, high",
        ),
        ("steps=abc", "--set steps=abc: expected int, got str 'abc'"),
        ("steps=1.5", "--set steps=1.5: expected int, got float 1.5"),
        ("steps=True", "--set steps=True: expected int, got bool True"),
        ("part.clip=False", "--set part.clip=False: expected float, got bool False"),
        ("part.clip=1e999", "--set part.clip=1e999: expected float, got float inf"),
        ("part.high=x", "--set part.high=x: expected float or None, got str 'x'"),
        ("flag=1", "--set flag=1: expected bool (True or False), got int 1"),
        ("scale=x", "--set scale=x: expected one of 'std', 'none', got str 'x'"),
        ("colour=blue", "--set colour=blue: expected one of 'red', 0, got str 'blue'"),
        ("part=3", "--set part=3: expected Part, got int 3"),
        ("parts=[3]", "--set parts=[3]: expected tuple[Part, ...], got list [3]"),
        ("pair=(1,)", "--set pair=(1,): expected tuple[int, str], got tuple (1,)"),
        ("pair.x=1", "--set pair.x=1: no item 'x': expected 0 to 1"),
        ("pair.2=1", "--set pair.2=1: no item '2': expected 0 to 1"),
        ("pair.-1=1", "--set pair.-1=1: no item '-1': expected 0 to 1"),
        ("parts.0.clip=1", "--set parts.0.clip=1: no item '0': the tuple is empty"),
        ("by_stage.x.clip=1", "--set by_stage.x.clip=1: no key 'x'. Keys: none"),
        ("steps.x=1", "--set steps.x=1: int 3 has no fields, so no 'x'"),
        ("judge.x=1", "--set judge.x=1: None has no fields, so no 'x'"),
        ("steps", "--set steps: expected PATH=VALUE, as in objective.clip=0.1"),
        ("=1", "--set =1: the path '' has an empty part, expected a.b.c=VALUE"),
        ("a..b=1", "--set a..b=1: the path 'a..b' has an empty part, expected a.b.c=VALUE"),
        ("part.clip=-1", "--set part.clip=-1: 'clip' must be > 0: -1.0"),
        ("parsed=x", "--set parsed=x: invalid literal for int() with base 10: 'x'"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_in_one_line(assignment: str, said: str) -> None:
    assert refusal(lambda: override(Whole(), assignment)) == said


@pytest.mark.parametrize("name", ["private", "_private", "computed"])
def test_what_the_constructor_does_not_show_is_no_setting(name: str) -> None:
    assert f"Whole has no field '{name}'" in refusal(lambda: override(Whole(), f"{name}=1"))


def test_a_component_that_refuses_the_whole_keeps_the_prefix_once() -> None:
    said = refusal(lambda: override(sharpness() + 2 * sharpness(), "parts.1.factor=0.0j"))
    assert said.startswith("--set parts.1.factor=0.0j: expected float")
    said = refusal(lambda: override(sharpness() + sharpness(), "parts=[]"))
    assert said == "--set parts=[]: a sum or product of judges needs judges, got nothing"


def test_no_setting_changes_private_state_that_variants_share() -> None:
    assert override(Whole(private=9), "steps=4")._private == 9


numbers = st.floats(min_value=0.01, max_value=1e6)
words = st.text(min_size=1, max_size=5)


def restricted(judge: Judge) -> st.SearchStrategy[Judge]:
    spoken_of = sorted(judge.stages - {EVERY})
    stages = words if EVERY in judge.stages else st.sampled_from(spoken_of)
    return st.builds(On, st.just(judge), stages)


judges = st.recursive(
    st.builds(lambda gain, label: sharpness(gain=gain, label=label), numbers, st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(Sum),
        st.lists(inner, min_size=1, max_size=3).map(Product),
        st.builds(Scaled, inner, numbers),
        inner.flatmap(restricted),
        st.builds(Named, inner, words),
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=50)
@given(judges)
def test_any_expression_of_registered_judges_survives_its_record(judge: Judge) -> None:
    record = json.loads(json.dumps(to_record(judge), allow_nan=False))
    assert from_record(record) == judge


keys = st.one_of(words, st.lists(words, min_size=1, max_size=3).map(tuple))
texts = st.sampled_from(["use", "mapping", "prompt", "function", "object", "a"]) | st.text(max_size=4)


@settings(deadline=None, max_examples=50)
@given(
    st.builds(
        Whole,
        part=st.builds(Part, numbers, st.none() | numbers),
        by_stage=st.dictionaries(keys, st.builds(Part, numbers), max_size=3),
        flag=st.booleans(),
        path=words.filter(lambda text: "\0" not in text).map(Path),
        colour=st.sampled_from(Colour),
        sizes=st.lists(st.integers(), max_size=3),
        pair=st.tuples(st.integers(), st.text()),
        marks=st.dictionaries(texts, st.text(max_size=3), max_size=2),
        judge=st.none() | judges,
    )
)
def test_any_settings_survive_their_record(whole: Whole) -> None:
    roots = {"whole": Whole, "part": Part}
    record = json.loads(json.dumps(to_record(whole, roots=roots), allow_nan=False))
    assert from_record(record, roots=roots) == whole


def test_a_record_holds_names_and_what_differs_from_the_defaults() -> None:
    judge = 0.5 * (sharpness(gain=2.0) + sharpness().on("image"))
    assert to_record(judge) == {
        "use": "judges/scaled",
        "part": {
            "use": "judges/sum",
            "parts": [
                {"use": "judges/sharpness", "gain": 2.0},
                {"use": "judges/on", "part": {"use": "judges/sharpness"}, "stage": "image"},
            ],
        },
        "factor": 0.5,
    }
    assert to_record(Whole(), roots=ROOTS) == {"use": "whole"}
    assert to_record(Whole(by_stage={("a", "b"): Part()}), roots={**ROOTS, "part": Part}) == {
        "use": "whole",
        "by_stage": {"a+b": {"use": "part"}},
    }


def test_prompts_survive_with_their_facts_as_they_were() -> None:
    prompts = (Prompt("1", "a cat", {"boxes": [[1, 2]], "use": "x"}), Prompt("2", "a dog"))
    record = to_record(Whole(prompts=prompts), roots=ROOTS)
    assert record["prompts"][1] == {"prompt": {"id": "2", "text": "a dog", "facts": {}}}
    assert from_record(json.loads(json.dumps(record)), roots=ROOTS).prompts == prompts


def test_a_plain_judge_without_state_is_recorded_by_name() -> None:
    plain = registry.load("judges", "plain")()
    assert to_record(plain) == {"use": "judges/plain"}
    assert type(from_record({"use": "judges/plain"})) is type(plain)
    plain.state = 1
    assert to_record(plain) == {"object": "reasonrl_good.judge:Plain"}


def test_an_unregistered_class_is_written_down_and_refused_on_load() -> None:
    record = to_record(Whole(part=Part(0.5)), roots=ROOTS)
    assert record["part"] == {"use": f"{__name__}:Part", "clip": 0.5}
    assert refusal(lambda: from_record(record, roots=ROOTS)) == (
        f"record.part: '{__name__}:Part' is not registered, recipe.json may construct registered"
        " names only (kind/name, whole): offer it as an entry point,"
        " or name the Python recipe (reasonrl train RECIPE --resume RUN)"
    )


def test_a_function_and_an_unknown_object_are_written_down_and_refused_on_load() -> None:
    record = to_record(Whole(function=len, loose=re.compile("x")), roots=ROOTS)
    assert record["function"] == {"function": "builtins:len"}
    assert record["loose"] == {"object": "re:Pattern"}
    for name, was in (("function", "function builtins:len"), ("loose", "object re:Pattern")):
        said = refusal(lambda: from_record({"use": "whole", name: record[name]}, roots=ROOTS))  # noqa: B023
        assert said.startswith(f"record.{name} was the {was}, which a record cannot hold: start")


@pytest.mark.parametrize("name", ["os:system", "os.system", "json", "", "recipes", 3, None, ["x"]])
def test_a_data_file_never_imports_code(name: object) -> None:
    assert "may construct registered names only" in refusal(lambda: from_record({"use": name}))


def test_a_data_file_calls_no_function_not_even_a_registered_one() -> None:
    said = refusal(lambda: from_record({"use": "recipes/tiny"}))
    assert said == "record: recipes/tiny is a function, and a record constructs classes only"


def test_a_component_that_is_not_installed_is_named() -> None:
    with pytest.raises(PluginError, match=r"no judges/sharpnes is installed\. Did you mean"):
        from_record({"use": "judges/sharpnes"})


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (
            {"use": "judges/sharpness", "gian": 1},
            "record: judges/sharpness has no field 'gian'. Did you mean 'gain'? Fields: gain, label",
        ),
        ({"use": "judges/sharpness", "gain": -1}, "record: 'gain' must be > 0: -1.0"),
        ({"use": "judges/plain", "x": 1}, "record: judges/plain has no field 'x'. Fields: none"),
        (
            {"use": "judges/sum", "parts": []},
            "record: a sum or product of judges needs judges, got",
        ),
        ({"use": "judges/on", "stage": "image"}, "record: On.__init__() missing 1 required"),
        ({"mapping": 3}, "record: expected a mapping, got int 3"),
        ({"prompt": {"id": "1"}}, "record: prompt dict {'id': '1'}: malformed"),
    ],
)
def test_a_record_that_cannot_be_built_says_where_and_why(record: Any, said: str) -> None:
    assert refusal(lambda: from_record(record)).startswith(said)


def test_a_place_deep_in_a_record_is_spelt_out() -> None:
    record = {"use": "judges/sum", "parts": [{"use": "judges/sharpness", "gain": 0}]}
    assert refusal(lambda: from_record(record)) == "record.parts.0: 'gain' must be > 0: 0.0"


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_a_number_that_json_lacks_is_refused_where_it_stands(number: float) -> None:
    said = refusal(lambda: to_record(Whole(parts=(Part(high=number),))))
    assert said.startswith(f"Whole.parts.0.high is {number}, which JSON cannot hold")


def test_facts_that_are_no_json_are_refused_by_prompt() -> None:
    whole = Whole(prompts=[Prompt("cat", "a cat", {"x": object()})])
    assert "the facts of prompt 'cat' are no JSON" in refusal(lambda: to_record(whole))


def test_a_prompts_image_is_refused_on_load() -> None:
    record = to_record(Prompt("1", "a cat", image="pixels"))  # type: ignore[arg-type]
    assert "its image is not recorded" in refusal(lambda: from_record(record))
