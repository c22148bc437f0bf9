"""Everything about the package is said once, in settings.ini; this file hands it to setuptools."""
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
repository = cfg["git_url"].removeprefix("https://github.com/")
kinds = {"!": f"https://raw.githubusercontent.com/{repository}/{cfg['branch']}", "": f"{cfg['git_url']}/blob/{cfg['branch']}"}
readme = re.sub(r"(!?)(\[[^\]]*\]\()(?!https?:|#)([^)\s]+)\)", lambda m: f"{m[1]}{m[2]}{kinds[m[1]]}/{m[3]})",    # PyPI shows no relative links
                (here / "README.md").read_text(encoding="utf-8"))

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme,
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"], "Changes": f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md"},
    license="Apache-2.0",
    keywords=cfg["keywords"],
    packages=find_packages(include=["tokpref", "tokpref.*"]),
    package_data={"tokpref": ["**/*.yaml", "**/*.json", "**/*.jsonl", "**/*.toml"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={extra: cfg[f"{extra}_requirements"].split() for extra in ("notebooks", "dev", "site")},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Developers", "Intended Audience :: Education",
                 "Intended Audience :: Science/Research", "License :: OSI Approved :: Apache Software License",
                 "Topic :: Scientific/Engineering :: Artificial Intelligence"]
                + [f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)],
)
