"""What the pictures have in common. Colours can be told apart by colour-blind readers (P. Tol's bright scheme)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

GREY = "#666666"
#: For things that have no order, with a marker for each: colour alone does not survive a black-and-white print.
PALETTE = ("#BBBBBB", "#66CCEE", "#CCBB44", "#4477AA", "#AA3377", "#228833", "#EE6677")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
#: Tick labels without powers of ten.
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")

#: Ratio of the ends of an axis up to which 1, 2 and 5 of every decade are too few ticks.
_NARROW = 8.0


def plain_log_ticks(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis: 1, 2 and 5 of every decade; round steps where it spans less than one."""
    low, high = sorted(axis.get_view_interval())
    if low > 0 and high < _NARROW * low:
        axis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(PLAIN)
    axis.set_minor_formatter(NullFormatter())


def perplexity_scale(axes: Axes, values: Sequence[float]) -> None:
    """Linear up to a power of ten at or below the median magnitude, logarithmic beyond, with room on either side."""
    sizes = sorted(abs(v) for v in values if v)
    linear = 10.0 ** math.floor(math.log10(sizes[len(sizes) // 2])) if sizes else 1.0
    low, high = min(values), max(values)
    axes.set_yscale("symlog", linthresh=linear, linscale=0.5)
    axes.yaxis.set_major_formatter(PLAIN)
    axes.set_ylim(min(2 * low, -0.1 * linear), max(2 * high, linear))


def smooth(losses: Sequence[float]) -> list[float]:
    """Running mean over a twentieth of the curve: single steps are noise of the batch."""
    width = max(1, len(losses) // 20)
    return [sum(losses[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(losses))]
