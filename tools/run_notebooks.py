"""Run notebooks top to bottom and store what they print: `python tools/run_notebooks.py [notebook ...]`.

Without arguments every notebook under nbs/ runs. A notebook whose front matter or first cells say
`#| skip_exec` keeps its stored outputs (it needs hardware or hours that not everyone has).
"""
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKPREF_FRAMES": "1",
    "TOKPREF_RESULTS_ONLY": "1",
}

FOLDED = {"cellView": "form", "jupyter": {"source_hidden": True}}     # closed in Colab and in Jupyter as on the site


def matplotlib_settings() -> str:
    "The quiet frame of the package's own figures, as a matplotlibrc: figures made by pyplot are stored in it too."
    from tokpref.plots.style import FRAME
    return "".join(f"{name}: {str(value).replace('#', '')}\n" for name, value in FRAME.items())


def worth_keeping(output: dict) -> bool:
    "Not a warning, not a progress bar."
    return output.get("name") != "stderr" and "%|" not in str(output.get("data", {}).get("text/plain", ""))


def run(path: Path) -> None:
    "Execute one notebook in its own folder and write it back."
    nb = nbformat.read(path, as_version=4)
    if any("skip_exec" in cell.source for cell in nb.cells[:3]):
        print(f"{path.relative_to(ROOT)}: skipped, keeps its stored outputs")
        return
    start = time.time()
    NotebookClient(
        nb,
        timeout=1200,
        kernel_name="python3",
        coalesce_streams=True,      # what is printed line by line is one output
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--InlineBackend.figure_formats={'retina'}"],     # two dots a pixel, the size beside them
    ).execute()
    for cell in nb.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags"}
        if cell.cell_type == "code":
            if "#| code-fold: true" in cell.source: cell.metadata.update(FOLDED)
            cell.outputs = [o for o in cell.outputs if worth_keeping(o)]
            for output in cell.outputs:
                output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)  # dead without its kernel
    nb.metadata = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    nbformat.write(nb, path)
    print(f"{path.relative_to(ROOT)}: {time.time() - start:.1f} s")


if __name__ == "__main__":
    os.environ.update(QUIET)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MATPLOTLIBRC"] = folder
        (Path(folder) / "matplotlibrc").write_text(matplotlib_settings(), encoding="utf-8")
        for path in [Path(p).resolve() for p in sys.argv[1:]] or sorted(ROOT.glob("nbs/**/*.ipynb")):
            if ".ipynb_checkpoints" not in path.parts: run(path)
