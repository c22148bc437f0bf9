"""Import every module on its own: `python tools/imports.py [root]`; one line for each that fails.

All modules are imported by one process. Before each, whatever was imported from this project is forgotten, so that a
module which only works after another one is found; libraries are kept, since loading them is what takes time.
"""
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("tools", "benchmarks", "tests")


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    "(name, file) of every module of the package, and of every file of the other folders."
    for path in sorted((root / "tokpref").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path
    for folder in FOLDERS:
        for path in sorted((root / folder).glob("*.py")):
            yield path.stem, path


def forget(root: Path) -> None:
    "Drop what was imported from the project."
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name == "__main__":
            continue
        if name.partition(".")[0] == "tokpref" or file and Path(file).parent in {root / folder for folder in FOLDERS}:
            del sys.modules[name]


def import_one(name: str, path: Path, root: Path) -> str | None:
    "What is wrong with one module, in one line."
    forget(root)
    paths = list(sys.path)
    sys.path[:0] = [str(path.parent), str(root)] if path.parent.name in FOLDERS else [str(root)]
    try:
        importlib.import_module(name)
    except BaseException as error:    # a test module that asks pytest to skip it raises no Exception
        if type(error).__name__ != "Skipped":
            return f"import {name} fails: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    finally:
        sys.path[:] = paths
    return None


def main(root: Path) -> int:
    "Print every complaint; how many there were."
    warnings.filterwarnings("ignore")
    complaints = [line for name, path in modules(root) if (line := import_one(name, path, root))]
    print(*complaints, sep="\n", end="")
    return len(complaints)


if __name__ == "__main__":
    sys.exit(bool(main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent).resolve())))
