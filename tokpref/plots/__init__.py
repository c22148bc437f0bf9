"""The figures."""

from .comparison import (LOSS_STYLES, loss_style, frontier_plot, curves, panels, bars, compare_figure, token_strip,
    Slides, slide)

__all__ = ["LOSS_STYLES", "loss_style", "frontier_plot", "curves", "panels", "bars", "compare_figure", "token_strip",
           "Slides", "slide"]
