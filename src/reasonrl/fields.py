"""Fields: what a component's constructor takes, and whether a value is of a field's type."""

from __future__ import annotations

import enum
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import attrs

_ANY: Any = Any


def fields_of(cls: type) -> dict[str, attrs.Attribute[Any]]:
    """Returns what the constructor takes by name; private fields are no settings."""
    return {
        key_of(attribute): attribute
        for attribute in attrs.fields(cls)
        if attribute.init and not attribute.name.startswith("_")
    }


def key_of(attribute: attrs.Attribute[Any]) -> str:
    """Returns the name the constructor takes."""
    return attribute.alias or attribute.name


def hint_of(cls: type, attribute: attrs.Attribute[Any]) -> Any:
    """Returns a field's type, resolved alone: names imported for type checkers only become Any."""
    home = next(
        (k for k in cls.__mro__ if attrs.has(k) and _declares(k, attribute.name)),
        cls,
    )
    lone = type("lone", (), {"__module__": home.__module__})
    lone.__annotations__ = {"field": _ANY if attribute.type is None else attribute.type}
    try:
        return typing.get_type_hints(lone)["field"]
    except (NameError, AttributeError, TypeError, SyntaxError):
        return _ANY


def _declares(cls: type, name: str) -> bool:
    attribute = getattr(attrs.fields(cls), name, None)
    return attribute is not None and not attribute.inherited


def item_hint(hint: Any, index: int) -> Any:
    """Returns the type of a sequence's item; Any where the hint does not say."""
    options = typing.get_args(hint)
    for option in options if _is_union(hint) else (hint,):
        inner = typing.get_args(option)
        origin = typing.get_origin(option)
        if origin is tuple and inner:
            return inner[0] if inner[-1] is Ellipsis else inner[index : index + 1][0]
        if inner and isinstance(origin, type) and issubclass(origin, Sequence):
            return inner[0]
    return _ANY


def value_hint(hint: Any) -> Any:
    """Returns the type of a mapping's values; Any where the hint does not say."""
    for option in typing.get_args(hint) if _is_union(hint) else (hint,):
        origin, inner = typing.get_origin(option), typing.get_args(option)
        if isinstance(origin, type) and issubclass(origin, Mapping) and len(inner) == 2:
            return inner[1]
    return _ANY


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


class MisfitError(Exception):
    """The value is not of the type."""


def fit(value: Any, hint: Any) -> Any:
    """Returns the value as the type wants it (1 -> 1.0, "a" -> Path("a")); raises MisfitError."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if _is_union(hint):
        return _fit_any(value, inner)
    if origin is typing.Literal:
        return _if(any(value == one and type(value) is type(one) for one in inner), value)
    if isinstance(origin, type):
        return _fit_container(value, origin, inner)
    if hint is None or hint is type(None):
        return _if(value is None, value)
    if not isinstance(hint, type):
        return value  # Any, a type variable, something newer: the validators decide
    return _fit_class(value, hint)


def _fit_any(value: Any, options: Sequence[Any]) -> Any:
    exact = [o for o in options if isinstance(o, type) and type(value) is o]
    for option in (*exact, *options):
        try:
            return fit(value, option)
        except MisfitError:
            continue
    raise MisfitError


def _fit_class(value: Any, cls: type) -> Any:
    if cls is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(_if(number and math.isfinite(value), value))
    if cls is int:
        return _if(isinstance(value, int) and not isinstance(value, bool), value)
    if issubclass(cls, enum.Enum) and not isinstance(value, cls):
        return cls(_if(value in [member.value for member in cls], value))
    if issubclass(Path, cls) and cls is not object and isinstance(value, str):
        return Path(value)
    if cls in (tuple, list, frozenset, set, dict):
        return _fit_container(value, cls, ())
    try:
        return _if(isinstance(value, cls), value)
    except TypeError:  # a protocol that cannot be asked
        return value


def _fit_container(value: Any, origin: type, inner: Sequence[Any]) -> Any:
    if issubclass(origin, Mapping):
        key, item = inner if len(inner) == 2 else (_ANY, _ANY)
        _if(isinstance(value, Mapping), value)
        return {fit(k, key): fit(v, item) for k, v in value.items()}
    if issubclass(origin, Set):
        _if(isinstance(value, tuple | list | Set), value)
        members = [fit(v, inner[0] if inner else _ANY) for v in value]
        return set(members) if origin is set else frozenset(members)
    if issubclass(origin, Sequence):
        _if(isinstance(value, tuple | list), value)
        fixed = origin is tuple and inner and inner[-1] is not Ellipsis
        hints = inner if fixed else (inner[0] if inner else _ANY,) * len(value)
        _if(len(hints) == len(value), value)
        items = [fit(v, hint) for v, hint in zip(value, hints, strict=True)]
        return items if origin is list else tuple(items)
    return _if(isinstance(value, origin), value)


def _if(fits: bool, value: Any) -> Any:
    if not fits:
        raise MisfitError
    return value


def spelt(hint: Any) -> str:
    """Returns a type in words, for error messages."""
    if _is_union(hint):
        return " or ".join(dict.fromkeys(map(spelt, typing.get_args(hint))))
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(repr, typing.get_args(hint)))}"
    if hint is type(None):
        return "None"
    if hint is bool:
        return "bool (True or False)"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return f"one of {', '.join(repr(member.value) for member in hint)}"
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint.__name__
    return re.sub(r"\b(\w+\.)+", "", str(hint))
