"""From the cells of a notebook to one Markdown text: what is shown, what is folded, the figures with their captions."""
import ast
import base64
import hashlib
import html
import json
import posixpath
import re
import struct
import unicodedata
from dataclasses import dataclass, field

BADGE = re.compile(r"\[!\[([^\]]*)\]\(https://[^)]*badge[^)]*\)\]\(([^)]*)\)")
FORM_TITLE = re.compile(r"^#@title .*\n?", re.M)       # what Colab shows of a closed cell
DIRECTIVE = re.compile(r"^#\|\s*([\w-]+)\s*:?[ \t]*(.*)\n?", re.M)
SYMBOLS = {"alpha": "α", "beta": "β", "gamma": "γ", "lam": "λ", "tau": "τ", "epsilon": "ε"}
COLOURS = re.compile(r"\x1b\[[0-9;]*m")        # of a terminal
DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"      # they turn what follows around
OF_A_RECORD = re.compile(r"\b(?:stored_result|measured_runs)\(|\b(?:shown|record|runs|about|info)\b[\[.]|\bin runs\b")
EXPERIMENTS = ("experiments/tasks/", "library/engine/12_speed")      # pages that tell what came out of a run
CHECKING = {"assert_close", "gradcheck", "test_eq", "test_close", "test_fail", "test_ne", "raises"}


@dataclass
class Page:
    "A notebook on its way to a page."

    source: str                 # path below nbs/, as in the sidebar
    section: str                # heading of the sidebar it stands under
    text: str = ""              # what the sidebar calls it, if not by its title
    keywords: str = ""          # what a person may search for who means this page
    meta: dict = field(default_factory=dict)
    cells: list = field(default_factory=list)
    body: str = ""
    toc: list = field(default_factory=list)     # (level, id, html)
    figures: dict = field(default_factory=dict) # path below the site -> picture
    labels: dict = field(default_factory=dict)  # label of a figure -> how to refer to it
    drawn: int = 0                              # figures so far

    @property
    def url(self) -> str: return posixpath.join(posixpath.dirname(self.source), self.meta["output-file"])

    @property
    def title(self) -> str: return self.text or self.meta["title"]

    @property
    def promise(self) -> str:
        return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(self.meta.get("description", ""), quote=False))

    @property
    def top(self) -> str: return "../" * self.source.count("/")


def directives(cell) -> dict[str, str]:
    "The `#| name: value` lines of a code cell, taken out of its source."
    found = dict(DIRECTIVE.findall(cell.source))
    cell.source = FORM_TITLE.sub("", DIRECTIVE.sub("", cell.source)).strip("\n")
    return found


