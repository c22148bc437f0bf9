"""Render the site: `python tools/build_site.py [folder]` (default _site), or `make site`.

Takes the notebooks and `_quarto.yml`, and writes pages that open from disk with no network. site_docs.py adds the
documentation, site_cells.py makes one Markdown text of a notebook, pandoc HTML of that, site_html.py what is left:
KaTeX the formulas (as HTML, once, here), Pygments the colours. MiniSearch does the search.
"""
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jinja2
import nbformat
import pypandoc
import yaml
from site_cells import Page, code_markdown, kept, page_markdown
from site_html import (
    anchor_headings,
    anchor_words,
    code_boxes,
    explain_words,
    link_papers,
    names,
    promoted,
    prose,
    read_words,
    typeset,
)

__all__ = ["Page", "SiteError", "build", "code_markdown", "process_notebooks"]

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
PARTS, MODULES = TOOLS / "site", TOOLS / "site" / "node_modules"
MARKDOWN = "markdown+lists_without_preceding_blankline-implicit_figures-citations-tex_math_single_backslash"
EQUATION = re.compile(r"\$\$(?P<tex>(?:(?!\$\$).)+?)\$\$[ \t]*\{#(?P<id>eq-[\w-]+)\}", re.S)
CALLOUT = re.compile(
    r"^(:{3,} *\{[^}\n]*\.callout-(\w+)(?:[^}\n]*title=\"([^\"]*)\")?[^}\n]*\})\n+(?:#+ (.*)\n)?", re.M
)
REFERENCE = re.compile(r"(?<![\w`@/])@((?:eq|fig|sec|tbl)-[\w-]*\w)")
NAME_LINK = re.compile(r"\[(`[^`\n]+`)\]\([^)\s]*\)")         # nbdev links a name, in a link of ours too
LINK_IN_LINK = re.compile(r"\[((?:[^\[\]]*\[`[^`\n]+`\]\([^)\s]*\))+[^\[\]]*)\]\(")
OPTION = re.compile(r"(?<![-\w!\\|:])--([a-z][\w-]*)")       # of a command, in a text, where pandoc makes dashes
GLOSSARY = "derivations/words.ipynb"


class SiteError(Exception):
    "Something on a page that a reader would stumble on."


def process_notebooks() -> None:
    "The notebooks into _proc/, in a process of its own: it imports the package that lies in ROOT."
    code = [sys.executable, "-W", "ignore", TOOLS / "site_docs.py"]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True)
    if done.returncode: raise SiteError(done.stderr.strip())


def site_description() -> dict:
    "_quarto.yml over what nbdev writes from settings.ini."
    own, nbdev = (
        yaml.safe_load((ROOT / "_proc" / name).read_text(encoding="utf-8")) for name in ("_quarto.yml", "nbdev.yml")
    )
    return {**nbdev["website"], **own["website"]}


def read_pages(site: dict) -> list[Page]:
    "The notebooks of the sidebar, in its order."
    pages = []
    for entry in site["sidebar"]["contents"]:
        for item in entry.get("contents", [entry]):
            item = {"href": item} if isinstance(item, str) else item
            pages.append(Page(item["href"], entry.get("section", ""), item.get("text", ""), item.get("keywords", "")))
    for page in pages:
        cells = nbformat.read(ROOT / "_proc" / page.source, as_version=4).cells
        page.meta, page.cells = yaml.safe_load(cells[0].source.strip().strip("-")), cells[1:]
    return pages


# Equations, references, links

def number_equations(text: str) -> tuple[str, dict[str, str]]:
    "Display formulas with a label get a number and an anchor; returns also label -> how to refer to it."
    labels: dict[str, str] = {}

    def one(match):
        labels[match["id"]] = f"equation&nbsp;{len(labels) + 1}"
        return f"\n\n::: {{#{match['id']} .equation}}\n$${match['tex'].rstrip()} \\tag{{{len(labels)}}}$$\n:::\n\n"
    return EQUATION.sub(one, text), labels


