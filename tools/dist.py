"""Build the source distribution and the wheel, and try both as a reader would: `python tools/dist.py [folder]`
(default dist).

Each is installed into an environment of its own, and the README's quick start runs there, away from the checkout.
`--tag v1.2.3` checks besides that the tag is the version.
"""
import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (["--help"], ["data", "--list"])


def run(*command: object, cwd: Path = ROOT) -> str:
    "What a command prints; where it fails, its last lines and the end."
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            "\n".join([f"dist: this fails: {command[0]} ...", *(done.stdout + done.stderr).splitlines()[-20:]])
        )
    return done.stdout


def quick_start() -> str:
    "The Python of the README's quick start, up to the trainer, which needs models of the hub."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Quick start$(.*?)(?=^## )", text, re.M | re.S)
    blocks = re.findall(r"^```python\n(.*?)^```", section[1] if section else "", re.M | re.S)
    code = [block for block in blocks if "PreferenceTrainer(" not in block]
    if not code:
        raise SystemExit("dist: README.md has no section `## Quick start` with Python that needs no network")
    return "\n".join(code)


def build(folder: Path, *options: str, source: Path = ROOT) -> tuple[Path, Path]:
    "(source distribution, wheel made from it), in a folder that holds nothing else of the kind."
    for old in [*folder.glob("*.tar.gz"), *folder.glob("*.whl")]:
        old.unlink()
    run(sys.executable, "-m", "build", "--outdir", folder, *options, source)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def build_here(folder: Path) -> tuple[Path, Path]:
    "The same without a network: built in a copy, with the tools that are installed."
    leftovers = shutil.ignore_patterns(
        "__pycache__", ".*", "build", "dist", "*.egg-info", "runs", "nbs", "tests", "tools", "benchmarks", "_*"
    )
    modules = shutil.ignore_patterns("__pycache__")
    tree = folder / "tree"

    def ignored(place: str, names: list[str]) -> set[str]:
        return (leftovers if Path(place) == ROOT else modules)(place, names)
    shutil.copytree(ROOT, tree, ignore=ignored)
    return build(folder, "--no-isolation", source=tree)


def try_out(file: Path) -> None:
    "Install one file into an empty environment, and run the quick start there."
    with tempfile.TemporaryDirectory() as place:
        run(sys.executable, "-m", "venv", Path(place) / "env")
        binaries = Path(place) / "env" / "bin"
        run(binaries / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", file)
        (Path(place) / "quick_start.py").write_text(quick_start(), encoding="utf-8")
        run(binaries / "python", "quick_start.py", cwd=Path(place))
        for arguments in COMMANDS:
            run(binaries / "tokpref", *arguments, cwd=Path(place))
        where = run(binaries / "python", "-c", "import tokpref; print(tokpref.__file__)", cwd=Path(place))
        if not Path(where.strip()).resolve().is_relative_to(Path(place).resolve()):
            raise SystemExit(f"dist: the quick start ran with {where.strip()}, not with what was installed")


def version() -> str:
    "The version that settings.ini says."
    text = (ROOT / "settings.ini").read_text(encoding="utf-8")
    return re.findall(r"^version = (\S+)$", text, re.M)[0]


def main() -> None:
    "Build both and try both."
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "dist")
    parser.add_argument("--tag", default="", help="the tag that a release is made from")
    arguments = parser.parse_args()
    if arguments.tag and arguments.tag != f"v{version()}":
        raise SystemExit(
            f"dist: the tag is {arguments.tag}, and settings.ini says version {version()}: tag v{version()}"
        )
    for file in build(arguments.folder):
        try_out(file)
        print(f"{file.name}: installs, and the quick start runs")


if __name__ == "__main__":
    main()
