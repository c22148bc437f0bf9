"""Figures: what they show stays inside them, and every colour can be seen on a white page and on a dark one."""
import doctest
import math
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_hex, to_rgb

from tokpref import plots
from tokpref.losses.registry import BOOK_LOSSES
from tokpref.plots import style

# Colours

WHITE, DARK = "#FFFFFF", "#222222"


def ratio(color: str, background: str) -> float:
    "The contrast of two colours as WCAG 2.1 defines it."
    def luminance(name: str) -> float:
        light = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(name)]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), light, strict=True))
    low, high = sorted((luminance(color), luminance(background)))
    return (high + 0.05) / (low + 0.05)


def test_every_loss_has_a_colour_of_its_own():
    assert set(BOOK_LOSSES) <= set(plots.LOSS_STYLES)
    colors, markers = zip(*plots.LOSS_STYLES.values(), strict=True)
    assert len(set(colors)) == len(set(markers)) == len(plots.LOSS_STYLES)


@pytest.mark.parametrize("background", [WHITE, DARK, "#14171C"])
@pytest.mark.parametrize("name", [*plots.LOSS_STYLES, *(f"my loss {i}" for i in range(9))])
def test_every_series_can_be_seen(name, background):
    for variation in range(5):
        color = plots.loss_style(name, variation)["color"]
        assert ratio(color, background) >= 3, (color, background)
        assert plots.contrast(color, background) == pytest.approx(ratio(color, background))


def test_every_spare_colour_and_every_line_to_compare_with_can_be_seen():
    for color in (*style.SPARE_COLORS, *style.CYCLE, style.LEVEL):
        assert min(ratio(color, WHITE), ratio(color, DARK)) >= 3, color


def test_what_is_drawn_has_the_full_colour():
    for figure in figures():
        lines = [line for ax in figure.axes for line in ax.lines]
        for line in lines:
            assert line.get_alpha() in (None, 1), "a transparent line is paler than its colour"
            color = to_hex(line.get_color())
            assert color.upper() == style.INK or min(ratio(color, WHITE), ratio(color, DARK)) >= 3, color
    assert all(bar.get_alpha() in (None, 1) for bar in plots.bars({"dpo": 1.0}).axes[0].patches)


def test_variants_in_one_figure_differ():
    names = ["tdpo2 (alpha=0.1)", "tdpo2 (alpha=0.5)", "tdpo2 (alpha=1)", "dpo"]
    looks = style.loss_styles(names)
    assert len({look["color"] for look in looks.values()}) == 4


def test_examples_in_docstrings_are_true():
    result = doctest.testmod(style)
    assert result.attempted > 0 and result.failed == 0


# Figures

POINTS = [{"loss": loss, "step": step, "kl": 0.1 * step, "reward": 0.2 * step, "accuracy": 0.6}
          for loss in ("dpo", "tdpo2 (alpha=0.3)", "my own") for step in range(4)]


def figures():
    yield plots.frontier_plot(POINTS, [(0, 0), (1, 2)])
    yield plots.compare_figure(POINTS, [(0, 0), (1, 2)], metric="accuracy", level=0.5)
    yield plots.curves({"dpo": [(0, 1.0), (1, 2.0)]}, ylabel="KL")
    yield plots.bars({"dpo": 1.0, "ipo": -1.0}, {"dpo": 0.1})
    yield plots.token_strip(["$a_$", "Ġb", "\n", ""], [1.0, -1.0, 0.0, 0.5])


def test_every_figure_is_saved_and_leaves_no_window(tmp_path):
    for i, figure in enumerate(figures()):
        figure.savefig(tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").stat().st_size > 3000
        assert isinstance(figure, style.Page)
        png, size = figure._repr_png_()
        width, height = figure.get_size_inches() * style.DPI
        assert size == {"width": round(width), "height": round(height)}
        assert png[:4] == b"\x89PNG" and abs(int.from_bytes(png[16:20], "big") - 2 * width) <= 1
    assert plt.get_fignums() == []


def test_nothing_is_drawn_outside_its_figure():
    for figure in figures():
        figure.canvas.draw()
        width, height = figure.get_size_inches() * figure.dpi
        texts = [text for ax in figure.axes for text in (ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts)]
        for text in texts + [text for legend in figure.legends for text in legend.texts]:
            box = text.get_window_extent()
            inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
            assert inside or not text.get_text(), text.get_text()


def test_long_names_stay_inside_their_figure():
    names = [f"a rather long name of a loss, number {i}" for i in range(6)]
    figure = plots.frontier_plot([{"loss": name, "kl": i, "reward": i} for i, name in enumerate(names)])
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.get_figwidth() * figure.dpi


def test_a_point_that_cannot_be_drawn_is_named():
    for bad, message in (([], "empty"), ([{"loss": "dpo", "kl": 1.0}], "'reward'"),
                         ([{"loss": "dpo", "kl": math.inf, "reward": 0.0}], "kl=inf")):
        with pytest.raises(ValueError, match=message): plots.frontier_plot(bad)
    with pytest.raises(ValueError, match="'accuracy'"):
        plots.compare_figure([{"loss": "dpo", "kl": 1.0, "reward": 0.0}], metric="accuracy")


def test_stored_figures_of_pyplot_stand_in_the_same_frame(tmp_path, monkeypatch):
    import matplotlib
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "tools"))
    import run_notebooks
    (tmp_path / "matplotlibrc").write_text(run_notebooks.matplotlib_settings(), encoding="utf-8")
    read = matplotlib.rc_params_from_file(tmp_path / "matplotlibrc", use_default_template=False)
    with matplotlib.rc_context(style.FRAME): wanted = {name: matplotlib.rcParams[name] for name in style.FRAME}
    colored = {name for name in wanted if "color" in name} | {"axes.prop_cycle"}
    assert set(read) == set(wanted) and all(read[name] == wanted[name] for name in set(wanted) - colored)
    assert [to_hex(c["color"]).upper() for c in read["axes.prop_cycle"]] == list(style.CYCLE)
    for name in colored - {"axes.prop_cycle"}: assert to_hex(read[name]) == to_hex(wanted[name]), name
