"""Prompt files: text lines, JSON lines, GenEval metadata and T2I-CompBench, by one function.

A file that cannot be read in full is refused with the lines to fix: a run never trains on part of
what it was given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from reasonrl.errors import ConfigError, DataError
from reasonrl.types import Prompt

TEXT_FIELDS = ("text", "prompt", "caption")
"""Where a JSON line may keep its text; the first one present is read."""
TEXT_SUFFIXES = (".txt",)
JSON_SUFFIXES = (".jsonl", ".json")
"""`.json` too, because published prompt sets are JSON lines under that name."""
NOT_PROMPTS = ("license", "new_objects")
"""Stems left out of a folder: T2I-CompBench's new_objects.txt is a word list ("cup - cups")."""
LONGEST_LINE = 20_000
"""Characters. A longer line is a file of another kind, or one that lost its line ends."""
NUM_SHOWN = 3

_CATEGORY = re.compile(r"(3d_spatial|non_spatial|spatial|numeracy|complex|color|shape|texture)(_(train|val)(_\w+)?)?")
_LINE_END = re.compile(r"\r\n|\n|\r")


def read_prompts(path: str | Path, *, limit: int | None = None) -> tuple[Prompt, ...]:
    """Returns the prompts of a file, of every .txt and .jsonl file of a folder, or of a pattern's files, by name.

    - `.txt`: a prompt a line; blank lines and lines that start with # are skipped.
    - `.jsonl`: an object a line with `text`, `prompt` or `caption`; optionally `id` and `facts`.
      All other fields become facts too. GenEval's `tag` becomes the fact `category`.
    - T2I-CompBench: the fact `category` is taken from the file name (`color_train.txt`); its folder holds training
      and validation prompts, which a pattern tells apart: `*_train.txt`.

    A prompt without an id is called `stem:line`, counting from 1. `limit` keeps the first few.
    Raises DataError, in one line that names the file and up to three offending lines.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}: it is a number of prompts")
    found: dict[str, tuple[str, Prompt]] = {}
    problems: list[str] = []
    for file in _files(Path(path)):
        for number, line in _lines(file):
            place = f"{file}:{number}"
            try:
                prompt = _prompt(file, number, line)
                if prompt.id in found:
                    raise DataError(f"id {_shown(prompt.id)} is taken by {found[prompt.id][0]}")
            except DataError as problem:
                problems.append(f"{place}: {problem}")
            else:
                found[prompt.id] = (place, prompt)
    if problems:
        more = len(problems) - NUM_SHOWN
        rest = [f"and {more} more of {len(problems)} lines to fix"] if more > 0 else []
        raise DataError("; ".join([*problems[:NUM_SHOWN], *rest]))
    return tuple(prompt for _, prompt in found.values())[:limit]


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return _kept(path.iterdir(), f"{path}: the folder holds no .txt or .jsonl file of prompts")
    if not path.exists() and set("*?[") & set(path.name) and path.parent.is_dir():
        return _kept(path.parent.glob(path.name), f"{path}: no .txt or .jsonl file of prompts is called so")
    if not path.exists():
        raise DataError(f"{path}: no such file{_nearest(path)}")
    if path.suffix.lower() not in TEXT_SUFFIXES + JSON_SUFFIXES:
        raise DataError(
            f"{path}: prompts are read from {', '.join(TEXT_SUFFIXES + JSON_SUFFIXES)} files"
            f" or a folder of them, got {path.suffix or 'no suffix'}"
        )
    return [path]


def _kept(paths: Iterable[Path], otherwise: str) -> list[Path]:
    kept = [p for p in sorted(paths) if p.suffix.lower() in (".txt", ".jsonl")]
    kept = [p for p in kept if p.is_file() and p.stem.lower() not in NOT_PROMPTS]
    if not kept:
        raise DataError(otherwise)
    return kept


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f", and no folder {path.parent} either"
    near = get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f" in that folder. Did you mean {near[0]!r}?" if near else " in that folder"


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yields (line number, line) of the lines that hold something; DataError where none does."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    comments = file.suffix.lower() in TEXT_SUFFIXES
    empty = True
    # Not str.splitlines: it also splits at form feeds and U+2028, which may stand inside a text.
    for number, line in enumerate(_LINE_END.split(_decoded(file, data)), start=1):
        stripped = line.strip()
        if stripped and not (comments and stripped.startswith("#")):
            empty = False
            yield number, stripped
    if empty:
        raise DataError(f"{file}: holds no prompts, write one a line")


def _decoded(file: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # `error.start` counts from behind the byte order mark, if there is one.
        at = error.start + len(data) - len(error.object)
        line = len(_LINE_END.findall(data[:at].decode("latin-1"))) + 1
        raise DataError(
            f"{file}:{line}: not UTF-8: byte {at} of the file is 0x{data[at]:02x}; save the file as UTF-8"
        ) from error


def _prompt(file: Path, number: int, line: str) -> Prompt:
    """Returns the prompt of one line; DataError says what is wrong, without the place."""
    if len(line) > LONGEST_LINE:
        raise DataError(f"{len(line)} characters, expected at most {LONGEST_LINE}")
    fields = {"text": line} if file.suffix.lower() in TEXT_SUFFIXES else _object(line)
    text = _text(fields)
    name = _id(fields, default=f"{file.stem}:{number}")
    facts = _facts(fields)
    if category := _CATEGORY.fullmatch(file.stem.lower()):
        facts.setdefault("category", category[1])
    return Prompt(name, text, facts)


def _object(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"broken JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 5000 brackets
        raise DataError("broken JSON (too large a number, or nested too deeply)") from error
    if not isinstance(value, dict):
        raise DataError(f"expected a JSON object, got {_shown(value)}")
    return value


def _text(fields: dict[str, Any]) -> str:
    """Removes the text from the fields and returns it."""
    key = next((name for name in TEXT_FIELDS if name in fields), None)
    if key is None:
        raise DataError(f"no {' or '.join(TEXT_FIELDS)} among its fields {_shown(sorted(fields))}")
    text = fields.pop(key)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{key!r} must be a text, got {_shown(text)}")
    _refuse_unusable(key, text)
    return text


def _id(fields: dict[str, Any], *, default: str) -> str:
    """Removes the id from the fields and returns it."""
    name = fields.pop("id", None)
    if name is None:
        return default
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise DataError(f"'id' must be a text or a whole number, got {_shown(name)}")
    _refuse_unusable("id", str(name))
    return str(name)


def _refuse_unusable(key: str, text: str) -> None:
    if "\0" in text:
        raise DataError(f"{key!r} holds a NUL byte at character {text.index(chr(0)) + 1}")
    if lone := re.search(r"[\ud800-\udfff]", text):  # JSON can spell them; no tokenizer takes them
        raise DataError(f"{key!r} holds half a surrogate pair at character {lone.start() + 1}")


def _facts(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns what the text and the id left over; `facts` given as such win over stray fields."""
    given = fields.pop("facts", None) or {}
    if not isinstance(given, dict):
        raise DataError(f"'facts' must be a JSON object, got {_shown(given)}")
    if "include" in fields and "tag" in fields:  # GenEval's metadata
        fields["category"] = fields.pop("tag")
    return {**fields, **given}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
