"""Write README.md from nbs/index.ipynb: `python tools/readme.py`; `--check` only says whether it is up to date.

The notebook is the source. Cells marked `#| hide` are left out, `#| echo: false` keeps only what the cell printed, and
links are turned from the notebook's folder to the repository's top.
"""
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK, README = ROOT / "nbs" / "index.ipynb", ROOT / "README.md"
LINK = re.compile(r"(!?\[[^\]]*\]\()(?!https?:|mailto:|#)([^)\s]+)\)")
DIRECTIVE = re.compile(r"^#\|\s*(.*)\n?", re.MULTILINE)


def shown(cell) -> bool:
    "Whether the README shows this cell; takes its directives out of the source on the way."
    if cell.cell_type != "code": return True
    flags = {" ".join(flag.split()) for flag in DIRECTIVE.findall(cell.source)}
    cell.source = DIRECTIVE.sub("", cell.source).strip()
    if "echo: false" in flags: cell.source = ""
    return "hide" not in flags and bool(cell.source or cell.outputs)


def from_top(match: re.Match) -> str:
    "A link as seen from the repository's top instead of nbs/."
    return f"{match[1]}{posixpath.normpath(posixpath.join('nbs', match[2]))})"


def render(notebook: Path = NOTEBOOK) -> str:
    "The README's text."
    nb = nbformat.read(notebook, as_version=4)
    nb.cells = [cell for cell in nb.cells if shown(cell)]
    nb.metadata["language_info"] = {"name": "python"}
    body, _ = MarkdownExporter().from_notebook_node(nb)
    body = re.sub(r"^```python\s+```$", "", body, flags=re.MULTILINE)
    body = re.sub(r"\n\s*\n\s*\n", "\n\n", LINK.sub(from_top, body)).strip()
    return f"<!-- Written from nbs/index.ipynb by tools/readme.py: edit the notebook, then `make prepare`. -->\n\n{body}\n"


def is_current() -> bool:
    "Whether README.md is what the notebook says."
    return README.exists() and README.read_text(encoding="utf-8") == render()


if __name__ == "__main__":
    if "--check" in sys.argv[1:]: sys.exit(0 if is_current() else "README.md is not what nbs/index.ipynb says; mend with: make prepare")
    README.write_text(render(), encoding="utf-8")
