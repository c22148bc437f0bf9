"""The figures that the chapters store: sharp, of one palette, with letters that can be read, and told in numbers."""
import ast
import base64
import html
import json
import random
import re
import struct
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from matplotlib.colors import is_color_like

from tokpref import plots
from tokpref.plots.style import BACKGROUNDS, CYCLE, contrast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from site_cells import Page, directives, slides, unquoted  # noqa: E402

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
TOLD = ("derivations/", "experiments/", "index.ipynb")      # where a caption says what there is to see, in numbers
NO_SERIES = {"axhline", "axvline", "axline", "text", "annotate", "add_patch", "Rectangle", "ListedColormap"}


def drawn() -> list:
    "Every cell that stores a figure, with the notebook it stands in."
    found = []
    for path in NOTEBOOKS:
        for i, cell in enumerate(nbformat.read(path, as_version=4).cells):
            if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
                found.append(pytest.param(path, cell, id=f"{path.relative_to(ROOT / 'nbs').as_posix()}-{i}"))
    return found


FIGURES = drawn()
SLIDES = [p for p in FIGURES if any('class="slides"' in "".join(o.get("data", {}).get("text/html", ""))
                                    for o in p.values[1].outputs)]


@pytest.mark.parametrize("path, cell", FIGURES)
def test_a_stored_figure_has_two_dots_for_a_pixel(path, cell):
    for output in cell.outputs:
        if "image/png" not in output.get("data", {}): continue
        dots = struct.unpack(">II", base64.b64decode(output.data["image/png"])[16:24])
        size = output.metadata.get("image/png", {})
        assert size and 1.95 <= dots[0] / size["width"] <= 2.05, "mend with: make notebooks NB=<this notebook>"


@pytest.mark.parametrize("path, cell", FIGURES)
def test_a_figure_is_described_and_its_caption_has_numbers(path, cell):
    options = directives(nbformat.v4.new_code_cell(cell.source))
    said = unquoted(options.get("fig-cap") or options.get("fig-alt", ""))
    assert unquoted(options.get("fig-alt", "")), "a figure has words for those who cannot see it: #| fig-alt"
    if path.relative_to(ROOT / "nbs").as_posix().startswith(TOLD):
        assert re.search(r"\d", said), "a caption says in numbers what there is to see: #| fig-cap"


@pytest.mark.parametrize("path, cell", SLIDES)
def test_a_slider_is_labelled_in_symbols_and_says_what_to_watch(path, cell):
    figure = next("".join(o.data["text/html"]) for o in cell.outputs if "text/html" in o.get("data", {}))
    page = Page("derivations/01_page.ipynb", "", meta={"title": "", "output-file": "page.html"})
    made = slides(page, figure, {}, "")
    assert not re.search(r">(alpha|beta|gamma|lam|tau)</label>", made)
    assert re.search(r'<p class="watch"><b>Watch:</b> \S.{20,}', made), "slide(..., watch=...)"
    for said, values in re.findall(r'aria-valuetext="([^"]*)" data-said="([^"]*)"', made):
        assert html.unescape(said) in json.loads(html.unescape(values))


NUMERAL = r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[-−]?\d+)?"
CHECKS = {"assert_close", "test_eq", "test_close"}


def numbers(text: str) -> set[float]:
    "The numbers of a text, without their signs."
    return {float(found.rstrip(",").replace(",", "").replace("−", "-")) for found in re.findall(NUMERAL, text)}


def constants(tree: ast.AST) -> set[float]:
    "The numbers in some code, also those within its strings."
    found: set[float] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or isinstance(node.value, bool): continue
        if isinstance(node.value, str): found |= numbers(node.value)
        elif isinstance(node.value, int | float): found.add(abs(float(node.value)))
    return found


def checked(tree: ast.AST) -> set[float]:
    "The numbers that asserts and the like of some code compare with."
    found: set[float] = set()
    for node in ast.walk(tree):
        called = getattr(node, "func", None)
        name = getattr(called, "attr", getattr(called, "id", ""))
        if isinstance(node, ast.Assert) or name in CHECKS: found |= constants(node)
    return found


def unfounded(caption: str, own: ast.AST, trees: list[ast.AST]) -> list[str]:
    "Decimals and percentages of a caption that no assert of its notebook holds, and no setting of its own cell is."
    known = set().union(*map(checked, trees)) | constants(own)
    caption = re.sub(rf"[α-ω] = {NUMERAL}|\bKL {NUMERAL}|95\s?% interval", "", caption)     # settings, and a name
    told = re.findall(rf"({NUMERAL})(\s?%)?", caption)
    measured = [(n, percent) for n, percent in told if percent or re.search(r"\d\.\d|e", n)]
    def stands(number, percent): return any(x in known or percent and x / 100 in known for x in numbers(number))
    return [number for number, percent in measured if not stands(number, percent)]


def parsed(source: str) -> ast.Module: return ast.parse(re.sub(r"^\s*[%!].*$", "", source, flags=re.M))


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.relative_to(ROOT / "nbs").as_posix().startswith(TOLD)],
                         ids=lambda p: p.relative_to(ROOT / "nbs").as_posix())
