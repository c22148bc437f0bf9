"""The house rules that no single chapter can check: packaging, notebooks, names, and the checks themselves."""
import ast
import configparser
import importlib
import inspect
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import nbformat
import pytest
import yaml
from fastcore.docments import docments
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import check  # noqa: E402
import colab  # noqa: E402
import dist  # noqa: E402
import pins as pinning  # noqa: E402
import readme  # noqa: E402
import rooms  # noqa: E402

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
CHAPTERS = [p for p in NOTEBOOKS if p.name != "index.ipynb"]
DERIVATIONS = [p for p in NOTEBOOKS if p.parent.name == "derivations" and re.match(r"(?!00)\d", p.name)]
MODULES = sorted(
    p for p in (ROOT / "tokpref").rglob("*.py") if p.name not in ("__init__.py", "__main__.py", "_modidx.py")
)
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


@every(CHAPTERS)
def test_a_chapter_opens_in_colab(path):
    first, second = nbformat.read(path, as_version=4).cells[1:3]
    assert first.source.startswith(colab.badge(path)) and name(path) in first.source
    assert second.source == colab.install_cell(), "mend with: python tools/colab.py"


@every(DERIVATIONS)
def test_a_derivation_has_all_that_the_reader_was_promised(path):
    words = "\n".join(cell.source for cell in cells(path, "markdown"))
    code = "\n".join(cell.source for cell in cells(path, "code"))
    for start in (
        "**The question.**",
        "**You need**",
        "**Time:**",
        "## What goes wrong",
        "## Exercises",
        "## Recap",
        "## Papers",
    ):
        assert re.search(f"(^|\\s){re.escape(start)}", words), f"nowhere: {start}"
    assert 3 <= len(re.findall(r"<details>\s*<summary>Solution", words)) <= 6, (
        "three to five exercises with hidden solutions"
    )
    assert "slide(" in code and "film_pair()" in code, "one figure to move, one real pair"
    assert len(re.findall(r"\{#eq-", words)) >= 3 and len(re.findall(r"\bassert", code)) >= 8


def reading(path):
    "Words outside formulas, links' addresses and code; lines of code that are not plumbing; minutes that both take."
    prose = "\n".join(cell.source for cell in cells(path, "markdown"))
    plain = re.sub(r"\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)|</?[a-z]+>", " ", prose, flags=re.S)
    lines = [line for cell in cells(path, "code") for line in cell.source.splitlines() if line.strip()]
    words, lines = len(re.findall(r"\w[\w'-]*", plain)), len([line for line in lines if not line.startswith("#|")])
    return words, lines, words / 120 + lines / 25


@every(DERIVATIONS)
def test_a_derivation_is_as_long_as_it_says(path):
    "120 words and 25 lines of code a minute: slow enough for a reader whose third language is English."
    words, lines, minutes = reading(path)
    stated = int(re.search(r"\*\*Time:\*\* (\d+) minutes to read", cells(path, "markdown")[1].source)[1])
    assert len(nbformat.read(path, as_version=4).cells) <= 105 and words <= 3500, f"{words} words: cut, or split"
    assert abs(stated - minutes) <= 5, f"{words} words and {lines} lines are {minutes:.0f} minutes"


WHOLE = {"class Workspace", "class EndpointJudge"}      # one class, to be read from top to bottom


@every(NOTEBOOKS)
def test_cells_are_short(path):
    long = [cell.source.splitlines()[:3] for cell in cells(path, "code")
            if sum(1 for line in cell.source.splitlines() if line.strip()) > 60
            and not any(line.startswith(f"{each}:") for each in WHOLE for line in cell.source.splitlines())]
    assert not long, "no code cell is longer than 60 lines"


@every(NOTEBOOKS)
def test_a_closed_cell_is_closed_everywhere(path):
    "What is folded on the site is hidden in Jupyter, and in Colab a form; its title there is that of the site."
    for cell in cells(path, "code"):
        folded = "#| code-fold: true" in cell.source
        closed = cell.metadata.get("cellView") == "form" and cell.metadata.get("jupyter") == {"source_hidden": True}
        assert folded == closed, f"one of two is missing: {cell.source[:80]}"
        summary, title = (re.search(rf"^{start}(.+?)\"?$", cell.source, re.M)
                          for start in (r'#\| code-summary: "', "#@title "))
        assert not folded or summary and (not title or title[1] == summary[1]), f"its title: {cell.source[:80]}"


