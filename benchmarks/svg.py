"""Small line charts as SVG text: panels in rows, both axes logarithmic, one legend."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#b8860b", "#6a4c93", "#444444")
WIDTH, HEIGHT = 250, 210  # of a panel's plotting area, pixels
LEFT, TOP, RIGHT, BOTTOM = 62, 34, 26, 46  # room around it
LEGEND_HEIGHT = 26


@dataclass(frozen=True)
class Panel:
    """One chart: lines[name][i] is the value at positions[i]; all numbers are positive."""

    title: str
    unit: str
    positions: Sequence[float]
    lines: Mapping[str, Sequence[float]]


def chart(panels: Sequence[Panel], columns: int) -> str:
    """The panels as one SVG picture, `columns` in a row, with one legend for all above them."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    cell_width, cell_height = LEFT + WIDTH + RIGHT, TOP + HEIGHT + BOTTOM
    rows = math.ceil(len(panels) / columns)
    width, height = columns * cell_width, LEGEND_HEIGHT + rows * cell_height
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *_legend(colours, width),
    ]
    for number, panel in enumerate(panels):
        x, y = number % columns * cell_width + LEFT, LEGEND_HEIGHT + number // columns * cell_height + TOP
        parts += [f'<g transform="translate({x},{y})">', *_panel(panel, colours), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _legend(colours: Mapping[str, str], width: int) -> list[str]:
    step = width / len(colours)
    parts = []
    for number, (name, colour) in enumerate(colours.items()):
        x = number * step + 20
        parts.append(f'<line x1="{x:.0f}" y1="16" x2="{x + 22:.0f}" y2="16" stroke="{colour}" stroke-width="2.5"/>')
        parts.append(f'<text x="{x + 28:.0f}" y="20">{escape(name)}</text>')
    return parts


def _panel(panel: Panel, colours: Mapping[str, str]) -> list[str]:
    values = [value for line in panel.lines.values() for value in line]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    left, right = math.log(panel.positions[0]), math.log(panel.positions[-1])

    def x(position: float) -> float:
        return WIDTH * (math.log(position) - left) / (right - left)

    def y(value: float) -> float:
        return HEIGHT * (high - math.log10(value)) / (high - low)

    parts = [f'<text x="{WIDTH / 2}" y="-12" text-anchor="middle" font-weight="bold">{escape(panel.title)}</text>']
    for power in range(low, high + 1):
        parts.append(f'<line x1="0" y1="{y(10**power):.1f}" x2="{WIDTH}" y2="{y(10**power):.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="-6" y="{y(10**power) + 4:.1f}" text-anchor="end">{_number(10.0**power)}</text>')
    for position in panel.positions:
        parts.append(f'<line x1="{x(position):.1f}" y1="0" x2="{x(position):.1f}" y2="{HEIGHT}" stroke="#eee"/>')
        parts.append(f'<text x="{x(position):.1f}" y="{HEIGHT + 16}" text-anchor="middle">{_number(position)}</text>')
    parts.append(f'<rect width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888"/>')
    parts.append(
        f'<text transform="translate(-46,{HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(panel.unit)}</text>'
    )
    for name, line in panel.lines.items():
        points = [(x(position), y(value)) for position, value in zip(panel.positions, line, strict=True)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colours[name]}" stroke-width="2"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colours[name]}"/>' for a, b in points]
    return parts


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"
