"""The layout of the package, checked: `python tools/rooms.py`; one line for each rule that a module breaks.

A room is a module. It has a notebook of the same name, at most 350 lines, names that no other room exports, and arrows
that point one way: a room imports from its own part of the package, in no circle, and from the parts before it in
`ROOMS`, wherever in its text the import stands.
"""
import ast
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MOST_LINES = 350
ROOMS = (
    "checks",
    "files",
    "losses",
    "exact",
    "precision",
    "models",
    "data",
    "engine",
    "metrics",
    "training",
    "evaluation",
    "plots",
    "example",
    "experiments.compare",
    "experiments",
    "experiments.tasks",
    "cli",
)
NO_ROOMS = ("__init__.py", "__main__.py", "_modidx.py")


class Room(NamedTuple):
    "A module of the package."

    name: str           # dotted, without `tokpref.`
    path: Path
    tree: ast.Module
    notebook: Path      # that exports it, as the module itself says


class Arrow(NamedTuple):
    "An import of one room by another."

    source: str
    target: str         # a room, or a folder of rooms
    names: tuple[str, ...]
    line: int


def read_rooms(root: Path) -> list[Room]:
    "Every module that a notebook exports."
    rooms = []
    for path in sorted((root / "tokpref").rglob("*.py")):
        if path.name in NO_ROOMS:
            continue
        text = path.read_text(encoding="utf-8")
        source = re.search(r"File to edit: (\S+)\.$", text, re.M)
        notebook = (path.parent / source[1]).resolve() if source else root / "no notebook"
        name = ".".join(path.relative_to(root / "tokpref").with_suffix("").parts)
        rooms.append(Room(name, path, ast.parse(text), notebook))
    return rooms


def absolute(node: ast.ImportFrom, package: list[str]) -> str | None:
    "The dotted name, without `tokpref.`, of what a `from ... import` names; nothing if it is not of this package."
    module = (node.module or "").split(".") if node.module else []
    if node.level:
        return ".".join(package[:len(package) - node.level + 1] + module)
    return ".".join(module[1:]) if module[:1] == ["tokpref"] else None


def arrows(name: str, tree: ast.Module, known: set[str]) -> list[Arrow]:
    "Every import of another room in a module, at its top or inside a function."
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            target = absolute(node, name.split(".")[:-1])
            names = tuple(alias.name for alias in node.names if alias.name != "__version__")
            if target is None or not names:
                continue
            inner = [f"{target}.{alias}".lstrip(".") for alias in names]
            rooms = [room for room in inner if room in known]        # `from . import types`
            found += [Arrow(name, room, (), node.lineno) for room in rooms]
            if len(rooms) < len(names):
                found.append(Arrow(name, target, names, node.lineno))
        elif isinstance(node, ast.Import):
            found += [Arrow(name, alias.name.partition(".")[2], (), node.lineno) for alias in node.names
                      if alias.name.partition(".")[0] == "tokpref"]
    return found


def place(name: str) -> int:
    "Where a room's part of the package stands in `ROOMS`; -1 if nowhere."
    parts = [part for part in ROOMS if name == part or within(part, name)]
    return ROOMS.index(max(parts, key=len)) if parts else -1


def within(folder: str, name: str) -> bool:
    "Whether a room stands in a folder, at any depth."
    return not folder or name.startswith(f"{folder}.")


def wrong_way(arrow: Arrow) -> bool:
    "Whether an arrow leads to a room that comes later, or to the very folder that the room stands in."
    if within(arrow.target, arrow.source):
        return True
    return place(arrow.target) > place(arrow.source)


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    "Groups of rooms that all reach each other."
    reached: dict[str, set[str]] = {}
    for start in edges:
        reached[start], todo = set(), [start]
        while todo:
            new = edges.get(todo.pop(), set()) - reached[start]
            reached[start] |= new
            todo += new
    groups = {
        frozenset(n for n in reached[start] if start in reached.get(n, ()))
        for start in edges
        if start in reached[start]
    }
    return sorted(sorted(group) for group in groups)


