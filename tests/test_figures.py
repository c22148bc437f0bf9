"""The figures that the chapters store: sharp, of one palette, with letters that can be read, and told in numbers."""
import ast
import base64
import html
import json
import re
import struct
import sys
from pathlib import Path

import nbformat
import pytest
from matplotlib.colors import is_color_like

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


def colors(source: str) -> set[str]:
    "Colours that the code of a figure names, but for those of helping lines, of letters and of boxes."
    found = set()

    def look(node: ast.AST) -> None:
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