def resolve(page: Page, pages: list[Page], site: dict, markdown: str) -> str:
    "Equations get numbers, references to them words; links to notebooks lead to pages, others to the repository."
    markdown = LINK_IN_LINK.sub(lambda m: "[" + NAME_LINK.sub(r"\1", m[1]) + "](", markdown)
    blocks = re.split(r"(^(`{3,}).*?^\2\s*$|`[^`\n]+`)", markdown, flags=re.S | re.M)
    texts = [block for i, block in enumerate(blocks) if i % 3 != 2]     # the fence itself is a group of its own
    joined = "\0".join(text if i % 2 == 0 else f"\1{i}\1" for i, text in enumerate(texts))
    joined = OPTION.sub(r"[\\-\\-\1]{.nb}", joined)
    joined = CALLOUT.sub(lambda m: f"{m[1]}\n[{m[4] or m[3] or m[2].capitalize()}]{{.title}}\n\n", joined)
    joined, labels = number_equations(joined)
    labels |= page.labels
    missing = [label for label in REFERENCE.findall(joined) if label not in labels]
    if missing: raise SiteError(f"{page.source}: @{missing[0]} refers to nothing on this page")
    joined = REFERENCE.sub(lambda m: f"[{labels[m[1]]}](#{m[1]})", joined)
    joined = re.sub(r"(?<!!)(\[[^\]]*\])\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)",
                    lambda m: f"{m[1]}({link(page, pages, site, m[2])}{m[3] or ''})", joined)
    joined = re.sub(
        rf"(\]\(){re.escape(site['site-url'])}/([^)#\s]+\.html(?:#\w+)?)(?:\.\w+)?",     # of a method, to its class
        lambda m: m[1] + posixpath.relpath(m[2], posixpath.dirname(page.source) or "."),
        joined,
    )
    joined = re.sub(r"(!\[[^\]]*\]\()(?!https?:|data:)([^)\s]+)\)", lambda m: f"{m[1]}{image(page, m[2])})", joined)
    return re.sub("\1(\\d+)\1", lambda m: texts[int(m[1])], joined).replace("\0", "")


def image(page: Page, target: str) -> str:
    "A picture of the repository, kept with the page's other figures; where it is, as seen from the page."
    path = (ROOT / "nbs" / posixpath.dirname(page.source) / target).resolve()
    if not path.exists(): raise SiteError(f"{page.source}: there is no picture {target}")
    return kept(page, path.read_bytes(), path.suffix[1:])


def link(page: Page, pages: list[Page], site: dict, target: str) -> str:
    "Where a link leads, as seen from `page`: to another page, or to a file in the repository."
    path = posixpath.normpath(posixpath.join("nbs", posixpath.dirname(page.source), target))
    found = next((p for p in pages if f"nbs/{p.source}" == path), None)
    if found: return posixpath.relpath(found.url, posixpath.dirname(page.source) or ".")
    if path.endswith(".ipynb") or not (ROOT / path).exists():
        raise SiteError(f"{page.source}: a link leads to {target}, which is no page and no file")
    return f"{site['repo-url']}/blob/{site['repo-branch']}/{path}"


# From Markdown to HTML

def headings(body: str) -> list[tuple[int, str, str]]:
    "(level, id, inner HTML) of the second and third level headings."
    return [
        (int(level), id, inner)
        for level, id, inner in re.findall(r'<h([23])[^>]* id="([^"]+)"[^>]*>(.*?)</h\1>', body, re.S)
    ]


def search_entries(page: Page, raw: str) -> list[dict]:
    "One entry a section of what pandoc wrote: where it is, what it is called, its sentences, its names of code."
    parts = re.split(r'<h[23][^>]* id="([^"]+)"[^>]*>(.*?)</h[23]>', raw, flags=re.S)
    sections = [("", "", parts[0]), *zip(parts[1::3], parts[2::3], parts[3::3], strict=True)]
    entries = []
    for id, heading, text in sections:
        title, entry = prose(heading), {"url": page.url + (f"#{id}" if id else ""), "page": page.title}
        if id: entry["title"] = title
        else: entry |= {"promise": page.meta.get("description", "").replace("`", ""), "keywords": page.keywords}
        entries.append(entry | {"text": prose(text)[:3000], "code": names(text)[:3000]})
    return entries


def sidebar(pages: list[Page]) -> list[tuple[str, list[Page]]]:
    "Sections with their pages, in order."
    groups: dict[str, list[Page]] = {}
    for page in pages: groups.setdefault(page.section, []).append(page)
    return list(groups.items())