@every(NOTEBOOKS)
def test_outputs_are_fit_to_read(path):
    for cell in cells(path, "code"):
        for output in cell.outputs:
            text = "".join(output.get("data", {}).get("text/plain", "")) + "".join(output.get("text", ""))
            assert output.output_type != "error" and "Traceback (most recent" not in text, (
                f"a stored error: {cell.source[:60]}"
            )
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
    assert max(len(list(run)) for code, run in itertools.groupby(kinds) if code) <= 5, (
        "no six code cells in a row without a word"
    )


def test_the_site_lists_every_notebook_once():
    sidebar = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    listed = [page["href"] for entry in sidebar for page in entry.get("contents", [entry])]
    assert sorted(listed) == sorted(p.relative_to(ROOT / "nbs").as_posix() for p in NOTEBOOKS)


@every(NOTEBOOKS)
def test_links_lead_to_files(path):
    prose = "\n".join(cell.source for cell in cells(path, "markdown"))
    links = re.findall(r"\]\((?!https?:|mailto:|#)([^)\s#]+\.ipynb)", prose)
    assert not [link for link in links if not (path.parent / link).exists()]


@every(NOTEBOOKS)
def test_references_lead_to_equations_of_the_page(path):
    source = "\n".join(cell.source for kind in ("markdown", "code") for cell in cells(path, kind))
    referred = set(re.findall(r"(?<![\w`@/])@(eq-[\w-]*\w)", source))
    assert referred <= set(re.findall(r"\{#(eq-[\w-]+)\}", source)), "to refer to another page, link to its notebook"


def test_the_navigation_bar_leads_to_pages():
    bar = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["navbar"]["left"]
    assert all((ROOT / "nbs" / entry["href"]).exists() for entry in bar)


def test_nbdev_finds_the_site_description():
    assert (ROOT / "nbs" / "_quarto.yml").read_text(encoding="utf-8") == (ROOT / "_quarto.yml").read_text(
        encoding="utf-8"
    )


def open_chapter(folder: Path, monkeypatch, status: int | None, **environment: str) -> tuple[list | None, list[str]]:
    """(what the opening cell asks of pip, what is shown), in Colab where `status` says how pip ends, else on a machine
    of one's own.
    """
    called = folder / "called"
    code = f"import json, sys\nopen({str(called)!r}, 'w').write(json.dumps(sys.argv[1:]))\nsys.exit({status})\n"
    (folder / "pip.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("IPYTHONDIR", str(folder))
    if status is None: monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    else: monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab_20260101-060000_RC00")
    for key, value in environment.items(): monkeypatch.setenv(key, value)
    command = [sys.executable, "-m", "IPython", "--colors=NoColor", "-c", colab.install_cell()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode == 0) == (not status)
    asked = json.loads(called.read_text(encoding="utf-8")) if called.exists() else None
    return asked, done.stderr.strip().splitlines()


def test_that_cell_installs_in_colab_and_nowhere_else(tmp_path, monkeypatch):
    assert open_chapter(tmp_path, monkeypatch, None) == (None, [])
    called, said = open_chapter(tmp_path, monkeypatch, 0)
    assert called == ["install", "-q", f"git+https://github.com/{SETTINGS['user']}/{SETTINGS['repo']}"] and not said
    called, said = open_chapter(tmp_path, monkeypatch, 0, TOKPREF_SOURCE="a folder/tokpref.whl")
    assert called == ["install", "-q", "a folder/tokpref.whl"] and not said


def test_that_cell_stops_with_one_line_where_pip_fails(tmp_path, monkeypatch):
    _, said = open_chapter(tmp_path, monkeypatch, 1)
    assert len(said) == 1 and "tokpref was not installed: pip could not get it from git+https://" in said[0]


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
    blocks = [block.replace("\\\n", " ") for block in readme_blocks("sh")]
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("tokpref ")]
    assert lines
    for line in lines: make_parser().parse_args(shlex.split(line, comments=True)[1:])


