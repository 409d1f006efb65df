"""Charts as SVG: a few hundred lines of text that any width and any page can show, drawn without a library.

Colours of series are Okabe & Ito's (2008), which people with any colour vision can tell apart; ink and paper are
variables of the page, or those of a light page in a picture that stands alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

BLUE, SKY, GREEN, ORANGE, VERMILION, PINK, YELLOW, GREY = (
    "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#f0e442", "#a9afb6"
)  # fmt: skip
ALONE = {"ink": "#1f2328", "soft": "#59636e", "line": "#d5d9de", "paper": "#ffffff", "first": BLUE, "second": VERMILION}
"""What the variables are in a picture that stands alone."""
FONT = "font-family=\"system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif\""
Told = Callable[[float], str]


@dataclass(frozen=True)
class Frame:
    """The place of a plot within its picture, in pixels, and the numbers at its borders."""

    left: float
    top: float
    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]
    font: float = 12

    def at(self, x: float, y: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = self.x, self.y
        return (
            self.left + self.width * (x - x0) / ((x1 - x0) or 1),
            self.top + self.height * (1 - (y - y0) / ((y1 - y0) or 1)),
        )

    @property
    def bottom(self) -> float:
        return self.top + self.height

    @property
    def right(self) -> float:
        return self.left + self.width


def svg(parts: Sequence[str], width: float, height: float, words: str, hover: Sequence[tuple[float, str]] = ()) -> str:
    """A picture of these parts.

    Args:
        words: what it shows, for those who cannot see it.
        hover: places along x, in pixels, and what a reader who points there is told.
    """
    points = f" data-hover='{escape(json.dumps([[round(x, 1), told] for x, told in hover]))}'" if hover else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" {FONT}'
        f"{points}><title>{escape(words)}</title>{''.join(parts)}</svg>"
    )


def alone(picture: str, width: float, height: float) -> bytes:
    """The picture as a file of its own, on a light page."""
    for name, colour in ALONE.items():
        picture = picture.replace(f"var(--{name})", colour)
    ground = f'<rect width="{width:g}" height="{height:g}" fill="{ALONE["paper"]}"/>'
    return (
        picture.replace("</title>", f"</title>{ground}", 1)
        .replace("<svg ", f'<svg width="{width:g}" height="{height:g}" ', 1)
        .encode("utf-8", "backslashreplace")
    )


def text(
    x: float, y: float, words: str, *, size: float = 12, anchor: str = "start", fill: str = "ink", bold: bool = False
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    colour = fill if fill.startswith("#") else f"var(--{fill})"
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" text-anchor="{anchor}"{weight} '
        f'fill="{colour}">{escape(words)}</text>'
    )


def line(points: Sequence[tuple[float, float]], colour: str, *, dash: str = "", width: float = 2) -> str:
    if not points:
        return ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}"{dashes}/>'


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from `low` to `high`, about so many."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    rough = span / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def axes(
    frame: Frame, *, x_label: str = "", y_label: str = "", x_ticks: Sequence[float] = (), y_ticks: Sequence[float] = ()
) -> list[str]:
    """Grid, numbers and labels; numbers of x below, of y at the left."""
    parts = []
    for tick in y_ticks:
        _, y = frame.at(frame.x[0], tick)
        parts.append(
            f'<line x1="{frame.left:.1f}" x2="{frame.right:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
        )
        parts.append(
            text(frame.left - 6, y + 0.35 * frame.font, f"{tick:g}", size=frame.font, anchor="end", fill="soft")
        )
    for tick in x_ticks:
        x, _ = frame.at(tick, frame.y[0])
        parts.append(
            text(x, frame.bottom + 1.4 * frame.font, f"{tick:g}", size=frame.font, anchor="middle", fill="soft")
        )
    parts.append(
        f'<line x1="{frame.left:.1f}" x2="{frame.right:.1f}" y1="{frame.bottom:.1f}" y2="{frame.bottom:.1f}" '
        'stroke="var(--soft)"/>'
    )
    if x_label:
        parts.append(
            text(frame.right, frame.bottom + 2.7 * frame.font, x_label, size=frame.font, anchor="end", fill="soft")
        )
    if y_label:
        parts.append(text(frame.left - 6, frame.top - 0.8 * frame.font, y_label, size=frame.font, fill="soft"))
    return parts


def areas(
    frame: Frame, times: Sequence[float], values: Mapping[str, Sequence[float]], colours: Mapping[str, str]
) -> list[str]:
    """Stacked steps: what holds from each time to the next, the first series lowest."""
    lower = [0.0] * len(times)
    parts = []
    for name, of_name in values.items():
        upper = [low + value for low, value in zip(lower, of_name, strict=True)]
        if any(of_name):
            left, right = frame.at(times[0], 0)[0], frame.at(frame.x[1], 0)[0]
            edges = [frame.at(time, 0)[0] for time in times]
            above = _stairs(edges, [frame.at(0, value)[1] for value in upper])
            below = _stairs(edges, [frame.at(0, value)[1] for value in lower])
            path = f"M{left:.1f} {frame.bottom:.1f}{_drawn(above)}H{right:.1f}V{below[-1][1]:.1f}"
            path += "".join(f"H{x:.1f}V{y:.1f}" for (x, _), (_, y) in zip(below[:0:-1], below[-2::-1], strict=True))
            parts.append(f'<path d="{path}H{left:.1f}Z" fill="{colours[name]}"/>')
        lower = upper
    return parts


def _stairs(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    """Where the height changes by what can be seen, and to what."""
    found = [(xs[0], ys[0])]
    for x, y in zip(xs[1:], ys[1:], strict=True):
        if abs(y - found[-1][1]) >= 0.05:
            found.append((x, y))
    return found


def _drawn(stairs: Sequence[tuple[float, float]]) -> str:
    return "".join(f"H{x:.1f}V{y:.1f}" for x, y in stairs)


def legend(
    names: Mapping[str, str], left: float, top: float, right: float, font: float = 12
) -> tuple[list[str], float]:
    """A square of its colour and a name, wrapped before `right`; and where the legend ends below."""
    parts, x, y = [], left, top
    for name, colour in names.items():
        width = 1.9 * font + 0.56 * font * len(name)
        if x > left and x + width > right:
            x, y = left, y + 1.5 * font
        side = 0.85 * font
        parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{side:g}" height="{side:g}" fill="{colour}"/>')
        parts.append(text(x + 1.2 * font, y + 0.8 * font, name, size=font))
        x += width
    return parts, y + 1.5 * font
