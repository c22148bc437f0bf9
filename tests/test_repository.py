"""The house rules that no single chapter can check: packaging, notebooks, names, and the checks themselves."""
import ast
import configparser
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import check  # noqa: E402
import readme  # noqa: E402

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
CHAPTERS = [p for p in NOTEBOOKS if p.name != "index.ipynb"]
DERIVATIONS = [p for p in NOTEBOOKS if p.parent.name == "derivations" and not p.name.startswith("00")]
MODULES = sorted(p for p in (ROOT / "tokpref").rglob("*.py") if p.name not in ("__init__.py", "__main__.py", "_modidx.py"))
SETTINGS = configparser.ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = SETTINGS["DEFAULT"]
PATH = re.compile(r"(?<![\w.])/(?:work|root|home|tmp|Users|usr|opt|content|var)/\w")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def every(paths):
    return pytest.mark.parametrize("path", paths, ids=name)


def cells(path: Path, kind: str) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


# Notebooks

@every(CHAPTERS)
def test_a_chapter_opens_with_a_title_and_a_promise(path):
    lines = nbformat.read(path, as_version=4).cells[0].source.splitlines()
    assert re.match(r"# \S", lines[0]), "the first line of the first cell is `# Title`"
    promise = next((line for line in lines[1:] if line.strip()), "")
    assert promise.startswith("> "), "after the title comes the one-sentence promise, `> ...`"


INSTALL = '#| hide\n![ -z "$COLAB_RELEASE_TAG" ] || pip install -q "git+https://github.com/tokpref/tokpref"'


@every(CHAPTERS)
def test_a_chapter_opens_in_colab(path):
    first, second = nbformat.read(path, as_version=4).cells[1:3]
    assert first.source.startswith("[![Open in Colab](") and first.source.splitlines()[0].endswith(f"/tokpref/blob/main/{name(path)})")
    assert second.source == INSTALL, "the first code cell installs the package in Colab"


@every(DERIVATIONS)
def test_a_derivation_has_all_that_the_reader_was_promised(path):
    words = "\n".join(cell.source for cell in cells(path, "markdown"))
    code = "\n".join(cell.source for cell in cells(path, "code"))
    for start in ("**The question.**", "**You need**", "**Time:**", "## What goes wrong", "## Exercises", "## Recap", "## Papers"):
        assert re.search(f"(^|\\s){re.escape(start)}", words), f"nowhere: {start}"
    assert 3 <= len(re.findall(r"<details>\s*<summary>Solution", words)) <= 6, "three to five exercises with hidden solutions"
    assert "slide(" in code and "film_pair()" in code, "one figure to move, one real pair"
    assert len(re.findall(r"\{#eq-", words)) >= 3 and len(re.findall(r"\bassert", code)) >= 8


WHOLE = {"nbs/library/training/03_trainer.ipynb": "class PreferenceTrainer"}     # one class, to be read from top to bottom


@every(NOTEBOOKS)
def test_cells_are_short(path):
    long = [cell.source.splitlines()[:2] for cell in cells(path, "code")
            if sum(1 for line in cell.source.splitlines() if line.strip()) > 40
            and WHOLE.get(name(path), "-") not in cell.source]
    assert not long, "no code cell is longer than 40 lines"


@every(NOTEBOOKS)
def test_outputs_are_fit_to_read(path):
    for cell in cells(path, "code"):
        for output in cell.outputs:
            text = "".join(output.get("data", {}).get("text/plain", "")) + "".join(output.get("text", ""))
            assert output.output_type != "error" and "Traceback (most recent" not in text, f"a stored error: {cell.source[:60]}"
            assert output.get("name") != "stderr", f"a stored warning: {cell.source[:60]}"
            assert not PATH.search(text), f"a path of one machine in the output of: {cell.source[:60]}"
            assert len(str(output)) < 1_500_000, f"an output of {len(str(output)) // 1000} kB: {cell.source[:60]}"


@every(NOTEBOOKS)
def test_exported_cells_import_by_name(path):
    for cell in cells(path, "code"):
        if re.search(r"^#\|\s*export", cell.source, re.M):
            assert not re.search(r"^\s*from \S+ import \*", cell.source, re.M), "no star import in an exported cell"


@every(CHAPTERS)
def test_prose_stands_between_code(path):
    kinds = (cell.cell_type == "code" for cell in nbformat.read(path, as_version=4).cells)
    assert max(len(list(run)) for code, run in itertools.groupby(kinds) if code) <= 5, "no six code cells in a row without a word"