def test_readme_is_short_and_opens_with_a_model_that_trains():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    code = dist.quick_start().strip().splitlines()
    assert len([line for line in code if line]) <= 6 and text.index(code[0]) < text.index("](https:")


def test_the_loss_of_the_readme_is_compared_with_nine_others(tmp_path, monkeypatch):
    "All ten are known; the own one is trained as the command says, but alone and for one step."
    from tokpref.cli import main
    from tokpref.losses.registry import LOSSES
    own = next(block for block in readme_blocks("python") if "LossSpec" in block)
    command = next(block for block in readme_blocks("sh") if "--import" in block)
    assert len([line for line in (own + command).splitlines() if line.strip()]) <= 6
    arguments = shlex.split(command)[1:]
    name, *others = arguments[arguments.index("--losses") + 1:]
    assert len(set(others)) == 9 and set(others) <= set(LOSSES) and name not in LOSSES
    monkeypatch.chdir(tmp_path)
    Path("my_loss.py").write_text(own, encoding="utf-8")
    try: assert main([*arguments[:-9], "--profile", "smoke", "--set", "steps=1", "--out", "out", "--quiet"]) == 0
    finally: LOSSES.pop(name, None)
    record = json.loads(Path("out/comparison.json").read_text(encoding="utf-8"))
    assert [run["label"] for run in record["runs"]] == [name] and "error" not in record["runs"][0]


def test_chapters_of_the_readme_are_pages_of_the_site():
    pages = {readme.page(path.relative_to(ROOT / "nbs").as_posix()) for path in NOTEBOOKS}
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    chapters = [link for link in links if link.startswith("https://tokpref.github.io")]
    assert len(chapters) >= 3 and set(chapters) <= pages


def test_readme_prints_what_the_front_page_prints_today():
    from nbclient import NotebookClient
    nb = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    stored = [shown(cell) for cell in nb.cells if cell.cell_type == "code"]
    NotebookClient(
        nb, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "nbs")}}
    ).execute()
    assert [shown(cell) for cell in nb.cells if cell.cell_type == "code"] == stored, (
        "mend with: make notebooks NB=nbs/index.ipynb prepare"
    )


def shown(cell) -> list[str]:
    "What a cell printed, to the digits that every machine agrees on."
    texts = [
        output.get("data", {}).get("text/markdown")
        or output.get("data", {}).get("text/plain")
        or output.get("text", "")
        for output in cell.outputs
        if output.get("name") != "stderr" and "image/png" not in output.get("data", {})
    ]
    return [re.sub(r"(\d\.\d{3})\d+", r"\1", text) for text in texts]


# The package

def test_the_layout_of_the_rooms_holds():
    assert rooms.check() == []


@every(sorted((ROOT / "tokpref").rglob("*.py")))
def test_the_oldest_python_can_read_it(path):
    ast.parse(
        path.read_text(encoding="utf-8"), feature_version=tuple(int(n) for n in SETTINGS["min_python"].split("."))
    )


@every(MODULES)
def test_nbdev_can_document_every_exported_name(path):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    symbols = [getattr(module, name) for name in getattr(module, "__all__", [])]
    for symbol in symbols:
        if inspect.isclass(symbol) or inspect.isfunction(symbol): docments(symbol, full=True)


def test_losses_do_not_load_transformers():
    code = "import sys, tokpref.losses; from tokpref import TokenStats, dpo_loss; print('transformers' in sys.modules)"
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


def pins(path: Path, python: str = "3.12") -> dict[str, str]:
    "The exact versions of a constraints file that hold for one Python."
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    found = [pin for pin in map(Requirement, filter(None, lines))
             if "==" in str(pin.specifier) and pinning.needed(pin, python)]
    assert len({pin.name for pin in found}) == len(found), (
        f"{path.name} has two versions of a package for Python {python}"
    )
    return {pin.name: next(iter(pin.specifier)).version for pin in found}


