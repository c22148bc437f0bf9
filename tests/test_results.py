"""The check that measured numbers come from results/, and that it sees what it is for: each test breaks one thing on
purpose.
"""

import importlib.util
import json
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("results_tool", ROOT / "tools" / "results.py")
results = importlib.util.module_from_spec(spec)
spec.loader.exec_module(results)


@pytest.mark.parametrize("path", results.notebooks(), ids=lambda path: path.name)
def test_every_measured_number_is_shown_by_a_cell(path):
    assert results.check_notebook(path) == []


def notebook(
    folder: Path,
    prose: str,
    code: str = 'd = read("results/x.json")\nd["reward"], d["share"]',
    output: str = "(0.6349808, 0.29)",
) -> Path:
    cell = nbformat.v4.new_code_cell(code, outputs=[nbformat.v4.new_output("execute_result", {"text/plain": output})])
    cells = [
        nbformat.v4.new_markdown_cell("# Title\n\nIn 1962 there were 17 of them."),
        nbformat.v4.new_markdown_cell("## Measured\n\n" + prose),
        cell,
    ]
    path = folder / "chapter.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.mark.parametrize(
    "prose",
    [
        "The reward rose to 0.635, which is 0.63 or 29 % of what was possible.",
        "In the paper it is 0.859. See figure 3.",
        "It is 0.9 in arXiv:2404.11999.",
        "With $\\beta = 0.7$ and `alpha=0.9`, [0.77](x.html) and 2 runs.",
    ],
)
def test_numbers_that_a_cell_shows_pass(prose, tmp_path):
    assert results.check_notebook(notebook(tmp_path, prose)) == []


@pytest.mark.parametrize(
    "prose, number",
    [
        ("The reward rose to 0.636.", "0.636"),
        ("It took 17 minutes.", "17"),
        ("A share of 30 %.", "30%"),
        ("It fell by −0.4.", "0.4"),
    ],
)
def test_a_number_that_no_cell_shows_is_found(prose, number, tmp_path):
    (line,) = results.check_notebook(notebook(tmp_path, prose))
    assert f"{number} is in the prose" in line


@pytest.mark.parametrize(
    "code", ['read("results/x.json"); read("../runs/other.json")', 'read("results/x.json"); compare("toy")']
)
def test_measured_sections_read_only_results(code, tmp_path):
    assert any("may only read results/" in line for line in results.check_notebook(notebook(tmp_path, "Fine.", code)))


def test_a_changed_file_shows_in_what_cells_print_today(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    for reward, wrong in ((0.5, 0), (0.6, 1)):
        (tmp_path / "results" / "x.json").write_text(json.dumps({"reward": reward}))
        code = 'import json\njson.load(open("results/x.json"))["reward"]'
        assert len(results.check_today(notebook(tmp_path, "Fine.", code, "0.5"))) == wrong
