"""Config: change a field of a component from the command line; write a component to JSON and back.

override(recipe, "judge.parts.0.factor=0.5")        # --set
to_record(judge)                                    # {"use": "judges/sum", "parts": [...]}
"""

from __future__ import annotations

import ast
import enum
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TypeVar

import attrs

from reasonrl import registry
from reasonrl.errors import ConfigError
from reasonrl.fields import MisfitError, fields_of, fit, hint_of, item_hint, key_of, spelt, value_hint
from reasonrl.registry import described, did_you_mean
from reasonrl.types import Prompt

C = TypeVar("C")

_ANY: Any = Any
_MARKS = ("function", "mapping", "object", "prompt")
_NO_ROOTS: Mapping[str, type] = {}


# ---- one field from the command line ----


def overrides(component: C, assignments: Sequence[str]) -> C:
    """Returns the component with each assignment applied, in order."""
    for assignment in assignments:
        component = override(component, assignment)
    return component


def override(component: C, assignment: str) -> C:
    """Returns the component with one field changed; its validators and converters run again.

        override(recipe, "objectives.reasoning.clip=0.1")

    A path walks fields by name, tuples and lists by index, mappings by key (a tuple of stages is
    `reasoning+image`). The value is a Python literal where the field's type takes one, else plain
    text. Raises ConfigError.
    """
    path, equals, text = assignment.partition("=")
    where = f"--set {assignment}"
    if not equals:
        raise ConfigError(f"{where}: expected PATH=VALUE, as in objective.clip=0.1")
    steps = path.strip().split(".")
    if not all(steps):
        raise ConfigError(f"{where}: the path {path.strip()!r} has an empty part, expected a.b.c=VALUE")
    changed: C = _changed(component, type(component), steps, text.strip(), where=where)
    return changed


def _changed(value: Any, hint: Any, steps: Sequence[str], text: str, *, where: str) -> Any:
    if not steps:
        return _parsed(text, hint, where=where)
    step, *rest = steps
    if attrs.has(type(value)):
        attribute = _attribute(value, step, where=where)
        inner = hint_of(type(value), attribute)
        if not rest and attribute.converter is not None:
            inner = inner | str if isinstance(inner, type) else _ANY  # the converter decides
        new = _changed(getattr(value, attribute.name), inner, rest, text, where=where)
        return _built(lambda: attrs.evolve(value, **{key_of(attribute): new}), where=where)
    if isinstance(value, tuple | list):
        index = _index(value, step, where=where)
        items = list(value)
        items[index] = _changed(items[index], item_hint(hint, index), rest, text, where=where)
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, Mapping):
        keys = {_joined(key): key for key in value}
        if step not in keys:
            known = ", ".join(keys) or "none"
            raise ConfigError(f"{where}: no key {step!r}.{did_you_mean(step, keys)} Keys: {known}")
        key = keys[step]
        return {**value, key: _changed(value[key], value_hint(hint), rest, text, where=where)}
    raise ConfigError(f"{where}: {described(value)} has no fields, so no {step!r}")


def _attribute(value: Any, name: str, *, where: str) -> attrs.Attribute[Any]:
    fields = fields_of(type(value))
    if name not in fields:
        raise ConfigError(f"{where}: {_no_field(type(value), name)}")
    return fields[name]


def _no_field(cls: type, name: str) -> str:
    fields = fields_of(cls)
    hint = did_you_mean(name, fields)
    return f"{cls.__name__} has no field {name!r}.{hint} Fields: {', '.join(fields) or 'none'}"


def _index(value: Sequence[Any], step: str, *, where: str) -> int:
    if step.isdecimal() and int(step) < len(value):
        return int(step)
    known = f"expected 0 to {len(value) - 1}" if value else f"the {type(value).__name__} is empty"
    raise ConfigError(f"{where}: no item {step!r}: {known}")


def _parsed(text: str, hint: Any, *, where: str) -> Any:
    candidates = [*_literal(text), text]
    if text.lower() == "none" and type(None) in typing.get_args(hint):
        candidates.insert(0, None)
    for candidate in candidates:
        try:
            return fit(candidate, hint)
        except MisfitError:
            continue
    literal = next(iter(_literal(text)), text)
    raise ConfigError(f"{where}: expected {spelt(hint)}, got {described(literal)}")


