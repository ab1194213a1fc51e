"""Curves: small pictures of numbers as inline SVG, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 260, 130
LEFT, RIGHT, TOP, BOTTOM = 48, 8, 22, 20
SMOOTHING = 0.85
"""Share of the last smoothed value that each step keeps."""

Interval = tuple[bool, float | None, float | None, float | None]


def curve(name: str, steps: Sequence[float], values: Sequence[float | None]) -> str:
    """Returns one panel: the values as a light line with gaps where there are none, their average as a dark one."""
    known = [v for v in values if v is not None]
    if not known:
        return ""
    low, high = _widened(min(known), max(known))
    first, last = _widened(min(steps), max(steps)) if min(steps) == max(steps) else (min(steps), max(steps))

    def at(step: float, value: float) -> str:
        x = LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return f"{x:.1f},{y:.1f}"

    raw = "".join(_line(part, at, "var(--a)", 0.35) for part in _unbroken(steps, values))
    smooth = "".join(_line(part, at, "var(--a)", 1.0) for part in _unbroken(steps, _smoothed(values)))
    ticks = "".join(
        f"<text x={LEFT - 4} y={float(at(first, v).split(',')[1]) + 3:.1f} text-anchor=end>{_short(v)}</text>"
        for v in (min(known), max(known))
    )
    axis = (
        f"<path d='M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}' fill=none stroke='var(--line)'/>"
        f"<text x={LEFT} y={HEIGHT - 6}>{min(steps):g}</text>"
        f"<text x={WIDTH - RIGHT} y={HEIGHT - 6} text-anchor=end>step {max(steps):g}</text>"
    )
    title = f"{name}: {_short(known[0])} to {_short(known[-1])}"
    return (
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role=img><title>{escape(title)}</title>"
        f"<text class=name x={LEFT} y=13>{escape(name)}</text>{axis}{ticks}{raw}{smooth}</svg>"
    )


def whiskers(series: Sequence[tuple[str, Sequence[Interval]]]) -> str:
    """Returns dots with intervals on a scale from 0 to 1, a row a name; each value is (filled, mean, low, high)."""
    row, left, right = 34, 110, 640
    height = row * len(series) + 30
    scale = "".join(
        f"<path d='M{left + (right - left) * t / 4} 8V{height - 22}' stroke='var(--line)'/>"
        f"<text x={left + (right - left) * t / 4} y={height - 8} text-anchor=middle>{25 * t}%</text>"
        for t in range(5)
    )
    marks = ""
    for index, (name, values) in enumerate(series):
        y = 24 + index * row
        marks += f"<text class=name x={left - 10} y={y + 4} text-anchor=end>{escape(name)}</text>"
        for filled, mean, low, high in values:
            if mean is None or low is None or high is None:
                continue
            shift, color = (5, "var(--a)") if filled else (-5, "var(--b)")
            a, b, c = (left + (right - left) * v for v in (low, high, mean))
            marks += (
                f"<path d='M{a:.1f} {y + shift}H{b:.1f}' stroke='{color}' stroke-width=2 />"
                f"<circle cx={c:.1f} cy={y + shift} r=4 stroke='{color}' stroke-width=2"
                f" fill='{color if filled else 'var(--paper)'}' />"
            )
    head = f"<svg viewBox='0 0 680 {height}' style='max-width:680px' role=img><title>exact accuracy</title>"
    return f"{head}{scale}{marks}</svg>"


def _line(part: Sequence[tuple[float, float]], at: object, color: str, opacity: float) -> str:
    points = " ".join(at(*p) for p in part)  # type: ignore[operator]
    if len(part) == 1:
        x, y = points.split(",")
        return f"<circle cx={x} cy={y} r=1.5 fill='{color}' opacity={opacity} />"
    return f"<polyline points='{points}' fill=none stroke='{color}' stroke-width=1.5 opacity={opacity} />"


def _unbroken(steps: Sequence[float], values: Sequence[float | None]) -> list[list[tuple[float, float]]]:
    parts: list[list[tuple[float, float]]] = [[]]
    for step, value in zip(steps, values, strict=True):
        if value is None:
            parts.append([])
        else:
            parts[-1].append((step, value))
    return [part for part in parts if part]


def _smoothed(values: Sequence[float | None]) -> list[float | None]:
    """Returns the running average with the bias of its start removed."""
    out: list[float | None] = []
    total = weight = 0.0
    for value in values:
        if value is not None:
            total, weight = SMOOTHING * total + value, SMOOTHING * weight + 1
        out.append(None if value is None else total / weight)
    return out


def _widened(low: float, high: float) -> tuple[float, float]:
    room = (high - low) * 0.05 or abs(low) * 0.1 or 1.0
    return low - room, high + room


def _short(value: float) -> str:
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