@pytest.mark.parametrize("python", pinning.PYTHONS)
def test_every_direct_dependency_is_pinned(python):
    wanted = {
        name: requirement for name, requirement in pinning.wanted().items() if pinning.needed(requirement, python)
    }
    pinned = pins(ROOT / "constraints.txt", python)
    assert not wanted.keys() - pinned.keys(), "mend with: make pins"
    for package, requirement in wanted.items():
        assert requirement.specifier.contains(pinned[package]), f"{package}=={pinned[package]} is outside {requirement}"


def test_pins_ask_for_an_older_version_where_the_installed_one_is_too_new(monkeypatch):
    monkeypatch.setattr(pinning, "installed", lambda requirement, python: ("3.2", ">=3.11"))
    monkeypatch.setattr(pinning, "newest", lambda requirement, python: ("3.0", ">=3.9"))
    assert pinning.lines("numpy", Requirement("numpy>=2")) == [
        'numpy==3.2; python_version >= "3.11"', 'numpy==3.0; python_version == "3.10"']


@pytest.mark.parametrize("python", ["3.10", "3.12"])
def test_the_oldest_versions_tried_are_allowed_by_the_settings(python):
    wanted = requirements("dev_requirements") | requirements("requirements")
    for package, version in pins(ROOT / "tools" / "min_versions.txt", python).items():
        assert wanted[package].specifier.contains(version), f"{package}=={version} is outside {wanted[package]}"


def test_the_oldest_versions_allowed_are_the_ones_tried():
    tried = pins(ROOT / "tools" / "min_versions.txt", "3.10")
    for package, requirement in requirements("requirements").items():
        for floor in (s.version for s in requirement.specifier if s.operator == ">="):
            assert Version(floor) == Version(tried[package]), f"{requirement} is allowed, {tried[package]} is tried"


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    "(source distribution, the wheel made from it), built in a copy with the tools that are here."
    return dist.build_here(tmp_path_factory.mktemp("dist"))


def test_the_source_distribution_holds_what_it_is_built_from(distributions):
    with tarfile.open(distributions[0]) as archive:
        inside = {member.partition("/")[2] for member in archive.getnames()}
    assert {"settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE", "tokpref/py.typed"} <= inside
    assert not [member for member in inside if member.startswith(("nbs", "tests", "tools"))]


def test_the_wheel_holds_every_module(distributions):
    wheel = zipfile.ZipFile(distributions[1])
    inside = set(wheel.namelist())
    metadata, entries = (wheel.read(next(n for n in inside if n.endswith(file))).decode()
                         for file in ("METADATA", "entry_points.txt"))
    package = [p for p in (ROOT / "tokpref").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    records = {f"tokpref/{name(path)}" for path in (ROOT / "results").glob("*.json")}
    assert {name(p) for p in package} | records <= inside and records
    assert not [n for n in inside if n.startswith(("nbs", "tests", "tools"))]
    assert not re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", metadata), "links in the long description are absolute"
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]*)", metadata)
    assert all("raw.githubusercontent.com" in address for address in pictures), (
        "pictures are pictures, not pages about them"
    )
    assert "tokpref = tokpref.cli:main" in entries and f"Version: {SETTINGS['version']}\n" in metadata


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    "The Python of an environment with all that tokpref asks for and nothing else."
    return colab.bare_environment(tmp_path_factory.mktemp("bare") / "env")


@pytest.mark.parametrize("which", [0, 1], ids=["sdist", "wheel"])
def test_both_distributions_install_and_the_quick_start_runs(distributions, bare, tmp_path, which):
    "`make dist` does it with a network, in an empty environment."
    installed = tmp_path / "installed"
    dist.run(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation",
             "--target", installed, distributions[which], cwd=tmp_path)
    where = dist.run_quick_start(bare, tmp_path, PYTHONPATH=str(installed))
    assert where.startswith(str(installed))


