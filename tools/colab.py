"""Chapters in Colab: `python tools/colab.py` writes the cells that open one into every notebook, `--check` only says
whether they are there, and `--run [notebook ...]` runs chapters as Colab would.

The address of the repository is that of settings.ini. TOKPREF_SOURCE in the environment names another source for pip:
a fork, a branch, a wheel. `--run` names a wheel that it builds, and takes each chapter alone to an empty folder and an
environment with nothing but what tokpref asks for. No network is used.
"""
import argparse
import configparser
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path

import dist
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


# As Colab runs them

def needed(*roots: str) -> set[str]:
    "Names of the installed packages that some requirements ask for, and those in turn."
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(root) for root in roots]
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen: continue
        try: asks = map(Requirement, requires(name) or [])
        except PackageNotFoundError: continue       # of another system, or of another Python
        seen.add((name, extras))
        waiting += [part for part in asks
                    if not part.marker or any(part.marker.evaluate({"extra": extra}) for extra in ("", *extras))]
    return {name for name, _ in seen}


def bare_environment(folder: Path) -> Path:
    "The Python of a new environment: what tokpref asks for, a kernel and widgets, from here, but not tokpref."
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout.strip())
    for name in needed(*settings()["requirements"].split(), "ipykernel", "ipywidgets", "pip"):
        for file in distribution(name).files or []:
            top, target = file.parts[0], packages / file.parts[0]
            if top not in ("..", "__pycache__") and not target.exists():
                target.symlink_to(Path(str(distribution(name).locate_file(top))).resolve())
    return python


def run_chapter(path: Path, python: Path, wheel: Path) -> str:
    "What is wrong with a chapter that is opened in Colab: nothing, or its first error in one line."
    with tempfile.TemporaryDirectory() as place:
        content = Path(place) / "content"
        content.mkdir()
        kernel = Path(place) / "kernels" / "colab" / "kernel.json"
        kernel.parent.mkdir(parents=True)
        colab = {"COLAB_RELEASE_TAG": "tried", "TOKPREF_SOURCE": str(wheel), "PIP_NO_INDEX": "1", "PYTHONPATH": "",
                 "MPLBACKEND": "module://matplotlib_inline.backend_inline", "IPYTHONDIR": place}
        command = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        kernel.write_text(json.dumps({"argv": command, "display_name": "Colab", "language": "python", "env": colab}))
        os.environ["JUPYTER_PATH"] = place
        notebook = nbformat.read(path, as_version=4)
        client = NotebookClient(notebook, timeout=1200, kernel_name="colab", resources={"metadata": {"path": content}})
        try: client.execute(stderr=subprocess.DEVNULL)
        except (CellExecutionError, CellTimeoutError) as error:
            said = re.sub(r"\x1b\[[\d;]*m|^-+$", "", str(error), flags=re.M)
            return said.strip().splitlines()[-1].removeprefix("UsageError: ")
    return ""


def try_out(paths: list[Path]) -> list[str]:
    "Builds the wheel and runs chapters with it, each alone in an empty folder; what is wrong, a line a chapter."
    wrong = []
    with tempfile.TemporaryDirectory() as place:
        _, wheel = dist.build_here(Path(place))
        python = bare_environment(Path(place) / "env")
        for path in paths:
            start = time.perf_counter()
            error = run_chapter(path, python, wheel)
            if error: wrong.append(f"{path.relative_to(ROOT)}: {error}")
            print(f"{time.perf_counter() - start:5.0f} s  {wrong[-1] if error else path.relative_to(ROOT)}", flush=True)
    return wrong


def main() -> None:
    "Write the cells, look at them, or run chapters."
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether the cells are there")
    parser.add_argument("--run", nargs="*", type=Path, metavar="NOTEBOOK", help="run these, or all, as Colab would")
    arguments = parser.parse_args()
    if arguments.run is not None:
        wrong = try_out([path.resolve() for path in arguments.run] or chapters())
        print(f"colab: {len(wrong)} chapters fail" if wrong else "colab: every chapter runs to its end")
        sys.exit(bool(wrong))
    wrong = [path for path in chapters() if with_cells(path) != path.read_text(encoding="utf-8")]
    if arguments.check:
        for path in wrong: print(f"{path.relative_to(ROOT)}: not the cells of today; mend with: python tools/colab.py")
        sys.exit(bool(wrong))
    for path in wrong: path.write_text(with_cells(path), encoding="utf-8")


if __name__ == "__main__":
    main()