def test_a_number_of_a_caption_is_one_that_the_notebook_asserts(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    captions = [unquoted(directives(nbformat.v4.new_code_cell(cell.source)).get("fig-cap", "")) for cell in cells]
    trees = [parsed("" if "COLAB_RELEASE_TAG" in cell.source else cell.source) for cell in cells]
    for caption, own in zip(captions, trees, strict=True):
        hints = [word.value.value for call in ast.walk(own) if isinstance(call, ast.Call) for word in call.keywords
                 if word.arg == "watch" and isinstance(word.value, ast.Constant)]
        left = unfounded(" ".join([caption, *hints]), own, trees)
        assert not left, f"let the cell assert it: {left} of “{caption}” {hints}"


def test_the_check_of_captions_sees_numbers():
    own, more = parsed("draw(beta=0.5)\nassert f'{x:.2f}' == '0.47'"), parsed("assert_close(x, 0.73)\ny = 0.31")
    assert unfounded("At β = 0.5 the margin is −0.47, and 73 % of 12 win.", own, [own, more]) == []
    assert unfounded("The margin is 0.48, 0.31 after 20 steps, 5 % less.", own, [own, more]) == ["0.48", "0.31", "5"]


def colors(source: str) -> set[str]:
    "Colours that the code of a figure names, but for those of helping lines, of letters and of boxes."
    found = set()

    def look(node: ast.AST) -> None:
        if isinstance(node, ast.Assert): return     # numbers, not greys
        if isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in NO_SERIES: return
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"#[0-9a-fA-F]{6}|C\d|tab:\w+|0\.\d+", node.value): found.add(node.value)
        for child in ast.iter_child_nodes(node): look(child)

    look(ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.M)))
    return found


def seen(color: str) -> float:
    "The lower contrast of a colour with white paper and with dark paper; `C0` to `C9` are those of the frame."
    if re.fullmatch(r"C\d", color): color = CYCLE[int(color[1]) % len(CYCLE)]
    if color.startswith("0."): return contrast(color, "#FFFFFF")        # a dark page turns black and white over
    return min(contrast(color, "#FFFFFF"), contrast(color, "#222222"))


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.parent.name != "plots"],
                         ids=lambda p: p.relative_to(ROOT / "nbs").as_posix())
def test_every_series_can_be_seen(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type != "code" or not re.search(r"\.(plot|bar|barh|scatter|step|loglog)\(", cell.source): continue
        pale = {color: round(seen(color), 1) for color in colors(cell.source) if seen(color) < 3}
        assert not pale, f"too pale on one of two pages: {pale}"
        small = re.findall(r"fontsize=(\d+(?:\.\d+)?)", cell.source)
        assert all(float(size) >= 8 for size in small), "letters of 8 points and more can be read on a phone"


def test_the_check_of_colours_sees_them():
    code = 'ax.plot(x, y, color="0.8")\nax.axhline(0, color="0.9")\nax.bar(x, y, color=["C1", "tab:cyan"])'
    assert colors(code) == {"0.8", "C1", "tab:cyan"} and all(map(is_color_like, colors(code)))
    assert seen("0.8") < 3 and seen("tab:cyan") < 3 <= seen("C1")
    assert all(contrast(color, background) >= 3 for color in CYCLE for background in BACKGROUNDS.values())


def package_figures(seed: int):
    "Figures of the package with a legend or an inset: three paths that rise, under an optimum near or far above them."
    draw = random.Random(seed)
    points = [{"loss": loss, "step": step, "kl": step * (1 + i) * 0.3 + 0.1 * draw.random(), "accuracy": 0.6,
               "reward": draw.uniform(0.5, 1) * step ** 0.5 + 0.2 * draw.random()}
              for i, loss in enumerate(("dpo", "tdpo2", "a rather long name of a loss")) for step in range(6)]
    lines = {loss: [(p["step"], p["reward"]) for p in points if p["loss"] == loss] for loss in ("dpo", "tdpo2")}
    for height in (1, 30):
        optimum = [(kl / 4, height * (kl / 4) ** 0.5) for kl in range(20)]
        yield plots.frontier_plot(points, optimum)
        yield plots.compare_figure(points, optimum, metric="accuracy")
    yield plots.curves(lines, ylabel="reward")
    yield plots.panels({"one": lines, "two": lines})


@pytest.mark.parametrize("seed", range(4))
def test_legends_and_insets_of_the_package_hide_no_data(seed):
    insets = 0
    for figure in package_figures(seed):
        figure.canvas.draw()
        legends = [*figure.legends, *(ax.get_legend() for ax in figure.axes if ax.get_legend())]
        for box in [legend.get_window_extent() for legend in legends]:
            assert not any(box.overlaps(ax.get_window_extent()) for ax in figure.axes)
        for ax in figure.axes:
            paths = np.concatenate([ax.transData.transform(line.get_xydata()) for line in ax.lines
                                    if line.get_label() != "optimum"]) if ax.child_axes else np.empty((0, 2))
            for inset in ax.child_axes:
                insets += 1
                assert not any(inset.get_window_extent().contains(*point) for point in paths)
    assert insets == 2, "where the optimum is far away there is an inset"
