"""One notebook while it is being written: `python tools/nb.py nbs/library/data/02_collate.ipynb`, or `make nb
NB=...`.

Exports all notebooks, looks at what this one exports with ruff, runs it from top to bottom with all its checks,
stores what it printed, and cleans it. What this leaves out, `make prepare` does: the other notebooks, pytest, the
types.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def exported(notebook: Path) -> list[str]:
    "The module that a notebook exports, if it does."
    text = notebook.read_text(encoding="utf-8")
    homes = re.findall(r"#\|\s*default_exp ([\w.]+)", text)
    return [f"tokpref/{home.replace('.', '/')}.py" for home in homes]


def main(notebook: Path) -> None:
    "The four steps; the first that fails ends it, with its own message."
    if not notebook.exists():
        raise SystemExit(f"there is no notebook {notebook}: make nb NB=nbs/derivations/02_dpo.ipynb")
    steps = [[BIN / "nbdev_export"], [sys.executable, ROOT / "tools" / "run_notebooks.py", notebook],
             [BIN / "nbdev_clean", "--fname", notebook]]
    if modules := exported(notebook):
        steps.insert(1, [BIN / "ruff", "check", "--no-cache", "--output-format=concise", *modules])
    for step in steps:
        done = subprocess.run(step, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
        if done.returncode:
            raise SystemExit(f"nb: {Path(step[1] if step[0] == sys.executable else step[0]).name} fails on {notebook}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "").resolve())
