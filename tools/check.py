"""What must hold before any test runs: `python tools/check.py [step ...]`, steps: exported readme rooms lint imports
types.

Nothing here changes the working tree: notebooks are exported and cleaned in a copy, and the copy is compared. Every
complaint is one line that says how to mend it; the exit status is 1 if there was any.
"""
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

import readme
import rooms

CODE = ("tokpref", "tests", "tools", "benchmarks")
ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SKIP = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", ".last_checked")


def files(folder: Path, pattern: str) -> dict[str, bytes]:
    "Path inside `folder` -> content, of every file that matches and is not a leftover."
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob(pattern))
            if not any(part.startswith(".") or part == "__pycache__" for part in p.relative_to(folder).parts)}


def copy_sources(root: Path, copy: Path) -> None:
    "The notebooks, the settings and the modules written by hand: all that an export needs."
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(root / name, copy)
    shutil.copytree(root / "nbs", copy / "nbs", ignore=SKIP, symlinks=True)
    for module in (path for name in ("__init__.py", "__main__.py") for path in (root / "tokpref").rglob(name)):
        target = copy / module.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(module, target)


def exported(root: Path = ROOT) -> list[str]:
    "tokpref/ is what the notebooks export, and the notebooks are clean."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve()
        copy_sources(root, copy)
        for tool in ("nbdev_export", "nbdev_clean"):
            done = subprocess.run(
                [BIN / tool], cwd=copy, capture_output=True, text=True, env=os.environ | {"IN_TEST": ""}
            )
            if done.returncode:
                return [f"{tool} fails: {(done.stderr or done.stdout).strip().splitlines()[-1]}"]
        return compare(root, copy)


def compare(root: Path, copy: Path) -> list[str]:
    "Complaints about each file that differs between the working tree and its freshly exported and cleaned copy."
    here, fresh = files(root / "tokpref", "*.py"), files(copy / "tokpref", "*.py")
    notebooks, cleaned = files(root / "nbs", "*.ipynb"), files(copy / "nbs", "*.ipynb")
    lines = [
        f"tokpref/{name} comes from no notebook; delete it, or export it from one"
        for name in here.keys() - fresh.keys()
    ]
    lines += [f"tokpref/{name} is missing; mend with: make prepare" for name in fresh.keys() - here.keys()]
    lines += [f"tokpref/{name} is not what its notebook exports; edit the notebook, then: make prepare"
              for name in here.keys() & fresh.keys() if here[name] != fresh[name]]
    lines += [
        f"nbs/{name} is not clean; mend with: make prepare" for name in notebooks if notebooks[name] != cleaned[name]
    ]
    return sorted(lines)


def lint(root: Path = ROOT) -> list[str]:
    "ruff is content with the package, tests, tools and benchmarks."
    folders = [name for name in (*CODE, "setup.py") if (root / name).exists()]
    done = subprocess.run([BIN / "ruff", "check", "--no-cache", "--output-format=concise", *folders],
                          cwd=root, capture_output=True, text=True)
    return [line for line in (done.stdout + done.stderr).splitlines() if line.strip()] if done.returncode else []


def imports(root: Path = ROOT) -> list[str]:
    "Each module imports on its own."
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "imports.py", root], cwd=root, capture_output=True, text=True
    )
    return done.stdout.splitlines() or ([done.stderr.strip().splitlines()[-1]] if done.returncode else [])


def types(root: Path = ROOT) -> list[str]:
    "pyright is content with the same files. Where nothing changed since it last was, that is known without asking it."
    digest = sources_digest(root)
    known = root / ".typed"
    if known.exists() and known.read_text(encoding="utf-8") == digest:
        return []
    done = subprocess.run([sys.executable, "-m", "pyright", "--outputjson"], cwd=root, capture_output=True, text=True)
    if not done.stdout.startswith("{"):
        reason = (done.stderr or done.stdout).strip().splitlines() or ["it says nothing"]
        line = f"pyright cannot run, so types are not checked (it needs Node, or the network once): {reason[-1]}"
        if os.environ.get("CI"):
            return [line]
        print(f"  {line}")
        return []
    complaints = json.loads(done.stdout)["generalDiagnostics"]
    lines = [
        f"{Path(c['file']).relative_to(root).as_posix()}:{c['range']['start']['line'] + 1}: "
        f"{c['message'].splitlines()[0]} ({c.get('rule', 'syntax')})"
        for c in complaints
        if c["severity"] == "error"
    ]
    if not lines:
        known.write_text(digest, encoding="utf-8")
    return lines


def sources_digest(root: Path) -> str:
    "What pyright's verdict depends on: the files it reads, its settings, the versions installed."
    digest = hashlib.sha256()
    for path in [root / "pyproject.toml", *(path for folder in CODE for path in sorted((root / folder).rglob("*.py")))]:
        digest.update(path.as_posix().encode() + path.read_bytes())
    digest.update(repr(sorted((d.name, d.version) for d in distributions())).encode())
    return digest.hexdigest()


def readme_matches() -> list[str]:
    "README.md is what nbs/index.ipynb says."
    return [] if readme.is_current() else ["README.md is not what nbs/index.ipynb says; mend with: make prepare"]


STEPS = {
    "exported": exported,
    "readme": readme_matches,
    "rooms": rooms.check,
    "lint": lint,
    "imports": imports,
    "types": types,
}


def main(names: list[str]) -> int:
    complaints = 0
    for name in names or STEPS:
        lines = STEPS[name]()
        print(f"{name}: {'ok' if not lines else ''}".rstrip(), *(f"  {line}" for line in lines), sep="\n", flush=True)
        complaints += len(lines)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
