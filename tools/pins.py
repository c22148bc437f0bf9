"""Write constraints.txt from what is installed here: `python tools/pins.py`, or `make pins`, which tests first.

Every package that settings.ini names gets one exact version for each Python that tokpref supports. Where an installed
version does not support the oldest of them, pip is asked which newest one does. What tools/held.txt holds back stays
as it is there.
"""
import configparser
import json
import subprocess
import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
EXTRAS = ("requirements", "dev_requirements", "site_requirements", "notebooks_requirements")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
HEAD = """\
# One version of each package that settings.ini names, with which `make demo` and `make test` were green. `make pins`
# renews this file: it runs the tests with the newest versions, then writes theirs. settings.ini has the oldest ones.
"""


def wanted() -> dict[str, Requirement]:
    "Every package that settings.ini names, with all that it asks of it."
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    packages: dict[str, Requirement] = {}
    for text in " ".join(config["DEFAULT"][extra] for extra in EXTRAS).split():
        requirement = Requirement(text)
        known = packages.setdefault(requirement.name.lower(), requirement)
        known.specifier &= requirement.specifier
    return packages


def newest(requirement: Requirement, python: str) -> tuple[str, str]:
    "(version, Pythons it supports) of the newest release for that Python."
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps",
                   "--only-binary=:all:", "--python-version", python, "--target", folder, "--report", str(report),
                   f"{requirement.name}{requirement.specifier}"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        metadata = json.loads(report.read_text(encoding="utf-8"))["install"][0]["metadata"]
    version, pythons = metadata["version"], metadata.get("requires_python", "")
    if supports(pythons, python):
        return version, pythons
    older = Requirement(str(requirement))     # an index of plain files does not tell pip what a release supports
    older.specifier &= SpecifierSet(f"<{version}")
    return newest(older, python)


def installed(requirement: Requirement, python: str) -> tuple[str, str]:
    "(version, Pythons it supports) of what is installed here; of the newest release for `python` where it is not."
    try:
        here = distribution(requirement.name)
    except ModuleNotFoundError:
        return newest(requirement, python)
    return Version(here.version).public, str(here.metadata.json.get("requires_python", ""))


def needed(requirement: Requirement, python: str) -> bool:
    "Whether tokpref asks for the package on that Python."
    return requirement.marker is None or requirement.marker.evaluate({"python_version": python})


def supports(pythons: str, python: str) -> bool:
    "Whether a Requires-Python holds for the last patch of a Python: those are the ones people have."
    return SpecifierSet(pythons).contains(f"{python}.99")


def lines(name: str, requirement: Requirement) -> list[str]:
    "The lines of constraints.txt for one package, the version for the newest Pythons first."
    supported = [python for python in PYTHONS if needed(requirement, python)]
    version, pythons = installed(requirement, supported[-1])
    wrong = [python for python in supported if not supports(pythons, python)]
    if not wrong:
        return [f"{name}=={version}"]
    if wrong != list(PYTHONS[:len(wrong)]):
        raise SystemExit(f"{name} {version} supports {pythons}; pins.py only knows what to do for the oldest Pythons")
    first = PYTHONS[len(wrong)]
    pins = [f'{name}=={version}; python_version >= "{first}"']
    for python in reversed(wrong):
        pins.append(f'{name}=={newest(requirement, python)[0]}; python_version == "{python}"')
    return pins


def main() -> None:
    "Write the file, and say what changed."
    before = set(CONSTRAINTS.read_text(encoding="utf-8").splitlines())
    pins = [line for name, requirement in sorted(wanted().items()) for line in lines(name, requirement)]
    CONSTRAINTS.write_text(HEAD + "\n".join(pins) + "\n", encoding="utf-8")
    changed = [line for line in pins if line not in before]
    print("\n".join(changed) or "constraints.txt is as it was")


if __name__ == "__main__":
    main()