def fenced(text: str, attributes: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{{{attributes}}}\n{text.rstrip()}\n{fence}"


def visible(text: str) -> str:
    "Text as a terminal leaves it, without colours; what a terminal would obey is written out, as Python does."
    text = re.sub(r"[^\n]*\r(?!\n)", "", COLOURS.sub("", text)).replace("\r\n", "\n")
    obeyed = {sign for sign in set(text) - {"\n", "\t"} if unicodedata.category(sign) == "Cc" or sign in DIRECTIONS}
    return "".join(repr(sign)[1:-1] if sign in obeyed else sign for sign in text)


def plain(text: str) -> str:
    "The first sentence of some Markdown, without its markup: what a figure shows, for those who cannot see it."
    text = re.sub(r"\[?!\[[^\]]*\]\([^)]*\)(\]\([^)]*\))?|\$\$.*?\$\$|^\s*#+.*$|^:::.*$", "", text, flags=re.S | re.M)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)|[*_`#>\\]|\$", r"\1", text)
    return re.split(r"(?<=[.:?!])\s", " ".join(text.split()))[0][:300]


# Figures

def kept(page: Page, data: bytes, suffix: str) -> str:
    "Keeps a picture as a file of the site, equal ones once; where it is, as seen from the page."
    name = f"figures/{posixpath.splitext(page.meta['output-file'])[0]}-{hashlib.sha1(data).hexdigest()[:8]}.{suffix}"
    page.figures[posixpath.join(posixpath.dirname(page.url), name)] = data
    return name


def image_tag(source: str, width: int, height: int, alt: str) -> str:
    "A picture at the size it was drawn for; on a narrow screen it scrolls before its letters get too small to read."
    size = f'width="{width}" height="{height}" style="--wide:{width}px"'
    image = f'<img src="{source}" {size} alt="{html.escape(alt)}" loading="lazy">'
    return f'<div class="box"><div class="scroll">{image}</div></div>'


def captioned(page: Page, drawing: str, kind: str, options: dict) -> str:
    "A figure with its number and, if the cell gives one, its caption."
    page.drawn += 1
    label = options.get("label", f"fig-{page.drawn}").strip("\"'")
    page.labels[label] = f"figure&nbsp;{page.drawn}"
    said = unquoted(options.get("fig-cap") or options.get("fig-alt", ""))
    caption = f"<b>Figure {page.drawn}.</b> {html.escape(said, quote=False)}".strip()
    return f'<figure class="{kind}" id="{label}">{drawing}<figcaption>{caption}</figcaption></figure>'


def unquoted(value: str) -> str:
    "The text of a directive's value."
    value = value.strip()
    if value[:1] == '"' == value[-1:]: return json.loads(value, strict=False) if len(value) > 1 else ""
    return value.strip("'")


def described(options: dict, before: str) -> str:
    "What a figure shows: its own words, or the sentence before it. A caption that says the same is not said twice."
    if options.get("fig-cap") or not options.get("fig-alt"): return unquoted(options.get("fig-alt", "")) or before
    return "The figure that the caption describes"


def picture(page: Page, output, options: dict, before: str) -> str:
    "An image of a page."
    data = base64.b64decode(output.data["image/png"])
    width, height = struct.unpack(">II", data[16:24])
    size = output.get("metadata", {}).get("image/png", {})
    tag = image_tag(
        kept(page, data, "png"), size.get("width", width), size.get("height", height), described(options, before)
    )
    return captioned(page, tag, "figure", options)


def slider(name: str, i: int, label: str, last: str, at: str, said: list[str]) -> str:
    "One slider of a figure, labelled in symbols; `said` are its values in words."
    name, here = f"{name}-{i}", html.escape(said[int(at)])
    return (
        f'<div class="slider"><label for="{name}">{label}</label><input id="{name}" type="range" min="0" max="{last}" '
        f'value="{at}" aria-valuetext="{here}" data-said="{html.escape(json.dumps(said))}">'
        f'<output for="{name}">{here}</output></div>'
    )


def slides(page: Page, figure: str, options: dict, before: str) -> str:
    "A figure with sliders: its frames become files, fetched when they are wanted."
    first = re.search(r'<img[^>]* src="data:image/(\w+);base64,([\w+/=]+)"', figure)
    script = re.search(r'<script type="application/json">(.*?)</script>', figure, re.S)
    assert first is not None and script is not None
    data, suffix = base64.b64decode(first[2]), first[1]
    size = re.search(r'<img[^>]* width="(\d+)" height="(\d+)"', figure)
    width, height = map(int, size.groups()) if size else picture_size(data)
    frames = re.sub(
        r"data:image/(\w+);base64,([\w+/=]+)", lambda m: kept(page, base64.b64decode(m[2]), m[1]), script[1]
    )
    name = f"slide-{page.drawn + 1}"
    found = re.findall(r'<label>(\S+) <input [^>]*?max="(\d+)" value="(\d+)"[^>]*?data-said="([^"]*)"', figure)
    sliders = [
        slider(name, i, SYMBOLS.get(label) or label.replace("_", " "), last, at, json.loads(html.unescape(said)))
        for i, (label, last, at, said) in enumerate(found)
    ]
    watch = re.search(r"<p>(.*?)</p></figcaption>", figure, re.S)
    hint = f'<p class="watch"><b>Watch:</b> {watch[1]}</p>' if watch else ""
    tag = image_tag(kept(page, data, suffix), width, height, described(options, before))
    moved = f'{tag}<div class="sliders">{"".join(sliders)}{hint}</div><script type="application/json">{frames}</script>'
    return captioned(page, moved, "slides", options)


def picture_size(data: bytes) -> tuple[int, int]:
    "Width and height of a WebP or PNG in its own dots."
    if data[:4] == b"\x89PNG": return struct.unpack(">II", data[16:24])
    bits = int.from_bytes(data[21:25], "little")        # of a WebP without loss
    return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1


def upright(documentation: str) -> str:
    "What nbdev shows of a docstring, not in italics, which a π* would end; its examples as code, not as quotations."
    found = re.sub(r"^\*(?![*\s])((?:[^\n]|\n(?!\n))+?)\*$(?=\n\n|\n*\Z)", r"\1", documentation, flags=re.M)
    found = re.sub(r"π\*", r"π\\*", found)
    return re.sub(r"^>>> (?:.+(?:\n|\Z))+", lambda m: fenced(m[0], ".pycon") + "\n", found, flags=re.M)


def joined(outputs: list) -> list:
    "Outputs with what was printed in several pieces as one."
    whole: list = []
    for output in outputs:
        if whole and output.get("name") and output.get("name") == whole[-1].get("name"): whole[-1].text += output.text
        else: whole.append(output)
    return whole


def output_markdown(page: Page, output, options: dict, before: str) -> str:
    "What one output of a cell looks like on the page."
    data = output.get("data", {})
    if "text/markdown" in data: return upright(data["text/markdown"])
    if "class=\"slides\"" in data.get("text/html", ""):
        return fenced(slides(page, data["text/html"], options, before), "=html")
    if "image/png" in data: return fenced(picture(page, output, options, before), "=html")
    if "text/html" in data: return fenced('<div class="output">' + "".join(data["text/html"]) + "</div>", "=html")
    text = visible("".join(output.get("text", "") or data.get("text/plain", "")))
    return fenced(text, ".output" if re.search(r"\S {2,}\S|[─|]", text) else ".output .wrap") if text.strip() else ""


# What is folded

def exported(page: Page, code: str) -> list[str]:
    "Source that went into the package: in full where it is the lesson, folded below its documentation elsewhere."
    found = re.findall(r"^(?:(?:async )?def|class) (\w+)|^(\w+)(?:\[[^]]*\])?(?::[^=\n]*)? =", code, re.M)
    names = list(dict.fromkeys(a or b for a, b in found))
    anchors = "".join(
        f'<span id="{name.lower()}"></span>' for name in names if name.startswith("_")
    )  # nbdev links to these too
    if page.source.startswith("derivations"): return [anchors, "::: {.exported title=\"in the package\"}", code, ":::"]
    said = ", ".join(f"<code>{name}</code>" for name in names) or "these lines"
    return [anchors, *closed(f"Source of {said}", code)]


def closed(summary: str, code: str) -> list[str]:
    "Code that the story can do without, closed."
    return [f"<details class=\"source\"><summary>{summary}</summary>", code, "</details>"]


def called(statement: ast.AST) -> str:
    "The name of what a statement calls, or nothing."
    call = statement.value if isinstance(statement, ast.Expr) else statement
    if not isinstance(call, ast.Call): return ""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def checks(statement: ast.stmt) -> bool:
    "Whether a statement only checks something."
    if isinstance(statement, ast.Assert): return True
    if isinstance(statement, ast.Expr): return called(statement) in CHECKING
    if isinstance(statement, ast.With):
        if any(called(item.context_expr) in CHECKING for item in statement.items): return True
        return all(map(checks, statement.body))
    if isinstance(statement, ast.For): return all(map(checks, statement.body))
    return False


def refuses(statement: ast.stmt) -> bool:
    "Whether a statement tries what must not work, and prints what is said then."
    if isinstance(statement, ast.For): return all(map(refuses, statement.body))
    return isinstance(statement, ast.Try) and all("print" in ast.unparse(handler) for handler in statement.handlers)


def told_by_its_code(page: Page, cell) -> str:
    "The summary of a cell that the story can do without, told by its code; nothing for any other cell."
    try: body = ast.parse(cell.source).body
    except SyntaxError: return ""
    if not body: return ""
    if all(isinstance(statement, ast.Import | ast.ImportFrom) for statement in body): return "Imports"
    drawn = any("image/png" in output.get("data", {}) for output in cell.outputs)
    if not page.source.startswith("library/plots") and len(cell.source.splitlines()) > 3:
        if drawn: return "How the figure is drawn"
        draws = re.compile(r"\bax\.|\bplt\.|\bfig(ure)?\b")
        if all(isinstance(statement, ast.FunctionDef) and draws.search(ast.unparse(statement)) for statement in body):
            return "How the figure is drawn"
    comment = re.match(r"# (.{3,90})\n", cell.source)
    said = f": {html.escape(comment[1])}" if comment else ""
    if all(map(checks, body)): return f"Check{said}"
    if all(map(refuses, body)): return "Check: what is refused"
    if cell.outputs and page.source.startswith(EXPERIMENTS) and "compare(" not in cell.source:
        if OF_A_RECORD.search(cell.source): return "How it is read from the record"
    quiet = not cell.outputs and not page.source.startswith(("derivations", "index"))
    return f"Check{said}" if quiet and checks(body[-1]) else ""


def named(name: str, after) -> str:
    "In place of a function's documentation: a heading if its source, with all it documents, comes next, or an anchor."
    return f"### `{name}`" if after is not None and "code-fold: show" in after.source else f"[]{{#{name}}}"


def code_markdown(page: Page, cell, before: str, after) -> str:
    "A code cell: its source, unless it asks not to be shown, and its outputs."
    shown = re.match(r"show_doc\((\w+)\)", DIRECTIVE.sub("", cell.source))
    options = directives(cell)
    if "hide" in options or options.get("include") == "false": return ""
    if shown and page.source.startswith("derivations"): return named(shown[1], after)
    parts = [fenced(visible(cell.source), ".python")] if cell.source.strip() and options.get("echo") != "false" else []
    fold, summary = options.get("code-fold"), html.escape(unquoted(options.get("code-summary", "")))
    if fold is None: summary = told_by_its_code(page, cell)
    if parts and fold == "show": parts = exported(page, parts[0])
    elif parts and (fold == "true" or summary) and fold != "false": parts = closed(summary or "Code", parts[0])
    return "\n\n".join([*parts, *(output_markdown(page, o, options, before) for o in joined(cell.outputs))])


def page_markdown(page: Page) -> str:
    "The whole page as one Markdown text."
    parts, before = [], page.meta["title"]
    for cell, after in zip(page.cells, [*page.cells[1:], None], strict=True):
        if cell.cell_type == "markdown":
            parts.append(BADGE.sub(r"[\1](\2){.badge}", cell.source))      # the picture would have to be fetched
            before = plain(cell.source) or before
        elif cell.cell_type == "code": parts.append(code_markdown(page, cell, before, after))
    return "\n\n".join(part for part in parts if part)
