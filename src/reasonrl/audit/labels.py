"""Human labels: a JSONL file of pictures and what people said of them, checked whole before anything is judged."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

from attrs import frozen
from PIL import Image, UnidentifiedImageError

from reasonrl.errors import DataError
from reasonrl.types import Prompt, Trajectory

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_PIXELS = 64_000_000
"""A larger picture is refused."""
LONGEST_TEXT = 20_000
"""Characters of a prompt or a reasoning."""
NUM_SHOWN = 3
_LISTED = 20


@frozen
class Label:
    """One line: what was asked, what was drawn, and what people gave it."""

    prompt: str
    image: Path
    reasoning: str | None
    score: float
    group: str
    """Lines of one group were drawn for one prompt."""

    def trajectory(self, member: int) -> Trajectory:
        """Returns it as a judge sees it; reads the picture."""
        texts = {} if self.reasoning is None else {"reasoning": self.reasoning}
        prompt = Prompt(f"label:{self.group}", self.prompt)
        return Trajectory(prompt, (member,), texts=texts, images={"image": read_picture(self.image)})


def read_labels(path: Path) -> list[Label]:
    """Returns the labels of a file, groups whole; DataError, in one line with every line number, for what is wrong.

    A line is an object with `prompt`, `image` (a PNG, JPEG or WebP file, its path from the file's folder and inside
    it), `score` (any finite number, more is better), and optionally `reasoning` and `group` (else the prompt). Other
    fields are for other tools.
    """
    found: dict[str, list[Label]] = {}
    problems: dict[int, str] = {}
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            label = _label(line, path.parent)
            said = found.setdefault(label.group, [])
            if said and said[0].prompt != label.prompt:
                raise DataError(f"group {label.group!r} has another prompt above")
            said.append(label)
        except DataError as error:
            problems[number] = str(error)
    if problems:
        raise DataError(_refusal(path, problems))
    if not found:
        raise DataError(f"{path}: holds no labels, write one JSON object a line")
    return [label for group in found.values() for label in group]


def _refusal(path: Path, problems: dict[int, str]) -> str:
    numbers = list(map(str, problems))
    listed = ", ".join(numbers[:_LISTED]) + (f" and {len(numbers) - _LISTED} more" if len(numbers) > _LISTED else "")
    shown = "; ".join(f"{number}: {why}" for number, why in list(problems.items())[:NUM_SHOWN])
    return f"{path}: {len(problems)} malformed lines ({listed}), fix or remove them: {shown}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}: save the file as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _label(line: str, folder: Path) -> Label:
    try:
        said = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError("no JSON") from error
    if not isinstance(said, dict):
        raise DataError("expected a JSON object")
    prompt = _string(said, "prompt")
    reasoning = None if said.get("reasoning") is None else _string(said, "reasoning")
    group = said.get("group")
    if group is not None and (isinstance(group, bool) or not isinstance(group, str | int)):
        raise DataError("'group' must be a text or a whole number")
    image = _inside(_string(said, "image"), folder)
    read_picture(image)
    return Label(prompt, image, reasoning, _number(said), prompt if group is None else str(group))


def _string(said: dict[str, Any], name: str) -> str:
    value = said.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{name!r} must be a text, got {_short(value)}")
    if len(value) > LONGEST_TEXT:
        raise DataError(f"{name!r} has {len(value)} characters, expected at most {LONGEST_TEXT}")
    return value


def _number(said: dict[str, Any]) -> float:
    value = said.get("score")
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
        raise DataError(f"'score' must be a finite number, got {_short(value)}")
    return float(value)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number too large for a float
        return False


def _inside(name: str, folder: Path) -> Path:
    """Returns the picture's path; DataError where it leads out of the folder, by name or by link."""
    try:
        root, found = folder.resolve(), (folder / name).resolve()
        exists = found.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"no path: {_short(name)}") from error
    if not found.is_relative_to(root):
        raise DataError(f"image {_short(name)} is outside the file's folder")
    if not exists:
        raise DataError(f"no image {_short(name)}")
    return found


def read_picture(path: Path) -> Image.Image:
    """Returns a PNG, JPEG or WebP file as an RGB picture, decoded; DataError for anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise DataError(f"image {path.name!r} has {image.width}x{image.height} pixels")
                return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise DataError(f"image {path.name!r} is no {', '.join(FORMATS)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"image {path.name!r} has too many pixels") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"image {path.name!r} cannot be read: {error}") from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
