"""The figures."""

from .comparison import bars, compare_figure, curves, frontier_plot, panels
from .slides import Slides, slide
from .style import LOSS_STYLES, contrast, loss_style
from .tokens import token_strip

__all__ = ["LOSS_STYLES", "loss_style", "contrast", "frontier_plot", "curves", "panels", "bars", "compare_figure",
           "token_strip", "Slides", "slide"]