def test_a_chapter_in_colab_has_the_wheel_and_nothing_of_the_checkout(distributions, bare, tmp_path):
    "One chapter that reads records; `make colab` runs them all. Then one that reads the checkout, and is caught."
    chapter = ROOT / "nbs" / "experiments" / "pretrained" / "05_reading.ipynb"
    assert colab.run_chapter(chapter, bare, distributions[1]) == ""
    elsewhere = 'import os\nos.environ["TOKPREF_SOURCE"] = "no-such.whl"\n'
    for code, error in {
        'open("../../results/sentiment-nano.json")': "FileNotFoundError",
        "import nbdev": "ModuleNotFoundError",
        elsewhere + colab.install_cell(): "tokpref was not installed: pip could not get it from no-such.whl",
    }.items():
        wrong = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
        nbformat.write(wrong, tmp_path / "wrong.ipynb")
        assert colab.run_chapter(tmp_path / "wrong.ipynb", bare, distributions[1]).startswith(error)


HAVE = {*sys.stdlib_module_names, *(module for module, packages in packages_distributions().items()
                                    if {canonicalize_name(package) for package in packages}
                                    & colab.needed(*SETTINGS["requirements"].split(), "ipykernel", "ipywidgets"))}


@every(CHAPTERS)
def test_a_chapter_asks_for_nothing_that_only_the_checkout_has(path):
    "What can be seen without running it of what `make colab` tries: what it imports, and files beside the notebook."
    for cell in cells(path, "code"):
        if re.search(r"^#\|\s*(eval: false|skip)", cell.source, re.M): continue
        tree = ast.parse(re.sub(r"^([ \t]*)[%!].*$", r"\1pass", cell.source, flags=re.M))
        for node in tree.body:          # inside a function or behind an `if` it may be something optional
            named = [a.name for a in node.names] if isinstance(node, ast.Import) else (
                [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else [])
            missing = [module for module in named if module.partition(".")[0] not in {*HAVE, "tokpref"}]
            assert not missing, f"who installs tokpref does not have {missing}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.match(r"\.\./[\w./]*$", node.value), f"a file of the checkout: {node.value}"


def test_every_fault_of_the_mutations_can_be_put_in():
    "The lines that `make mutations` changes are still there."
    done = subprocess.run([sys.executable, ROOT / "tools" / "mutations.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]


@pytest.mark.skipif(os.environ.get("TOKPREF_COLAB") != "all", reason="takes an hour; `make colab` runs it every week")
@every(CHAPTERS)
def test_every_chapter_runs_from_the_wheel_alone(path, distributions, bare):
    assert colab.run_chapter(path, bare, distributions[1]) == ""


def test_a_release_is_made_from_its_own_tag(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dist.py", "--tag", "v0.0.0"])
    with pytest.raises(SystemExit, match=f"tag v{SETTINGS['version']}"):
        dist.main()


# Workflows

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@every(WORKFLOWS)
def test_workflows_run_pinned_actions_with_least_permissions(path):
    text = path.read_text(encoding="utf-8")
    actions = re.findall(r"uses: (\S+)", text)
    assert actions and all(re.search(r"@[0-9a-f]{40}$", action) for action in actions), (
        "an action is pinned to a commit"
    )
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    assert text.count("actions/checkout@") == text.count("persist-credentials: false")
    writers = {job for job, steps in workflow["jobs"].items() if "write" in steps.get("permissions", {}).values()}
    assert writers <= {"publish"}, "only a job that publishes may write"


def test_workflows_agree_on_the_commit_of_an_action():
    commits = {}
    for path in WORKFLOWS:
        for action, commit in re.findall(r"uses: (\S+)@(\S+)", path.read_text(encoding="utf-8")):
            commits.setdefault(action, set()).add(commit)
    assert not [action for action, known in commits.items() if len(known) > 1]


def test_commands_that_the_texts_name_are_in_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    texts = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *WORKFLOWS]
    for path in texts:
        text = path.read_text(encoding="utf-8")
        code = re.findall(r"`make ([a-z-]+)", text) + re.findall(r"^(?:\s*- run: )?make ([a-z-]+)", text, re.M)
        assert set(code) <= targets, path.name


@every([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *NOTEBOOKS])
def test_nothing_says_that_the_package_is_on_pypi(path):
    "Until its first release it is not, and the name could be anybody's."
    assert not re.search(r"pip install [^\n]*[\s\"']tokpref(?![\w/.-]|\[\w+\] @ git)", path.read_text(encoding="utf-8"))


# The checks themselves

@pytest.fixture
def copy(tmp_path):
    "A small project of the same shape: one notebook, its module."
    for file in ("settings.ini", "pyproject.toml"): shutil.copy(ROOT / file, tmp_path)
    notebook = Path("nbs/library/losses/00_types.ipynb")
    (tmp_path / notebook).parent.mkdir(parents=True)
    shutil.copy(ROOT / notebook, tmp_path / notebook)
    (tmp_path / "tokpref" / "losses").mkdir(parents=True)
    for file in ("__init__.py", "losses/__init__.py", "losses/types.py"):
        shutil.copy(ROOT / "tokpref" / file, tmp_path / "tokpref" / file)
    subprocess.run([check.BIN / "nbdev_export"], cwd=tmp_path, check=True, capture_output=True)
    assert check.exported(tmp_path) == []
    return tmp_path


def test_check_sees_an_edited_module(copy):
    module = copy / "tokpref" / "losses" / "types.py"
    module.write_text(module.read_text(encoding="utf-8").replace("bool tensor", "boolean tensor"), encoding="utf-8")
    assert check.exported(copy) == [
        "tokpref/losses/types.py is not what its notebook exports; edit the notebook, then: make prepare"
    ]


def test_check_sees_an_orphan_and_a_missing_module(copy):
    (copy / "tokpref" / "losses" / "types.py").rename(copy / "tokpref" / "losses" / "kinds.py")
    first, second = check.exported(copy)
    assert "kinds.py comes from no notebook" in first and "types.py is missing" in second


def test_check_sees_an_unclean_notebook(copy):
    path = copy / "nbs" / "library" / "losses" / "00_types.ipynb"
    path.write_text(
        path.read_text(encoding="utf-8").replace('"execution_count": null', '"execution_count": 7', 1), encoding="utf-8"
    )
    assert check.exported(copy) == ["nbs/library/losses/00_types.ipynb is not clean; mend with: make prepare"]


def test_check_sees_a_name_that_does_not_exist(copy):
    (copy / "tokpref" / "wrong.py").write_text("def f():\n    return undefined\n", encoding="utf-8")
    assert any("undefined" in line for line in check.lint(copy))


def test_check_sees_what_does_not_import_on_its_own(copy):
    for folder in ("tests", "tools"):
        (copy / folder).mkdir()
    (copy / "tokpref" / "__init__.py").write_text("", encoding="utf-8")
    (copy / "tokpref" / "losses" / "__init__.py").write_text("", encoding="utf-8")
    (copy / "tokpref" / "wrong.py").write_text("import no_such_module\n", encoding="utf-8")
    (copy / "tokpref" / "early.py").write_text(
        "import sys\nassert 'tokpref.wrong' not in sys.modules\n", encoding="utf-8"
    )
    (copy / "tests" / "test_old.py").write_text("from tokpref.early import gone\n", encoding="utf-8")
    (copy / "tokpref" / "losses" / "types.py").unlink()
    first, second = check.imports(copy)
    assert first == "import tokpref.wrong fails: ModuleNotFoundError: No module named 'no_such_module'"
    assert second.startswith("import test_old fails: ImportError: cannot import name 'gone'")


def test_check_types_looks_again_only_at_what_changed(copy, monkeypatch):
    wrong = {"file": str(copy / "tokpref" / "wrong.py"), "severity": "error", "message": "no such name\nat all",
             "rule": "someRule", "range": {"start": {"line": 2}}}
    answers = [[], [wrong], [wrong], []]
    calls = []

    def pyright(*args, **kwargs):
        calls.append(args)
        return subprocess.CompletedProcess(args, 0, json.dumps({"generalDiagnostics": answers.pop(0)}), "")
    monkeypatch.setattr(check.subprocess, "run", pyright)
    assert check.types(copy) == [] == check.types(copy) and len(calls) == 1
    (copy / "tokpref" / "wrong.py").write_text("import math\n", encoding="utf-8")
    for _ in range(2):
        assert check.types(copy) == ["tokpref/wrong.py:3: no such name (someRule)"]
    assert check.types(copy) == [] and len(calls) == 4


@pytest.mark.parametrize("where", ["in continuous integration", "elsewhere"])
def test_check_types_says_when_it_cannot_run(copy, monkeypatch, capsys, where):
    monkeypatch.setattr(
        check.subprocess, "run", lambda *args, **kwargs: subprocess.CompletedProcess(args, 1, "", "no network")
    )
    monkeypatch.setenv("CI", "1") if where == "in continuous integration" else monkeypatch.delenv("CI", raising=False)
    lines = check.types(copy)
    assert (
        bool(lines) == (where == "in continuous integration")
        and "no network" in "".join(lines) + capsys.readouterr().out
    )


ROOM = """# AUTOGENERATED! DO NOT EDIT! File to edit: {notebook}.
__all__ = {names}
{code}
"""


def layout(root: Path, **files: tuple[str, list[str], str]) -> list[str]:
    "What the check says of a package of rooms: name -> (notebook, names, code)."
    for room, (notebook, names, code) in files.items():
        module = root / "tokpref" / f"{room.replace('__', '/')}.py"
        module.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * (1 + room.count("__"))
        module.write_text(ROOM.format(notebook=f"{up}nbs/{notebook}", names=names, code=code), encoding="utf-8")
        (root / "nbs" / notebook).parent.mkdir(parents=True, exist_ok=True)
        (root / "nbs" / notebook).write_text("{}", encoding="utf-8")
    return rooms.check(root)


FORMATS = ("library/data/00_formats.ipynb", ["Row"], "")


@pytest.mark.parametrize(
    "code",
    [
        "from .formats import Row",
        "from tokpref.data.formats import Row",
        "from ..checks import nearest",
        "from .. import __version__",
        "def f():\n    from .formats import Row",
        "from . import formats",
    ],
)
def test_the_layout_allows_arrows_to_earlier_rooms(tmp_path, code):
    assert layout(tmp_path, checks=("library/00_checks.ipynb", ["nearest"], ""), data__formats=FORMATS,
                  data__collate=("library/data/01_collate.ipynb", ["Collator"], code)) == []


@pytest.mark.parametrize("code, complaint", [
    ("from ..engine.stats import token_stats", "imports engine.stats, which comes later"),
    ("def f():\n    from tokpref.engine import token_stats", "imports engine, which comes later"),
    ("def f():\n    import tokpref.engine.stats", "imports engine.stats, which comes later"),
    ("from tokpref.data import Row", "imports data, which comes later"),
    ("from tokpref import token_stats", "imports tokpref, which comes later"),
    ("from .formats import _split", "takes _split from data.formats; give it a public name"),
    ("\n" * 400, "has 403 lines, the most is 350"),
])
def test_the_layout_refuses(tmp_path, code, complaint):
    lines = layout(tmp_path, data__formats=FORMATS, data__collate=("library/data/01_collate.ipynb", ["Collator"], code),
                   data__prepare=("library/data/02_prepare.ipynb", ["prepare"], ""),
                   engine__stats=("library/engine/00_stats.ipynb", ["token_stats"], ""))
    assert len(lines) == 1 and complaint in lines[0]


@pytest.mark.parametrize("notebook, names, complaint", [
    ("library/data/01_collation.ipynb", [], "have one name and one place"),
    ("library/01_collate.ipynb", [], "have one name and one place"),
    ("library/data/00_collate.ipynb", [], "has the number of 00_collate.ipynb"),
    ("library/data/01_collate.ipynb", ["Row"], "Row is exported by data.collate and by data.formats"),
])
def test_the_layout_refuses_a_second_home(tmp_path, notebook, names, complaint):
    lines = layout(tmp_path, data__formats=FORMATS, data__collate=(notebook, names, ""))
    assert len(lines) == 1 and complaint in lines[0]


def test_the_layout_names_a_circle(tmp_path):
    lines = layout(
        tmp_path,
        data__formats=("library/data/00_formats.ipynb", [], "def f():\n    from .collate import g"),
        data__collate=("library/data/01_collate.ipynb", [], "from .formats import f"),
    )
    assert "a circle of imports: data.collate, data.formats" in lines


def test_the_layout_asks_for_a_place(tmp_path):
    (line,) = layout(tmp_path, attic=("library/00_attic.ipynb", [], ""))
    assert "attic has no place in ROOMS" in line