def test_the_site_lists_every_notebook_once():
    sidebar = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    listed = [page["href"] for entry in sidebar for page in entry.get("contents", [entry])]
    assert sorted(listed) == sorted(p.relative_to(ROOT / "nbs").as_posix() for p in NOTEBOOKS)


def test_nbdev_finds_the_site_description():
    assert (ROOT / "nbs" / "_quarto.yml").read_text(encoding="utf-8") == (ROOT / "_quarto.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize("where", ["in Colab", "elsewhere"])
def test_that_cell_installs_in_colab_and_nowhere_else(tmp_path, monkeypatch, where):
    pip, called = tmp_path / "pip", tmp_path / "called"
    pip.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{called}"\n', encoding="utf-8")
    pip.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab_20260101-060000_RC00") if where == "in Colab" else monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    subprocess.run([sys.executable, "-m", "IPython", "--colors=NoColor", "-c", INSTALL], check=True)
    assert (called.read_text(encoding="utf-8").split() if called.exists() else None) == (
        ["install", "-q", "git+https://github.com/tokpref/tokpref"] if where == "in Colab" else None)


# README

def test_readme_is_the_front_page():
    assert readme.is_current(), "mend with: make prepare"


def test_readme_shows_code_early_and_links_resolve():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert any(line.startswith("```") for line in text.splitlines()[:25]), "the first code stands before line 25"
    links = [link.split("#")[0] for link in re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", text)]
    assert links and not [link for link in links if not (ROOT / link).exists()]


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)


def test_readme_commands_are_ones_that_tokpref_takes():
    from tokpref.cli import make_parser
    lines = [line for block in readme_blocks("sh") for line in block.splitlines() if line.startswith("tokpref ")]
    assert lines
    for line in lines: make_parser().parse_args(shlex.split(line, comments=True)[1:])


def test_readme_trains(tmp_path, monkeypatch, model, tokenizer):
    "The snippet as it stands, with a tiny model and two pairs in place of the names that need the network."
    model.save_pretrained(tmp_path / "model"), tokenizer.save_pretrained(tmp_path / "model")
    pairs = [{"prompt": "say yes ", "chosen": "yes", "rejected": "no, never"}, {"prompt": "say no ", "chosen": "no", "rejected": "yes, often"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    code = next(block for block in readme_blocks("python") if "PreferenceTrainer(" in block)
    names = {'"Qwen/Qwen2.5-0.5B-Instruct"': repr(str(tmp_path / "model")), '"ultrafeedback"': repr(str(tmp_path / "pairs.jsonl"))}
    for known, local in names.items():
        assert known in code
        code = code.replace(known, local)
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(code, scope)
    assert scope["trainer"].state.global_step > 0


def test_readme_prints_what_the_front_page_prints_today():
    from nbclient import NotebookClient
    nb = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    stored = [shown(cell) for cell in nb.cells if cell.cell_type == "code"]
    NotebookClient(nb, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "nbs")}}).execute()
    assert [shown(cell) for cell in nb.cells if cell.cell_type == "code"] == stored, "mend with: make notebooks NB=nbs/index.ipynb prepare"


def shown(cell) -> list[str]:
    "What a cell printed, to the digits that every machine agrees on."
    texts = [output.get("data", {}).get("text/markdown") or output.get("data", {}).get("text/plain") or output.get("text", "")
             for output in cell.outputs if output.get("name") != "stderr" and "image/png" not in output.get("data", {})]
    return [re.sub(r"(\d\.\d{3})\d+", r"\1", text) for text in texts]


# The package

def test_one_home_for_every_name():
    homes = {}
    for path in MODULES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                for exported in ast.literal_eval(node.value): homes.setdefault(exported, []).append(name(path))
    assert homes and not {exported: where for exported, where in homes.items() if len(where) > 1}


@every(MODULES)
def test_every_module_has_its_notebook(path):
    source = re.search(r"File to edit: (\S+)\.$", path.read_text(encoding="utf-8"), re.M)
    assert source and (path.parent / source[1]).resolve() in NOTEBOOKS


@every(sorted((ROOT / "tokpref").rglob("*.py")))
def test_the_oldest_python_can_read_it(path):
    ast.parse(path.read_text(encoding="utf-8"), feature_version=tuple(int(n) for n in SETTINGS["min_python"].split(".")))


def test_losses_do_not_load_transformers():
    code = "import sys, tokpref, tokpref.losses; from tokpref import TokenStats, dpo_loss; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


# Versions and the wheel

