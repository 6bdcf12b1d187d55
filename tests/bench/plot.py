# SPDX-License-Identifier: LGPL-2.1-or-later
"""Line plots with logarithmic axes as an SVG image, written by hand: no library to install."""
import math
from collections import namedtuple
from xml.sax.saxutils import escape

# points: (x, y) pairs; dashed: for a second figure of the same way, in the same colour.
Line = namedtuple("Line", "title points colour dashed")
# ticks: the x values to mark, as (value, text) pairs.
Panel = namedtuple("Panel", "title x_title y_title lines ticks")

WIDTH, HEIGHT = 560, 400  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 46, 56
LEGEND_LINE, LEGEND_COLUMN = 20, 300
# Safe to tell apart for the colour-blind (Okabe and Ito).
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7")


class Scale:
    """A logarithmic scale from values to places on the page."""

    def __init__(self, values, start, end):
        low, high = min(values), max(values)
        if low == high:
            low, high = low / 2, high * 2
        self.low, self.high = math.log10(low), math.log10(high)
        self.start, self.end = start, end

    def __call__(self, value):
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def _number(value):
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def decades(values):
    """Powers of ten that enclose the values, as ticks."""
    first = math.floor(math.log10(min(values)))
    last = max(math.ceil(math.log10(max(values))), first + 1)
    return [(10.0 ** power, _number(10.0 ** power)) for power in range(first, last + 1)]


def _text(x, y, text, anchor="middle", more=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(text)}</text>'


def _panel(panel, offset):
    values = [y for line in panel.lines for _, y in line.points]
    y_ticks = decades(values)
    x = Scale([value for value, _ in panel.ticks], offset + LEFT, offset + WIDTH - RIGHT)
    y = Scale([value for value, _ in y_ticks], HEIGHT - BOTTOM, TOP)
    parts = [_text(offset + LEFT, 24, panel.title, "start", 'font-weight="bold" font-size="15"')]
    for value, text in y_ticks:
        parts.append(f'<path class="grid" d="M{x.start:.1f} {y(value):.1f}H{x.end:.1f}"/>')
        parts.append(_text(x.start - 8, y(value) + 4, text, "end"))
    for value, text in panel.ticks:
        parts.append(f'<path class="grid" d="M{x(value):.1f} {y.start:.1f}V{y.end:.1f}"/>')
        parts.append(_text(x(value), y.start + 18, text))
    parts.append(_text((x.start + x.end) / 2, HEIGHT - 14, panel.x_title))
    middle = (y.start + y.end) / 2
    parts.append(_text(offset + 18, middle, panel.y_title, "middle",
                       f'transform="rotate(-90 {offset + 18} {middle:.1f})"'))
    for line in panel.lines:
        points = sorted(line.points)
        dash = ' stroke-dasharray="6 4"' if line.dashed else ""
        path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{line.colour}" '
                     f'stroke-width="2"{dash}/>')
        fill = "white" if line.dashed else line.colour
        for px, py in points:
            parts.append(f'<circle cx="{x(px):.1f}" cy="{y(py):.1f}" r="3.5" fill="{fill}" '
                         f'stroke="{line.colour}" stroke-width="1.5"><title>{escape(line.title)}: '
                         f'{px:g}, {py:.3g}</title></circle>')
    return parts


def _legend(lines, columns):
    parts = []
    for index, line in enumerate(lines):
        left = LEFT + index % columns * LEGEND_COLUMN
        top = HEIGHT + 8 + index // columns * LEGEND_LINE
        dash = ' stroke-dasharray="6 4"' if line.dashed else ""
        parts.append(f'<path d="M{left} {top}h34" stroke="{line.colour}" stroke-width="2"{dash}/>')
        parts.append(_text(left + 42, top + 4, line.title, "start"))
    return parts


def render(panels, caption):
    """The SVG text of the panels side by side, one legend for all, and a caption below."""
    panels = [panel for panel in panels if any(line.points for line in panel.lines)]
    if not panels:
        raise ValueError("nothing was measured that could be drawn")
    lines = {}
    for panel in panels:
        for line in panel.lines:
            if line.points:
                lines.setdefault(line.title, line)
    width = WIDTH * len(panels)
    columns = 2 if width >= LEFT + 2 * LEGEND_COLUMN else 1
    height = HEIGHT + 8 + math.ceil(len(lines) / columns) * LEGEND_LINE + 30
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
             f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
             "<style>.grid{stroke:#ddd;stroke-width:1}</style>",
             f'<rect width="{width}" height="{height}" fill="white"/>']
    for index, panel in enumerate(panels):
        drawn = panel._replace(lines=[line for line in panel.lines if line.points])
        parts += _panel(drawn, index * WIDTH)
    parts += _legend(list(lines.values()), columns)
    parts.append(_text(LEFT, height - 10, caption, "start", 'fill="#555" font-size="11"'))
    return "\n".join(parts + ["</svg>", ""])
