"""Check that the numbers shown come from results/: `python tools/results.py [notebook ...]`; `--stored` runs nothing.

A section of an experiment chapter or of the front page (from one `##` heading to the next) that reads a file of
results/ is a measured section. There,

- code reads no other file of numbers than those of results/, and starts no run;
- what its cells print is what they print today, from the files as they are (left out with `--stored`);
- every numeral in its prose, rounded as it is written, is among the numbers that its cells print or call by name.

Sentences that name a paper, or have an arXiv number, speak of the paper's numbers and are left alone; so are
formulas, code and links.
"""
import os
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NUMBER = re.compile(r"(?<![\w.])[-−]?\d[\d,]*(?:\.\d+)?(?![\w.]*\w)(?:\s?%)?")
NOT_PROSE = re.compile(
    r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$\n]*\$|!?\[[^\]]*\]\([^)]*\)|@eq-[\w-]+|\{#[^}]*\}|^#[^\n]*$|^\|[^\n]*$",
    re.S | re.M,
)
READS = re.compile(r"results/[\w.-]+\.json|\bmeasured_runs\(")
NAMED = re.compile(r"\b(?:figure|table|section|chapter|equation|seed|GPT-|step)s?\s*\d+", re.I)
DATA_FILE = re.compile(r"""["']([^"'\n]*\.(?:json|jsonl|csv|parquet|npz))["']""")


def sections(cells: list) -> list[list]:
    "Cells grouped by `##` headings; a heading in the middle of a cell counts for the whole cell."
    groups = [[]]
    for cell in cells:
        if cell.cell_type == "markdown" and re.search(r"^## ", cell.source, re.M): groups.append([])
        groups[-1].append(cell)
    return groups


def measured(group: list) -> bool:
    "Whether code of a section reads a file of results/; one that exports code only shows how reading works."
    if any(re.search(r"^#\|\s*export", cell.source, re.M) for cell in group): return False
    return any(cell.cell_type == "code" and READS.search(cell.source) for cell in group)


def printed(cell) -> str:
    "What a cell shows as text."
    shown = (
        o.get("text") or o.get("data", {}).get("text/markdown") or o.get("data", {}).get("text/plain", "")
        for o in cell.get("outputs", [])
        if o.get("name") != "stderr"
    )
    return "\n".join("".join(text) for text in shown)


def numbers(text: str) -> set[float]:
    "All numbers of a text."
    return {
        float(n.replace(",", "").replace("−", "-"))
        for n in re.findall(r"(?<![\w.])[-−]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", text)
    }


def claims(prose: str) -> list[str]:
    "The numerals of a text that say something measured: not of formulas, code, links, papers, or names as in figure 3."
    text = NOT_PROSE.sub(" ", prose)
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])|\n\s*\n", text)
    own = (NAMED.sub(" ", s) for s in sentences if not re.search(r"arXiv|\bpapers?\b|paper's", s))
    return [re.sub(r"[-−,\s]", "", n) for s in own for n in NUMBER.findall(s)]


def backed(numeral: str, known: set[float]) -> bool:
    "Whether a numeral is a known number, rounded as it is written, or a percentage a known share; 0 to 2 need none."
    digits, percent = numeral.rstrip("%"), numeral.endswith("%")
    if numeral in ("0", "1", "2"): return True
    decimals = len(digits.partition(".")[2])
    return any(
        abs(round(abs(n) * scale, decimals) - float(digits)) < 1e-9
        for n in known
        for scale in ((1, 100) if percent else (1,))
    )


def check_notebook(path: Path) -> list[str]:
    "What is wrong with the stored notebook."
    wrong, name = [], path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
    for group in filter(measured, sections(nbformat.read(path, as_version=4).cells)):
        code, prose = ([c for c in group if c.cell_type == kind] for kind in ("code", "markdown"))
        for cell in code:
            others = [f for f in DATA_FILE.findall(cell.source) if "results/" not in f]
            if others or re.search(r"\bcompare\(", cell.source):
                wrong.append(
                    f"{name}: a measured section may only read results/, not: {cell.source.splitlines()[0][:70]}"
                )
        known = numbers("\n".join(printed(c) for c in code)) | numbers("\n".join(c.source for c in code))
        for cell in prose:
            wrong += [
                f"{name}: {n} is in the prose, but no cell of its section shows it: "
                f"{' '.join(cell.source.split())[:70]}..."
                for n in claims(cell.source)
                if not backed(n, known)
            ]
    return wrong


def check_today(path: Path) -> list[str]:
    "Cells of measured sections that print something else when they are run now."
    from nbclient import NotebookClient
    stored, nb = (nbformat.read(path, as_version=4) for _ in range(2))
    os.environ["TOKPREF_RESULTS_ONLY"] = "1"
    if not any(map(measured, sections(nb.cells))): return []
    NotebookClient(
        nb, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    wrong = []
    for before, after in zip(sections(stored.cells), sections(nb.cells), strict=True):
        if not measured(before): continue
        wrong += [
            f"{path.relative_to(ROOT)}: not what results/ says today: {a.source.splitlines()[0][:70]}; "
            f"mend with: make notebooks NB={path.relative_to(ROOT)}"
            for a, b in zip(before, after, strict=True)
            if a.cell_type == "code" and printed(a) != printed(b)
        ]
    return wrong


def notebooks() -> list[Path]:
    "The front page and every experiment chapter."
    return [ROOT / "nbs" / "index.ipynb", *sorted((ROOT / "nbs" / "experiments").rglob("*.ipynb"))]


if __name__ == "__main__":
    paths = [Path(a).resolve() for a in sys.argv[1:] if not a.startswith("--")] or notebooks()
    wrong = [
        line
        for path in paths
        for check in ([check_notebook] if "--stored" in sys.argv else [check_notebook, check_today])
        for line in check(path)
    ]
    print("\n".join(wrong) or f"results: every number of {len(paths)} notebooks is in results/")
    sys.exit(bool(wrong))
