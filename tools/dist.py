"""Build the source distribution and the wheel, and try both as a reader would: `python tools/dist.py [folder]`
(default dist).

Each is installed into an environment of its own, and the README's quick start runs there, away from the checkout.
`--tag v1.2.3` checks besides that the tag is the version. `--installed` builds with the tools that are installed, as a
release does with those of tools/release.txt, and fetches none. `--measure` writes what an installation costs into
results/installation.json, which the page "Your model, your data" shows.
"""
import argparse
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (["--help"], ["data", "--list"])


def run(*command: object, cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    "What a command prints; where it fails, its last lines and the end."
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            "\n".join([f"dist: this fails: {command[0]} ...", *(done.stdout + done.stderr).splitlines()[-20:]])
        )
    return done.stdout


STAND_INS = """
# Under the names of the README: a model of a few thousand weights, and pairs that it can learn.
import json
from pathlib import Path
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = "<pad> <end> <user> <assistant> say yes no".split()
split = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
split.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=split, pad_token="<pad>", eos_token="<end>")
tokenizer.chat_template = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% if m.role == 'assistant' %}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}")
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                     num_attention_heads=2))
for part in model, tokenizer: part.save_pretrained("models/HuggingFaceTB/SmolLM2-135M-Instruct")
chat = lambda answer: [{"role": "user", "content": "say yes"}, {"role": "assistant", "content": answer}]
rows = [{"prompt": "say yes", "chosen": chat("yes"), "rejected": chat("no")}] * 8
folder = Path("data/HuggingFaceH4/ultrafeedback_binarized/data")
folder.mkdir(parents=True)
(folder / "train_prefs-00000-of-00001.jsonl").write_text("\\n".join(map(json.dumps, rows)))
"""
END = """
import tokpref
assert trainer.state.global_step > 0
print(tokpref.__file__)
"""


def quick_start() -> str:
    "The first Python of the README, which trains."
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    if not blocks or "trainer.train()" not in blocks[0]:
        raise SystemExit("dist: the first Python of README.md does not train: end it with trainer.train()")
    return blocks[0]


def run_quick_start(python: Path, place: Path, **environment: str) -> str:
    "Where tokpref was taken from by the quick start, run as it stands, with stand-ins for its model and its pairs."
    (place / "quick_start.py").write_text(STAND_INS + quick_start() + END, encoding="utf-8")
    found = {"TOKPREF_MODELS": str(place / "models"), "TOKPREF_DATA": str(place / "data"), "HF_HUB_OFFLINE": "1"}
    printed = run(python, "quick_start.py", cwd=place, env=os.environ | found | environment)
    return printed.strip().splitlines()[-1]


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
        where = run_quick_start(binaries / "python", Path(place))
        for arguments in COMMANDS:
            run(binaries / "tokpref", *arguments, cwd=Path(place))
        if not Path(where).resolve().is_relative_to(Path(place).resolve()):
            raise SystemExit(f"dist: the quick start ran with {where}, not with what was installed")


LIBRARIES = ("torch", "transformers", "datasets", "peft", "accelerate", "matplotlib")
IMPORTS = {
    "nothing": "pass",
    "`torch`": "import torch",
    "`tokpref`": "import tokpref",
    "`torch`, `peft`, `datasets` and the `Trainer` of transformers": "import torch, peft, datasets; "
    "from transformers import Trainer",
    "`PreferenceTrainer` of tokpref": "from tokpref import PreferenceTrainer",
}


def processor_time(*command: object, cwd: Path) -> float:
    "Seconds of all processors together that a command takes."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run(*command, cwd=cwd)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def installation(source: Path, wheel: Path) -> dict:
    "What an installation costs: sizes in bytes, processor time in seconds; of an import, the least of three times."
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        run(sys.executable, "-m", "venv", place / "env")
        python = place / "env" / "bin" / "python"
        install = processor_time(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel, cwd=place)
        run(python, "-m", "pip", "check", cwd=place)
        times = {
            name: min(processor_time(python, "-c", code, cwd=place) for _ in range(3)) for name, code in IMPORTS.items()
        }
        loaded = run(python, "-c", "import sys, tokpref; print(*sorted({name.split('.')[0] for name in sys.modules}))",
                     cwd=place).split()
    bare = times.pop("nothing")
    return {"python": platform.python_version(), "wheel": wheel.stat().st_size, "source": source.stat().st_size,
            "pip": round(install, 1), "imports": {name: round(time - bare, 2) for name, time in times.items()},
            "libraries_of_the_package": [name for name in LIBRARIES if name in loaded]}


def version() -> str:
    "The version that settings.ini says."
    text = (ROOT / "settings.ini").read_text(encoding="utf-8")
    return re.findall(r"^version = (\S+)$", text, re.M)[0]


def main() -> None:
    "Build both and try both."
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "dist")
    parser.add_argument("--tag", default="", help="the tag that a release is made from")
    parser.add_argument("--measure", action="store_true", help="write results/installation.json, and try nothing")
    parser.add_argument("--installed", action="store_true", help="build with the tools that are installed here")
    arguments = parser.parse_args()
    if arguments.tag and arguments.tag != f"v{version()}":
        raise SystemExit(
            f"dist: the tag is {arguments.tag}, and settings.ini says version {version()}: tag v{version()}"
        )
    files = build(arguments.folder, *(["--no-isolation"] if arguments.installed else []))
    if arguments.measure:
        told = json.dumps(installation(*files), indent=1, ensure_ascii=False)
        (ROOT / "results" / "installation.json").write_text(told + "\n", encoding="utf-8")
        return
    for file in files:
        try_out(file)
        print(f"{file.name}: installs, and the quick start runs")


if __name__ == "__main__":
    main()