def _literal(text: str) -> list[Any]:
    try:
        return [ast.literal_eval(text)]
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return []


def _built(build: Callable[[], Any], *, where: str) -> Any:
    """Returns what build() makes; what a validator or converter refuses is a ConfigError."""
    try:
        return build()
    except (ValueError, TypeError, ConfigError) as error:
        # attrs' validators put the sentence first, then the attribute and the value.
        sentence = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)
        raise ConfigError(f"{where}: {' '.join(sentence.split())}") from error


# ---- records ----


def to_record(value: Any, *, roots: Mapping[str, type] = _NO_ROOTS) -> Any:
    """Returns a component as JSON data that `from_record` builds again.

    A component is {"use": its registered name, or its name in `roots`} and the fields that differ
    from their defaults. Tuples and lists are lists, a path its text, an enum its value, a tuple as
    a key `reasoning+image`. What a data file must not build is written down too, and refused on
    load: unregistered classes as {"use": "module:Class"}, functions as {"function": "module:name"},
    other objects as {"object": "module:Class"}. Raises ConfigError for numbers that JSON lacks.
    """
    return _recorded(value, {cls: name for name, cls in roots.items()}, path=type(value).__name__)


def _recorded(value: Any, names: dict[type, str], *, path: str) -> Any:
    if isinstance(value, enum.Enum):
        return _recorded(value.value, names, path=path)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path} is {value}, which JSON cannot hold: give a finite number or None")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [_recorded(item, names, path=f"{path}.{i}") for i, item in enumerate(value)]
    if isinstance(value, Set):
        return [_recorded(item, names, path=path) for item in sorted(value, key=repr)]
    if isinstance(value, Mapping):
        return _recorded_mapping(value, names, path=path)
    if isinstance(value, Prompt):
        return {"prompt": _recorded_prompt(value, path=path)}
    if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        return {"function": _home(value)}
    return _recorded_object(value, names, path=path)


def _recorded_object(value: Any, names: dict[type, str], *, path: str) -> Any:
    cls, home = type(value), _home(type(value))
    if not attrs.has(cls):
        # A plain component without state is whole when built again; of others that is unknown.
        stateless = not getattr(value, "__dict__", {"unknown": 0})
        named = stateless and _name(cls, names) != home
        return {"use": _name(cls, names)} if named else {"object": home}
    record = {"use": _name(cls, names)}
    for key, attribute in fields_of(cls).items():
        found = getattr(value, attribute.name)
        if not _is_default(value, attribute, found):
            record[key] = _recorded(found, names, path=f"{path}.{key}")
    return record


def _name(cls: type, names: dict[type, str]) -> str:
    if cls not in names:  # looked up once a record: it reads what is installed
        names[cls] = registry.name_of(cls) or _home(cls)
    return names[cls]


def _home(value: Any) -> str:
    return f"{value.__module__}:{value.__qualname__}"


def _is_default(component: Any, attribute: attrs.Attribute[Any], value: Any) -> bool:
    default: Any = attribute.default
    if default is attrs.NOTHING:
        return False
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        default = default.factory(component) if default.takes_self else default.factory()
    return default is value or (type(default) is type(value) and bool(default == value))


def _recorded_mapping(value: Mapping[Any, Any], names: dict[type, str], *, path: str) -> Any:
    record = {}
    for key, item in value.items():
        name = _escaped(key, path=path)
        record[name] = _recorded(item, names, path=f"{path}.{name}")
    return {"mapping": record} if _is_marked(record) else record


