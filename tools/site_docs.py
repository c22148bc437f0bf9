"""What `nbdev_proc_nbs` does, but that no cell is run: the notebooks into _proc/, each function with its documentation.

nbdev runs every cell that imports or exports, to have what it documents. Here that comes from the package, which is
the same code and has the comments of a dataclass's fields; other cells keep their stored outputs. Works in the folder
of settings.ini.
"""
import functools
import importlib
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from execnb.nbio import AttrDict, read_nb, write_nb
from nbdev.config import get_config
from nbdev.doclinks import _lineno, nbglob
from nbdev.process import NBProcessor, Processor
from nbdev.processors import FilterDefaults, exec_show_docs
from nbdev.quarto import refresh_quarto_yml
from nbdev.showdoc import show_doc

MODULE_OF_A_TYPE = re.compile(r"\b(?:[a-z_]\w*\.)+(?=[A-Z]\w*\b)")
FUNCTION = re.compile(r"<function (?:[\w.]+\.<locals>\.)?(<lambda>|[\w.]+) at 0x[0-9a-f]+>")


def short(shown: str) -> str:
    "Documentation with the names of types and functions as one writes them: no modules before, no addresses behind."
    before, signature, after = re.split(r"(?<=```python\n)(.*?)(?=^```$)", shown, maxsplit=1, flags=re.S | re.M)
    parts = re.split(r"('(?:[^'\\]|\\.)*'|#[^\n]*)", signature)         # strings and comments stay as they are
    parts[::2] = [FUNCTION.sub(r"\1", MODULE_OF_A_TYPE.sub("", part)) for part in parts[::2]]
    return before + "".join(parts) + after


class ShowDocs(Processor):
    "In place of nbdev's exec_show_docs."

    def begin(self):
        module = next((c.directives_["default_exp"][0] for c in self.nb.cells if "default_exp" in c.directives_), "")
        self.name = f"{get_config().lib_name}.{module}".rstrip(".")
        self.module = importlib.import_module(self.name)

    def cell(self, cell):
        "Gives a cell that documents something its output."
        asked = re.fullmatch(r"show_doc\(([\w.]+)\)", cell.source.split("\n")[-1])
        if cell.cell_type != "code" or not asked: return
        shown: Any = show_doc(functools.reduce(getattr, asked[1].split("."), self.module))
        line = _lineno(shown.nm, f"{self.name.replace('.', '/')}.py")
        text = short(shown._repr_markdown_().replace("#LNone", f"#L{line}", 1))
        data = AttrDict({"text/markdown": text.splitlines(keepends=True)})
        cell.outputs = [AttrDict(output_type="display_data", data=data, metadata=AttrDict())]


def processors() -> list:
    "nbdev's own, but for the one that runs cells."
    return [ShowDocs if one is exec_show_docs else one for one in FilterDefaults().base_procs()]


def main() -> None:
    refresh_quarto_yml()
    config = get_config()
    notebooks, made = config.nbs_path, config.config_path / "_proc"
    shutil.rmtree(made, ignore_errors=True)
    for path in map(Path, nbglob(notebooks)):
        notebook, target = read_nb(path), made / path.relative_to(notebooks)
        try: NBProcessor(nb=notebook, procs=processors()).process()
        except Exception as e: sys.exit(f"{path.relative_to(config.config_path)}: {type(e).__name__}: {e}")
        target.parent.mkdir(parents=True, exist_ok=True)
        write_nb(notebook, target)
    for name in ("_quarto.yml", "nbdev.yml"): shutil.copy(notebooks / name, made)


if __name__ == "__main__": main()