def copy_assets(folder: Path) -> None:
    "Styles, scripts and fonts, so that nothing is fetched from elsewhere."
    assets = folder / "assets"
    (assets / "fonts").mkdir(parents=True)
    for name in ("site.css", "site.js"): shutil.copy(PARTS / name, assets)
    shutil.copytree(ROOT / "nbs" / "images", folder / "images")
    shutil.copy(MODULES / "minisearch" / "dist" / "umd" / "index.js", assets / "minisearch.js")
    shutil.copy(MODULES / "katex" / "dist" / "katex.min.css", assets)
    for font in (MODULES / "katex" / "dist" / "fonts").glob("*.woff2"): shutil.copy(font, assets / "fonts")


def write_lists(folder: Path, site: dict, pages: list[Page], raw: list[str]) -> None:
    "What machines read: the search index, the sitemap, llms.txt."
    found = (entry for page, body in zip(pages, raw, strict=True) for entry in search_entries(page, body))
    entries = [entry | {"id": i} for i, entry in enumerate(found)]
    (folder / "assets" / "index.js").write_text(
        f"const PAGES = {json.dumps(entries, ensure_ascii=False)};\n", encoding="utf-8"
    )
    urls = "".join(f"<url><loc>{site['site-url']}/{page.url}</loc></url>" for page in pages)
    (folder / "sitemap.xml").write_text(f'<?xml version="1.0" encoding="UTF-8"?>\n<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">{urls}</urlset>\n')
    lines = [f"# {site['title']}\n\n> {site['description']}\n"]
    for section, group in sidebar(pages):
        lines += [
            f"\n## {section or 'Start'}\n",
            *(f"- [{p.title}]({site['site-url']}/{p.url}): {p.meta.get('description', '')}" for p in group),
        ]
    (folder / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def to_html(markdown: str) -> str:
    "What pandoc makes of a page."
    options = ["--katex", "--wrap=none", "--syntax-highlighting=none"]
    return promoted(pypandoc.convert_text(markdown, "html5", MARKDOWN, extra_args=options))


def finish(pages: list[Page], raw: list[str]) -> None:
    "The text of each page and its contents, from what pandoc wrote."
    for page, body in zip(pages, typeset([code_boxes(body) for body in raw], SiteError), strict=True):
        page.body, page.toc = link_papers(body), headings(body)
    glossary = next((page for page in pages if page.source == GLOSSARY), None)
    words = read_words(glossary.body) if glossary else []
    for page in pages:
        if page is glossary: page.body = anchor_words(page.body, words)
        elif glossary and page.source.startswith("derivations/"):
            page.body = explain_words(page.body, words, posixpath.basename(glossary.url))
        page.body = anchor_headings(page.body)


def write_pages(folder: Path, site: dict, pages: list[Page]) -> None:
    "Every page, its figures, and the page for addresses that lead nowhere."
    parts = [
        {"text": item["text"], "url": next(p.url for p in pages if p.source == item["href"])}
        for item in site["navbar"]["left"]
    ]
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(PARTS), autoescape=False)
    around = {"site": site, "parts": parts, "sidebar": sidebar(pages)}
    for i, page in enumerate(pages):
        near = {"before": pages[i - 1] if i else None, "after": pages[i + 1] if i + 1 < len(pages) else None}
        path = folder / page.url
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            templates.get_template("page.html").render(page=page, top=page.top, **around, **near), encoding="utf-8"
        )
        for name, data in page.figures.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    home = re.sub(r"^https?://[^/]*", "", site["site-url"]) + "/"       # a lost address can lie in any folder
    lost = templates.get_template("404.html").render(top=home, **around)
    (folder / "404.html").write_text(lost, encoding="utf-8")


def build(folder: Path) -> list[Page]:
    "The whole site into `folder`, which is emptied first."
    process_notebooks()
    site = site_description()
    pages = read_pages(site)
    markdown = [resolve(page, pages, site, text) for page in pages for text in [page_markdown(page)]]
    with ThreadPoolExecutor(os.cpu_count()) as threads: raw = list(threads.map(to_html, markdown))
    finish(pages, raw)
    shutil.rmtree(folder, ignore_errors=True)
    copy_assets(folder)
    write_pages(folder, site, pages)
    write_lists(folder, site, pages, raw)
    return pages


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "_site").resolve()
    try: pages = build(folder)
    except SiteError as e: sys.exit(str(e))
    print(f"{len(pages)} pages: open {folder.name}/index.html")