def _recorded_prompt(prompt: Prompt, *, path: str) -> dict[str, Any]:
    try:
        facts = json.loads(json.dumps(dict(prompt.facts), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: the facts of prompt {prompt.id!r} are no JSON: {error}") from error
    record = {"id": prompt.id, "text": prompt.text, "facts": facts}
    return record if prompt.image is None else {**record, "image": described(prompt.image)}


def from_record(record: Any, *, roots: Mapping[str, type] = _NO_ROOTS) -> Any:
    """Returns what `to_record` wrote. A data file constructs registered names and `roots` only.

    Lists become tuples, unless the field's type or converter asks for another container. Raises
    ConfigError for a record that cannot be built, PluginError for a component not installed.
    """
    return _restored(record, roots, path="record")


def _restored(record: Any, roots: Mapping[str, type], *, path: str) -> Any:
    if isinstance(record, list):
        return tuple(_restored(item, roots, path=f"{path}.{i}") for i, item in enumerate(record))
    if not isinstance(record, Mapping):
        return record
    if "use" in record:
        return _restored_component(record, roots, path=path)
    if not _is_marked(record):
        return _restored_mapping(record, roots, path=path)
    [(mark, content)] = record.items()
    if mark == "mapping":
        return _restored_mapping(content, roots, path=path)
    if mark == "prompt":
        return _restored_prompt(content, path=path)
    raise ConfigError(
        f"{path} was the {mark} {content}, which a record cannot hold:"
        " start from the Python recipe, or make it a registered component"
    )


def _restored_component(record: Mapping[str, Any], roots: Mapping[str, type], *, path: str) -> Any:
    name = str(record["use"])
    cls = roots[name] if name in roots else _registered(name, roots, path=path)
    given = {key: item for key, item in record.items() if key != "use"}
    fields = fields_of(cls) if attrs.has(cls) else {}
    unknown = [key for key in given if key not in fields]
    if unknown:
        problems = [f"no field {key!r}.{did_you_mean(key, fields)}" for key in unknown]
        raise ConfigError(f"{path}: {name} has {' and '.join(problems)} Fields: {', '.join(fields) or 'none'}")
    values = {k: _restored(item, roots, path=f"{path}.{k}") for k, item in given.items()}
    shaped = {key: _shaped(item, hint_of(cls, fields[key])) for key, item in values.items()}
    return _built(lambda: cls(**shaped), where=path)


def _registered(name: str, roots: Mapping[str, type], *, path: str) -> type:
    kind, slash, short = name.partition("/")
    if not slash or kind not in registry.KINDS:
        allowed = ", ".join(["kind/name", *roots])
        raise ConfigError(
            f"{path}: {name!r} is not registered, recipe.json may construct registered names only"
            f" ({allowed}): offer it as an entry point, or name the Python recipe (reasonrl train RECIPE --resume RUN)"
        )
    cls = registry.load(kind, short)
    if not isinstance(cls, type):
        raise ConfigError(f"{path}: {name} is a {type(cls).__name__}, and a record constructs classes only")
    return cls


def _shaped(value: Any, hint: Any) -> Any:
    # What does not fit is left to the validators: a recipe that Python accepted must load again.
    try:
        return fit(value, hint)
    except MisfitError:
        return value


def _restored_mapping(record: Any, roots: Mapping[str, type], *, path: str) -> dict[Any, Any]:
    if not isinstance(record, Mapping):
        raise ConfigError(f"{path}: expected a mapping, got {described(record)}")
    return {_unescaped(k): _restored(v, roots, path=f"{path}.{k}") for k, v in record.items()}


def _restored_prompt(record: Any, *, path: str) -> Prompt:
    if not isinstance(record, Mapping) or set(record) != {"id", "text", "facts"}:
        why = "its image is not recorded" if isinstance(record, Mapping) and "image" in record else "malformed"
        raise ConfigError(f"{path}: prompt {described(record)}: {why}; expected id, text and facts")
    return Prompt(record["id"], record["text"], record["facts"])


def _is_marked(record: Mapping[str, Any]) -> bool:
    return "use" in record or (len(record) == 1 and next(iter(record)) in _MARKS)


def _joined(key: Any) -> str:
    return "+".join(map(str, key)) if isinstance(key, tuple) else str(key)


def _escaped(key: Any, *, path: str) -> str:
    """Returns "reasoning+image" for a tuple, "reasoning+" for a tuple of one; escapes a plus."""
    parts = key if isinstance(key, tuple) else (key,)
    if not parts or not all(isinstance(part, str) and (part or key == "") for part in parts):
        raise ConfigError(f"{path}: key {described(key)} cannot be recorded: expected text, or texts")
    escaped = [re.sub(r"([+\\])", r"\\\1", part) for part in parts]
    return "+".join(escaped) + ("+" if isinstance(key, tuple) and len(key) == 1 else "")


def _unescaped(name: str) -> str | tuple[str, ...]:
    parts: list[str] = [""]
    for piece in re.findall(r"\\.|.", name, flags=re.DOTALL):
        if piece == "+":
            parts.append("")
        else:
            parts[-1] += piece[-1]
    if len(parts) == 1:
        return parts[0]
    return tuple(parts if parts[-1] else parts[:-1])