def test_one_version():
    import tokpref
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert SETTINGS["version"] == tokpref.__version__ == citation["version"]
    assert f"## {SETTINGS['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def requirements(key: str) -> dict[str, Requirement]:
    return {requirement.name.lower(): requirement for requirement in map(Requirement, SETTINGS[key].split())}


def pins(path: Path) -> dict[str, str]:
    "The exact versions of a constraints file."
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return {pin.name: next(iter(pin.specifier)).version for pin in map(Requirement, filter(None, lines)) if "==" in str(pin)}


@pytest.mark.parametrize("file", ["constraints.txt", "tools/min_versions.txt"])
def test_pinned_versions_are_allowed_by_the_settings(file):
    wanted = requirements("dev_requirements") | requirements("requirements")
    for package, version in pins(ROOT / file).items():
        assert wanted[package].specifier.contains(version), f"{file}: {package}=={version} is outside {wanted[package]}"


def test_the_oldest_versions_allowed_are_the_ones_tried():
    tried = pins(ROOT / "tools" / "min_versions.txt")
    for package, requirement in requirements("requirements").items():
        for floor in (s.version for s in requirement.specifier if s.operator == ">="):
            assert Version(floor) == Version(tried[package]), f"settings.ini allows {requirement}; tools/min_versions.txt tries {tried[package]}"


def test_the_wheel_holds_every_module(tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "tokpref", tree / "tokpref", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"): shutil.copy(ROOT / file, tree)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
                    "-w", tmp_path, tree], check=True)
    wheel = zipfile.ZipFile(next(tmp_path.glob("*.whl")))
    inside, metadata = set(wheel.namelist()), wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
    assert {name(p) for p in (ROOT / "tokpref").rglob("*.py")} <= inside
    assert not [n for n in inside if n.startswith(("nbs", "tests", "tools"))]
    assert not re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", metadata), "links in the long description are absolute"
    assert all("raw.githubusercontent.com" in address for address in re.findall(r"!\[[^\]]*\]\(([^)]*)", metadata)), "pictures are pictures, not pages about them"
    assert "tokpref = tokpref.cli:main" in wheel.read(next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))).decode()


# The checks themselves

@pytest.fixture
def copy(tmp_path):
    "A small project of the same shape: one notebook, its module."
    for file in ("settings.ini", "pyproject.toml"): shutil.copy(ROOT / file, tmp_path)
    notebook = Path("nbs/library/losses/00_types.ipynb")
    (tmp_path / notebook).parent.mkdir(parents=True)
    shutil.copy(ROOT / notebook, tmp_path / notebook)
    (tmp_path / "tokpref" / "losses").mkdir(parents=True)
    for file in ("__init__.py", "losses/__init__.py", "losses/types.py"): shutil.copy(ROOT / "tokpref" / file, tmp_path / "tokpref" / file)
    subprocess.run([check.BIN / "nbdev_export"], cwd=tmp_path, check=True, capture_output=True)
    assert check.exported(tmp_path) == []
    return tmp_path


def test_check_sees_an_edited_module(copy):
    module = copy / "tokpref" / "losses" / "types.py"
    module.write_text(module.read_text(encoding="utf-8").replace("bool tensor", "boolean tensor"), encoding="utf-8")
    assert check.exported(copy) == ["tokpref/losses/types.py is not what its notebook exports; edit the notebook, then: make prepare"]


def test_check_sees_an_orphan_and_a_missing_module(copy):
    (copy / "tokpref" / "losses" / "types.py").rename(copy / "tokpref" / "losses" / "kinds.py")
    first, second = check.exported(copy)
    assert "kinds.py comes from no notebook" in first and "types.py is missing" in second


def test_check_sees_an_unclean_notebook(copy):
    path = copy / "nbs" / "library" / "losses" / "00_types.ipynb"
    path.write_text(path.read_text(encoding="utf-8").replace('"execution_count": null', '"execution_count": 7', 1), encoding="utf-8")
    assert check.exported(copy) == ["nbs/library/losses/00_types.ipynb is not clean; mend with: make prepare"]


def test_check_sees_a_name_that_does_not_exist_and_a_module_that_does_not_import(copy):
    for folder in ("tests", "tools"): (copy / folder).mkdir()
    (copy / "tokpref" / "__init__.py").write_text("", encoding="utf-8")
    (copy / "tokpref" / "wrong.py").write_text("import no_such_module\n\ndef f(): return undefined\n", encoding="utf-8")
    assert any("undefined" in line for line in check.lint(copy))
    assert check.import_alone("tokpref.wrong", copy) == ["import tokpref.wrong fails: ModuleNotFoundError: No module named 'no_such_module'"]