def check_arrows(rooms: list[Room]) -> list[str]:
    "Arrows one way, no circle, no underscored name that crosses."
    known = {room.name: room for room in rooms}
    lines: list[str] = []
    edges: dict[str, set[str]] = {}
    for room in rooms:
        file = f"tokpref/{room.name.replace('.', '/')}.py"
        if place(room.name) < 0:
            lines.append(f"{file}: {room.name.partition('.')[0]} has no place in ROOMS of tools/rooms.py")
        for arrow in arrows(room.name, room.tree, set(known)):
            targets = {arrow.target} if arrow.target in known else {n for n in known if within(arrow.target, n)}
            edges.setdefault(room.name, set()).update(targets - {room.name})
            if place(room.name) >= 0 and wrong_way(arrow):
                lines.append(f"{file}: line {arrow.line} imports {arrow.target or 'tokpref'}, which comes later")
    return lines + [f"a circle of imports: {', '.join(circle)}" for circle in circles(edges)]


def private(name: str) -> bool:
    "Whether a name is its module's own."
    return name.startswith("_") and not name.startswith("__")


def check_private(root: Path, rooms: list[Room]) -> list[str]:
    "No module, tool or benchmark takes an underscored name from a room."
    known, lines = {room.name for room in rooms}, []
    files = [(room.name, room.path, room.tree) for room in rooms]
    for folder in ("tools", "benchmarks"):
        files += [(path.stem, path, ast.parse(path.read_text(encoding="utf-8")))
                  for path in sorted((root / folder).glob("*.py"))]
    for name, path, tree in files:
        for arrow in arrows(name, tree, known):
            lines += [
                f"{path.relative_to(root)}: line {arrow.line} takes {taken} from {arrow.target}; give it a public name"
                for taken in arrow.names
                if private(taken)
            ]
    return lines


def check_notebooks(root: Path, rooms: list[Room]) -> list[str]:
    "Each room has a notebook of its name and in its place, and each number stands once in a folder."
    lines, exporters = [], {}
    for room in rooms:
        file = room.path.relative_to(root).as_posix()
        if not room.notebook.exists():
            lines.append(f"{file} does not say which notebook exports it, or it is not there")
            continue
        notebook = room.notebook.relative_to(root / "nbs")
        stem = re.sub(r"^\d+_", "", notebook.stem)
        folders = (notebook.parts[0], *room.name.split(".")[:-1])
        expected = {"derivations"} if room.name.startswith(("losses.", "exact.")) else set()
        expected.add("/".join(dict.fromkeys(folders)))
        if stem != room.name.split(".")[-1] or notebook.parent.as_posix() not in expected:
            lines.append(f"{file} is exported by nbs/{notebook}: a module and its notebook have one name and one place")
        if notebook in exporters:
            lines.append(f"nbs/{notebook} exports {exporters[notebook]} and {file}: one notebook, one module")
        exporters[notebook] = file
    numbers: dict[tuple[Path, str], Path] = {}
    for path in sorted((root / "nbs").rglob("[0-9]*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        key = (path.parent, path.name.partition("_")[0])
        if key in numbers:
            lines.append(f"{path.relative_to(root)} has the number of {numbers[key].name}")
        numbers[key] = path
    return lines


def exported_names(tree: ast.Module) -> list[str]:
    "What a module's `__all__` lists; what it takes over from another module's list has its home there."
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return [str(item.value) for item in getattr(node.value, "elts", []) if isinstance(item, ast.Constant)]
    return []


def check_homes(rooms: list[Room]) -> list[str]:
    "No name is exported by two rooms."
    homes: dict[str, str] = {}
    lines = []
    for room in rooms:
        for name in exported_names(room.tree):
            if name in homes:
                lines.append(f"{name} is exported by {homes[name]} and by {room.name}; a name has one home")
            homes.setdefault(name, room.name)
    return lines


def check_size(rooms: list[Room]) -> list[str]:
    "No room is too large to be read in one go."
    sizes = {room: len(room.path.read_text(encoding="utf-8").splitlines()) for room in rooms}
    return [f"tokpref/{room.name.replace('.', '/')}.py has {size} lines, the most is {MOST_LINES}"
            for room, size in sizes.items() if size > MOST_LINES]


def check(root: Path = ROOT) -> list[str]:
    "All complaints about the layout."
    rooms = read_rooms(root)
    return [*check_size(rooms), *check_notebooks(root, rooms), *check_homes(rooms), *check_arrows(rooms),
            *check_private(root, rooms)]


if __name__ == "__main__":
    complaints = check()
    print(*complaints, sep="\n")
    sys.exit(bool(complaints))
