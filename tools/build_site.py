"""Render the site without Quarto: `python tools/build_site.py [folder]` (default _site), or `make site`.

Takes what Quarto would take, the notebooks as `nbdev_proc_nbs` leaves them and `_quarto.yml`, and writes pages that
open from disk with no network. pandoc does the Markdown, KaTeX the formulas (as HTML, once, here), MiniSearch the
search. Where Quarto is installed, `nbdev_docs` renders the same pages.
"""
import base64
import hashlib
import html
import json
import posixpath
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import nbformat
import pypandoc
import yaml

ROOT = Path(__file__).resolve().parent.parent
PARTS, MODULES = ROOT / "tools" / "site", ROOT / "tools" / "site" / "node_modules"
MARKDOWN = "markdown+lists_without_preceding_blankline-implicit_figures-citations-tex_math_single_backslash"
EQUATION = re.compile(r"\$\$(?P<tex>(?:(?!\$\$).)+?)\$\$[ \t]*\{#(?P<id>eq-[\w-]+)\}", re.S)
BADGE = re.compile(r"\[!\[([^\]]*)\]\(https://[^)]*badge[^)]*\)\]\(([^)]*)\)")
CALLOUT = re.compile(
    r"^(:{3,} *\{[^}\n]*\.callout-(\w+)(?:[^}\n]*title=\"([^\"]*)\")?[^}\n]*\})\n+(?:#+ (.*)\n)?", re.M
)
REFERENCE = re.compile(r"(?<![\w`@/])@((?:eq|fig|sec|tbl)-[\w-]*\w)")
INDENT = re.compile(r'(<span id="cb[\d-]+")>(<a [^>]*></a>)( +)')  # a line of code that does not begin at the margin
LONG = re.compile(r"<td(?=[^>]*>[^\n]{60,}</td>)")      # a cell of a table with a sentence in it
FORM_TITLE = re.compile(r"^#@title .*\n?", re.M)       # what Colab shows of a closed cell
DIRECTIVE = re.compile(r"^#\|\s*([\w-]+)\s*:?[ \t]*(.*)\n?", re.M)


class SiteError(Exception):
    "Something on a page that a reader would stumble on."


@dataclass
class Page:
    "A notebook on its way to a page."

    source: str                 # path below nbs/, as in the sidebar
    section: str                # heading of the sidebar it stands under
    text: str = ""              # what the sidebar calls it, if not by its title
    meta: dict = field(default_factory=dict)
    cells: list = field(default_factory=list)
    body: str = ""
    toc: list = field(default_factory=list)     # (level, id, html)
    figures: dict = field(default_factory=dict) # path below the site -> PNG

    @property
    def url(self) -> str: return posixpath.join(posixpath.dirname(self.source), self.meta["output-file"])

    @property
    def title(self) -> str: return self.text or self.meta["title"]

    @property
    def promise(self) -> str:
        return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(self.meta.get("description", ""), quote=False))

    @property
    def top(self) -> str: return "../" * self.source.count("/")


def process_notebooks() -> None:
    "What `nbdev_proc_nbs` does, into _proc/; called from inside, since the command would first try to install Quarto."
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from nbdev.quarto import refresh_quarto_yml as r; from nbdev.serve import proc_nbs as p; r(); p()",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode == 0: return
    where = re.search(r"Error in notebook: ([^\n]*) in cell \d+ :\n(.*?)\n\"\"\"", done.stderr, re.S)
    error = re.search(r"^\w*(?:Error|Exception)\b.*$", done.stderr, re.M)
    if not where: raise SiteError(f"nbdev cannot process the notebooks:\n{done.stderr.strip()}")
    files = [path for path in (ROOT / "nbs").rglob("*.ipynb") if f"\"# {where[1]}" in path.read_text(encoding="utf-8")]
    raise SiteError(
        f"{files[0].relative_to(ROOT) if files else where[1]}: {error[0] if error else 'an error'}\nin this cell, "
        f"which nbdev runs because it imports or exports, without the cells around it:\n\n{where[2]}\n\n"
        "Mend it; imports stand in cells of their own."
    )


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
            pages.append(Page(item["href"], entry.get("section", ""), item.get("text", "")))
    for page in pages:
        cells = nbformat.read(ROOT / "_proc" / page.source, as_version=4).cells
        page.meta, page.cells = yaml.safe_load(cells[0].source.strip().strip("-")), cells[1:]
    return pages


# From cells to Markdown

def directives(cell) -> dict[str, str]:
    "The `#| name: value` lines of a code cell, taken out of its source."
    found = dict(DIRECTIVE.findall(cell.source))
    cell.source = FORM_TITLE.sub("", DIRECTIVE.sub("", cell.source)).strip("\n")
    return found


