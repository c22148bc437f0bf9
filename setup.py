"""Everything about the package is said once, in settings.ini; this file hands it to setuptools."""
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
LINK = re.compile(r"(!?)(\[[^\]]*\]\()(?!https?:|#)([^)\s]+)\)")

config = ConfigParser(delimiters=["="])
config.read(HERE / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
repository, branch = cfg["git_url"], cfg["branch"]
pictures = f"https://raw.githubusercontent.com/{repository.removeprefix('https://github.com/')}/{branch}"


def absolute(link: re.Match) -> str:
    "A link of the README as PyPI needs it, which shows no relative ones: to a picture itself, or to a file's page."
    return f"{link[1]}{link[2]}{pictures if link[1] else f'{repository}/blob/{branch}'}/{link[3]})"


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=LINK.sub(absolute, (HERE / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=repository,
    project_urls={
        "Documentation": cfg["doc_host"] + cfg["doc_baseurl"],
        "Changes": f"{repository}/blob/{branch}/CHANGELOG.md",
    },
    license="Apache-2.0",
    keywords=cfg["keywords"],
    packages=[*find_packages(include=["tokpref", "tokpref.*"]), "tokpref.results"],
    package_dir={"tokpref.results": "results"},    # records of measured runs, which chapters read
    package_data={
        "tokpref": ["py.typed", "**/*.yaml", "**/*.toml", "**/*.json", "**/*.jsonl"],
        "tokpref.results": ["*.json"],
    },
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={
        extra: cfg[f"{extra}_requirements"].split()
        for extra in ("notebooks", "dev", "site", "tensorboard", "quantization")
    },
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
