"""The style of the report's pictures: colours, line styles, sizes, and text that the font can draw."""

import io
import unicodedata
from collections.abc import Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .run import Run
from .table import minus

#: Pixels of a PNG per inch; an inch is 96 CSS pixels on the page.
DPI = 160


@dataclass(frozen=True)
class Shape:
    """The form that pictures are drawn in: width in inches, and the most panels side by side."""

    width: float
    columns: int


#: For a desk, and for a phone: panels stacked, so that letters keep their size.
WIDE, NARROW = Shape(12.0, 3), Shape(3.84, 1)
_shape: ContextVar[Shape] = ContextVar("shape", default=WIDE)
#: Okabe and Ito's colours without yellow, which is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1.5, 1.2)), (0, (8, 1.5, 1, 1.5, 1, 1.5)))
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
#: Outcomes of a pair: label, colour, and a marker for pictures in which position does not show the outcome.
OUTCOMES = {
    "prefers": ("prefers chosen (δ_θ > 0)", "#0072B2", "o"),
    "in_u": ("in U (δ_ref < δ_θ < 0)", "#D55E00", "^"),
    "neither": ("neither: δ_θ ≤ 0 and not above δ_ref", "#000000", "x"),
}
U_SHADE, QUIET = "#F5C9A8", "#666666"

_SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    # Names of runs may contain $.
    "text.parse_math": False,
}

#: Titles and labels stand at the axes, right of the numbers, and have to end within a narrow picture.
_IN_NARROW: dict[Any, Any] = {"axes.titlesize": 9, "axes.labelsize": 8.5}


@contextmanager
def drawing(shape: Shape = WIDE):
    """Draws in a shape, with matplotlib's defaults and the report's settings; ignores the user's matplotlibrc."""
    before = _shape.set(shape)
    try:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_SETTINGS | (_IN_NARROW if shape is NARROW else {}))
            yield
    finally:
        _shape.reset(before)


def canvas(height: float) -> Figure:
    """An empty figure of the shape's width; `height` in inches."""
    return Figure(figsize=(_shape.get().width, height), dpi=DPI, layout="constrained")


def png(figure: Figure) -> bytes:
    """The figure as a PNG of `DPI` pixels per inch; the same figure gives the same bytes."""
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=DPI, metadata={"Software": None})
    return held.getvalue()


def columns_of(count: int) -> int:
    """How many of `count` panels stand side by side."""
    return min(count, _shape.get().columns)


def panels(count: int, heights: tuple[float, float, float] = (5.6, 4.9, 4.3)) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, at most three in a row; `heights`: inches of a row with one, two and three panels."""
    columns = columns_of(count)
    rows = -(-count // columns)
    # A narrow panel is as wide as one of three.
    height = heights[columns - 1] if _shape.get() is WIDE else heights[2]
    figure = canvas(height * rows + 0.3)
    axes = [figure.add_subplot(rows, columns, place + 1) for place in range(count)]
    return figure, axes


def legend(figure: Figure, handles: Sequence[Artist], columns: int) -> None:
    """Sets a legend of at most `columns` columns below the panels; a narrow figure grows by the rows that this adds."""
    columns = min(columns, len(handles))
    fitting = min(columns, _shape.get().columns) if _shape.get() is NARROW else columns
    more = -(-len(handles) // fitting) - -(-len(handles) // columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * more)
    figure.legend(handles=list(handles), loc="outside lower center", ncols=fitting)


def plain_ticks(axes: Axes, x: bool = True, y: bool = True) -> None:
    """Sets few ticks with full numbers, so that labels do not overlap and no factor hides in a corner of the axes."""
    # A narrow panel has room for few long numbers side by side.
    across = 6 if _shape.get() is WIDE else 4
    for axis, wanted, most in ((axes.xaxis, x, across), (axes.yaxis, y, 6)):
        if wanted:
            axis.set_major_locator(MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10]))
            axis.set_major_formatter(FuncFormatter(lambda value, _: minus(f"{value:.6g}")))


@cache
def _font() -> FT2Font:
    return FT2Font(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"))


@cache
def _advance(char: str) -> float:
    """The width of a character, in font sizes."""
    font = _font()
    font.set_size(64, 72)
    return font.load_char(ord(char)).linearHoriAdvance / 65536 / 64


def width_of(text: str) -> float:
    """The width of a drawable text, in font sizes."""
    return sum(map(_advance, text))


def drawable(text: str, limit: float = 19.0) -> str:
    """`text` on one line, with the middle cut out beyond a width of `limit` font sizes, and □ for missing glyphs.

    The default fits a panel's title and a column of the legend, with three side by side.
    """
    text = "".join(
        "□" if unicodedata.category(char)[0] in "CZ" and char != " " or not _font().get_char_index(ord(char)) else char
        for char in text
    )
    if width_of(text) <= limit:
        return text
    ends = limit / 2 - _advance("…") / 2
    head = next(count for count in range(len(text)) if width_of(text[: count + 1]) > ends)
    tail = next(count for count in range(len(text)) if width_of(text[len(text) - count - 1 :]) > ends)
    return f"{text[:head]}…{text[len(text) - tail :]}"


def run_title(run: Run) -> str:
    """A run's title in pictures: its letter and its shortened name."""
    return f"{run.letter}  {drawable(run.name)}"


def run_style(run: Run) -> dict:
    """Colour, line style and marker of a run. No two of twelve runs share colour and line style, or colour and marker."""
    place = ord(run.letter) - ord("A")
    colour, hollow = COLOURS[place % len(COLOURS)], place >= len(COLOURS)
    return {
        "color": colour,
        "linestyle": LINES[place % len(LINES)],
        "marker": MARKERS[place % len(MARKERS)],
        "markerfacecolor": "white" if hollow else colour,
        "markeredgecolor": colour if hollow else "white",
        "markeredgewidth": 1.4 if hollow else 0.8,
    }