def fenced(text: str, attributes: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{{{attributes}}}\n{text.rstrip()}\n{fence}"


def plain(text: str) -> str:
    "The first sentence of some Markdown, without its markup: what a figure shows, for those who cannot see it."
    text = re.sub(r"\[?!\[[^\]]*\]\([^)]*\)(\]\([^)]*\))?|\$\$.*?\$\$|^\s*#+.*$|^:::.*$", "", text, flags=re.S | re.M)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)|[*_`#>\\]|\$", r"\1", text)
    return re.split(r"(?<=[.:?!])\s", " ".join(text.split()))[0][:300]


def kept(page: Page, data: bytes, suffix: str) -> str:
    "Keeps a picture as a file of the site, equal ones once; where it is, as seen from the page."
    name = f"figures/{posixpath.splitext(page.meta['output-file'])[0]}-{hashlib.sha1(data).hexdigest()[:8]}.{suffix}"
    page.figures[posixpath.join(posixpath.dirname(page.url), name)] = data
    return name


def picture(page: Page, png: str, alt: str) -> str:
    "An image of a page, at the size it was drawn for."
    data = base64.b64decode(png)
    width, height = struct.unpack(">II", data[16:24])
    source = kept(page, data, "png")
    size = f'width="{width}" height="{height}"'
    return f'<p class="figure"><img src="{source}" {size} alt="{html.escape(alt)}" loading="lazy"></p>'


def slides(page: Page, figure: str, alt: str) -> str:
    "A figure with sliders: its frames become files, fetched when they are wanted."
    figure = re.sub(r"data:image/(\w+);base64,([\w+/=]+)", lambda m: kept(page, base64.b64decode(m[2]), m[1]), figure)
    return re.sub(r'alt="[^"]*"', f'alt="{html.escape(alt)}"', figure, count=1)


def output_markdown(page: Page, output, options: dict, alt: str) -> str:
    "What one output of a cell looks like on the page."
    data, alt = output.get("data", {}), options.get("fig-alt", "").strip("\"'") or alt
    if "text/markdown" in data: return data["text/markdown"]
    if "class=\"slides\"" in data.get("text/html", ""): return fenced(slides(page, data["text/html"], alt), "=html")
    if "image/png" in data: return "```{=html}\n" + picture(page, data["image/png"], alt) + "\n```"
    if "text/html" in data: return "```{=html}\n<div class=\"output\">" + "".join(data["text/html"]) + "</div>\n```"
    text = "".join(output.get("text", "") or data.get("text/plain", ""))
    return fenced(text, ".output" if re.search(r"\S {2,}\S|[─|]", text) else ".output .wrap") if text.strip() else ""


def exported(page: Page, code: str) -> list[str]:
    "Source that went into the package: in full where it is the lesson, folded below its documentation elsewhere."
    found = re.findall(r"^(?:(?:async )?def|class) (\w+)|^(\w+)(?:\[[^]]*\])?(?::[^=\n]*)? =", code, re.M)
    names = list(dict.fromkeys(a or b for a, b in found))
    anchors = "".join(
        f'<span id="{name.lower()}"></span>' for name in names if name.startswith("_")
    )  # nbdev links to these too
    if page.source.startswith("derivations"): return [anchors, "::: {.exported title=\"in the package\"}", code, ":::"]
    said = ", ".join(f"<code>{name}</code>" for name in names) or "these lines"
    return [anchors, f"<details class=\"source\"><summary>Source of {said}</summary>", code, "</details>"]


def folded(options: dict, code: str) -> list[str]:
    "Code that the story can do without, closed; `#| code-summary` says what is in it."
    said = html.escape(options.get("code-summary", "").strip("\"'") or "Code")
    return [f"<details class=\"source\"><summary>{said}</summary>", code, "</details>"]


def named(name: str, after) -> str:
    "In place of a function's documentation: a heading if its source, with all it documents, comes next, or an anchor."
    return f"### `{name}`" if after is not None and "code-fold: show" in after.source else f"[]{{#{name}}}"


def code_markdown(page: Page, cell, before: str, after) -> str:
    "A code cell: its source, unless it asks not to be shown, and its outputs."
    shown = re.match(r"show_doc\((\w+)\)", DIRECTIVE.sub("", cell.source))
    options = directives(cell)
    if "hide" in options or options.get("include") == "false": return ""
    if shown and page.source.startswith("derivations"): return named(shown[1], after)
    parts = [fenced(cell.source, ".python")] if cell.source.strip() and options.get("echo") != "false" else []
    if options.get("code-fold") == "show" and parts: parts = exported(page, parts[0])
    if options.get("code-fold") == "true" and parts: parts = folded(options, parts[0])
    return "\n\n".join([*parts, *(output_markdown(page, o, options, before) for o in cell.outputs)])


def page_markdown(page: Page) -> str:
    "The whole page as one Markdown text."
    parts, before = [], page.meta["title"]
    for cell, after in zip(page.cells, [*page.cells[1:], None], strict=True):
        if cell.cell_type == "markdown":
            parts.append(BADGE.sub(r"[\1](\2){.badge}", cell.source))      # the picture would have to be fetched
            before = plain(cell.source) or before
        elif cell.cell_type == "code": parts.append(code_markdown(page, cell, before, after))
    return "\n\n".join(part for part in parts if part)


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
    blocks = re.split(r"(^(`{3,}).*?^\2\s*$|`[^`\n]+`)", markdown, flags=re.S | re.M)
    texts = [block for i, block in enumerate(blocks) if i % 3 != 2]     # the fence itself is a group of its own
    joined = "\0".join(text if i % 2 == 0 else f"\1{i}\1" for i, text in enumerate(texts))
    joined = CALLOUT.sub(lambda m: f"{m[1]}\n[{m[4] or m[3] or m[2].capitalize()}]{{.title}}\n\n", joined)
    joined, labels = number_equations(joined)
    missing = [label for label in REFERENCE.findall(joined) if label not in labels]
    if missing: raise SiteError(f"{page.source}: @{missing[0]} refers to nothing on this page")
    joined = REFERENCE.sub(lambda m: f"[{labels[m[1]]}](#{m[1]})", joined)
    joined = re.sub(r"(?<!!)(\[[^\]]*\])\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)",
                    lambda m: f"{m[1]}({link(page, pages, site, m[2])}{m[3] or ''})", joined)
    joined = re.sub(
        rf"(\]\(){re.escape(site['site-url'])}/([^)#\s]+\.html)",
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


def typeset(bodies: list[str]) -> list[str]:
    "Every formula as HTML, in one run of KaTeX; a formula it cannot read is an error."
    formula = re.compile(r'<span class="math (inline|display)">(.*?)</span>', re.S)
    found = [
        {"tex": html.unescape(tex), "display": kind == "display"}
        for body in bodies
        for kind, tex in formula.findall(body)
    ]
    stray = next((f["tex"] for f in found if "](#eq-" in f["tex"] or "@eq-" in f["tex"]), None)
    if stray: raise SiteError(f"a formula cannot hold a reference: {stray}")
    done = subprocess.run(
        ["node", PARTS / "katex.mjs"], input=json.dumps(found), capture_output=True, text=True, cwd=PARTS
    )
    if done.returncode: raise SiteError(done.stderr.strip())
    rendered = iter(json.loads(done.stdout))
    return [formula.sub(lambda m: f'<span class="math {m[1]}">{next(rendered)}</span>', body) for body in bodies]


def search_entries(page: Page) -> list[dict]:
    "One entry a section: where it is and its words."
    parts = re.split(r'<h[23][^>]* id="([^"]+)"[^>]*>(.*?)</h[23]>', page.body, flags=re.S)
    words = lambda text: " ".join(
        html.unescape(
            re.sub(r"<[^>]+>", " ", re.sub(r'<span class="math.*?</math>.*?</span></span>', " ", text, flags=re.S))
        ).split()
    )
    sections = [("", "", parts[0]), *zip(parts[1::3], parts[2::3], parts[3::3], strict=True)]
    return [
        {
            "url": page.url + (f"#{id}" if id else ""),
            "page": page.title,
            "title": words(heading),
            "text": words(text)[:4000],
        }
        for id, heading, text in sections
    ]


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


def write_lists(folder: Path, site: dict, pages: list[Page]) -> None:
    "What machines read: the search index, the sitemap, llms.txt."
    entries = [entry | {"id": i} for i, entry in enumerate(e for page in pages for e in search_entries(page))]
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


def build(folder: Path) -> list[Page]:
    "The whole site into `folder`, which is emptied first."
    process_notebooks()
    site = site_description()
    pages = read_pages(site)
    for page in pages:
        markdown = resolve(page, pages, site, page_markdown(page))
        body = pypandoc.convert_text(
            markdown, "html5", MARKDOWN, extra_args=["--katex", "--wrap=none", "--syntax-highlighting=default"]
        )
        body = INDENT.sub(lambda m: f'{m[1]} style="--in:{len(m[3])}ch">{m[2]}{m[3]}', body)
        page.body = LONG.sub('<td class="long"', body)
    for page, body in zip(pages, typeset([page.body for page in pages]), strict=True):
        page.body, page.toc = body, headings(body)
    shutil.rmtree(folder, ignore_errors=True)
    copy_assets(folder)
    parts = [
        {"text": item["text"], "url": next(p.url for p in pages if p.source == item["href"])}
        for item in site["navbar"]["left"]
    ]
    template = jinja2.Environment(loader=jinja2.FileSystemLoader(PARTS), autoescape=False).get_template("page.html")
    for i, page in enumerate(pages):
        around = {"before": pages[i - 1] if i else None, "after": pages[i + 1] if i + 1 < len(pages) else None}
        path = folder / page.url
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            template.render(page=page, site=site, parts=parts, sidebar=sidebar(pages), **around), encoding="utf-8"
        )
        for name, data in page.figures.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    write_lists(folder, site, pages)
    return pages


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "_site").resolve()
    try: pages = build(folder)
    except SiteError as e: sys.exit(str(e))
    print(f"{len(pages)} pages: open {folder.name}/index.html")
