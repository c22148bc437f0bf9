"""The cells that open a chapter in Colab: `python tools/colab.py` writes them into every notebook; `--check` only says
whether they are there.

The address of the repository is that of settings.ini. TOKPREF_SOURCE in the environment names another source for pip:
a fork, a branch, a wheel.
"""
import configparser
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INSTALL = """#| hide
import os, sys
if "COLAB_RELEASE_TAG" in os.environ:    # only in Colab, where the package is not installed
    source = os.environ.get("TOKPREF_SOURCE", "git+{repository}")
    !"{{sys.executable}}" -m pip install -q "{{source}}"
    if _exit_code:
        from IPython.core.error import UsageError
        raise UsageError(f"tokpref was not installed: pip could not get it from {{source}}; above it says why")"""
BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{name}/blob/{branch}/{path})"
)
OPENS = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\)")


def settings() -> configparser.SectionProxy:
    "What settings.ini says, with its own names put in."
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def install_cell() -> str:
    "Source of the cell that installs the package in Colab, and does nothing elsewhere."
    return INSTALL.format(repository=settings()["git_url"])


def badge(path: Path) -> str:
    "Markdown of the button that opens a notebook in Colab."
    said = settings()
    name = said["git_url"].removeprefix("https://github.com/")
    return BADGE.format(name=name, branch=said["branch"], path=path.relative_to(ROOT).as_posix())


def chapters() -> list[Path]:
    "All notebooks but the front page, which needs the checkout."
    found = sorted((ROOT / "nbs").rglob("*.ipynb"))
    return [path for path in found if ".ipynb_checkpoints" not in path.parts and path.name != "index.ipynb"]


def with_cells(path: Path) -> str:
    "The text of a notebook whose third cell is the installing one and whose second opens with the button."
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    opening, install = notebook["cells"][1:3]
    said = "".join(opening["source"])
    source = OPENS.sub(lambda _: badge(path), said, count=1), install_cell()
    if ["".join(cell["source"]) for cell in (opening, install)] == list(source): return text
    if not OPENS.match(said) or "pip" not in "".join(install["source"]):
        raise SystemExit(f"{path.relative_to(ROOT)}: the second cell opens with the Colab button, the third installs")
    for cell, lines in zip((opening, install), source, strict=True): cell["source"] = lines.splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    "Write the cells, or look at them."
    wrong = [path for path in chapters() if with_cells(path) != path.read_text(encoding="utf-8")]
    if "--check" in sys.argv[1:]:
        for path in wrong: print(f"{path.relative_to(ROOT)}: not the cells of today; mend with: python tools/colab.py")
        sys.exit(bool(wrong))
    for path in wrong: path.write_text(with_cells(path), encoding="utf-8")


if __name__ == "__main__":
    main()
