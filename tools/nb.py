"""One notebook while it is being written: `python tools/nb.py nbs/library/data/02_collate.ipynb`, or `make nb
NB=...`.

Exports all notebooks, looks at the code with ruff, runs it from top to bottom with all its checks,
stores what it printed, and cleans it. What this leaves out, `make prepare` does: the other notebooks, pytest, the
types.
"""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def main(notebook: Path) -> None:
    "The four steps; the first that fails ends it, with its own message."
    if not notebook.exists():
        raise SystemExit(f"there is no notebook {notebook}: make nb NB=nbs/derivations/02_dpo.ipynb")
    steps = [
        [BIN / "nbdev_export"],
        [sys.executable, ROOT / "tools" / "check.py", "lint"],
        [sys.executable, ROOT / "tools" / "run_notebooks.py", notebook],
        [BIN / "nbdev_clean", "--fname", notebook],
    ]
    for step in steps:
        done = subprocess.run(step, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
        if done.returncode:
            raise SystemExit(f"nb: {Path(step[1] if step[0] == sys.executable else step[0]).name} fails on {notebook}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "").resolve())
