"""Write README.md from nbs/index.ipynb: `python tools/readme.py`; `--check` only says whether it is up to date.

The notebook is the source. Cells marked `#| hide` are left out, `#| echo: false` keeps only what the cell printed, and
what it drew becomes a file of nbs/images/. Cells from one that begins with `<!-- site only -->` to the next that begins
with `<!-- also in the README -->` stand on the site alone. Links to chapters lead to the site, all others to the file.
"""
import base64
import posixpath
import re
import sys
from pathlib import Path

import colab
import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK, README = ROOT / "nbs" / "index.ipynb", ROOT / "README.md"
LINK = re.compile(r"(!?\[[^\]]*\]\()(?!https?:|mailto:)([^)\s]+)\)")
MARK = re.compile(r"<!-- (site only|also in the README) -->\n*")
DIRECTIVE = re.compile(r"^#\|\s*(.*)\n?", re.MULTILINE)


def shown(cell) -> bool:
    "Whether the README shows this cell; takes its directives out of the source on the way."
    if cell.cell_type != "code": return True
    flags = {" ".join(flag.split()) for flag in DIRECTIVE.findall(cell.source)}
    alt = next((flag.removeprefix("fig-alt:").strip(" \"") for flag in flags if flag.startswith("fig-alt:")), "")
    cell.source, cell.metadata["alt"] = DIRECTIVE.sub("", cell.source).strip(), alt
    if "echo: false" in flags: cell.source = ""
    return "hide" not in flags and bool(cell.source or cell.outputs)


def pictures(nb) -> dict[Path, bytes]:
    "Figures that cells drew, as files; in the notebook, links to these files take their place."
    found = {}
    for i, cell in enumerate(nb.cells):
        png = next((o.data["image/png"] for o in cell.get("outputs", []) if "image/png" in o.get("data", {})), None)
        if not png: continue
        path = NOTEBOOK.parent / "images" / f"front-{len(found) + 1}.png"
        found[path] = base64.b64decode(png)
        nb.cells[i] = nbformat.v4.new_markdown_cell(f"![{cell.metadata['alt']}](images/{path.name})")
    return found


def for_readme(cells: list) -> list:
    "The cells that do not stand on the site alone, without the marks that say so."
    kept, on = [], True
    for cell in cells:
        mark = MARK.match(cell.source)
        if mark: on, cell.source = mark[1] != "site only", cell.source[mark.end():]
        if on: kept.append(cell)
    return kept


def page(notebook: str) -> str:
    "The address on the site of a notebook, given by its path below nbs/; nbdev leaves the number of its name out."
    folder, name = posixpath.split(notebook.removesuffix(".ipynb"))
    said = colab.settings()
    file = re.sub(r"^\d+[a-zA-Z0-9]*_", "", name) + ".html"
    return posixpath.join(said["doc_host"] + said["doc_baseurl"], folder, file)


def from_top(match: re.Match) -> str:
    "A link as the README needs it: to a chapter on the site, else to a file as seen from the repository's top."
    target, _, anchor = match[2].partition("#")
    if not target or target.endswith(".ipynb"):
        return f"{match[1]}{page(target or NOTEBOOK.name)}{'#' + anchor if anchor else ''})"
    path = posixpath.normpath(posixpath.join("nbs", target))
    if (ROOT / path).is_symlink(): path = (ROOT / path).resolve().relative_to(ROOT).as_posix()
    return f"{match[1]}{path})"


def render(notebook: Path = NOTEBOOK) -> tuple[str, dict[Path, bytes]]:
    "The README's text and its pictures."
    nb = nbformat.read(notebook, as_version=4)
    nb.cells = [cell for cell in for_readme(nb.cells) if shown(cell)]
    drawn = pictures(nb)
    nb.metadata["language_info"] = {"name": "python"}
    body, _ = MarkdownExporter().from_notebook_node(nb)
    body = re.sub(r"^```python\s+```$", "", body, flags=re.MULTILINE)
    body = re.sub(r"\n\s*\n\s*\n", "\n\n", LINK.sub(from_top, body)).strip()
    return (
        "<!-- Written from nbs/index.ipynb by tools/readme.py: edit the notebook, then `make prepare`. -->"
        f"\n\n{body}\n",
        drawn,
    )


def is_current() -> bool:
    "Whether README.md and its pictures are what the notebook says."
    text, drawn = render()
    return all(path.exists() and path.read_bytes() == data for path, data in {README: text.encode(), **drawn}.items())


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(0 if is_current() else "README.md is not what nbs/index.ipynb says; mend with: make prepare")
    text, drawn = render()
    for path, data in {README: text.encode(), **drawn}.items(): path.write_bytes(data)
