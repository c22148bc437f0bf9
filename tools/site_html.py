"""What a page's HTML gets after pandoc: colours of code, formulas, boxes that scroll, links, words with meanings."""
import functools
import html
import itertools
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from pygments.lexers import get_lexer_by_name
from pygments.token import Comment, Keyword, Name, Number, Operator, String
from pygments.util import ClassNotFound

PARTS = Path(__file__).resolve().parent / "site"
CODE = re.compile(r'<pre class="(?!output)([\w-]+)"><code>(.*?)</code></pre>', re.S)
OUTPUT = re.compile(r'<pre class="(output[^"]*)"><code>(.*?)</code></pre>', re.S)
PLAIN = re.compile(r"<pre><code>(.*?)</code></pre>", re.S)
TABLE = re.compile(r"<table.*?</table>", re.S)
FORMULA = re.compile(r'<span class="math (inline|display)">(.*?)</span>([,.;:!?)’]*)', re.S)    # with what follows it
HEADING = re.compile(r'<h([23])([^>]*) id="([^"]+)"([^>]*)>(.*?)</h\1>', re.S)
ALIGNED = re.compile(r"^(.*?)\\begin\{(aligned|alignedat)\}(?:\{\d+\})?(.*)\\end\{\2\}(.*)$", re.S)
PAPER = re.compile(r"(?:https?://(?:www\.)?arxiv\.org/(?:abs|pdf)/|arXiv[:\s]\s*)(\d{4}\.\d{4,5})(?:v\d+)?\b", re.I)
NUMBER = re.compile(r"(?<![\w.])((?:0[7-9]|1\d|2\d)(?:0[1-9]|1[0-2])\.\d{5})(?:v\d+)?\b(?!\.\d)")
OPTION = re.compile(r"(?<![\w-])--?[a-zA-Z][\w-]*")
BREAKABLE = re.compile(r"[^\w\s]\S")     # a browser may break a run of characters at such places
COLORS = [(Comment, "co"), (Keyword.Constant, "nu"), (Keyword, "kw"), (Operator.Word, "kw"), (Name.Builtin.Pseudo, ""),
          (Name.Builtin, "fn"), (Name.Function, "fn"), (Name.Class, "fn"), (Name.Decorator, "fn"), (Name.Tag, "kw"),
          (String, "st"), (Number, "nu")]
VOID = {"img", "br", "hr", "input", "meta", "link", "col", "wbr"}


# Code

def colored(code: str, language: str) -> str:
    "Code as lines of coloured parts; a line that must wrap hangs below its own beginning and breaks at spaces only."
    code = re.sub(r"\[(`[^`]+`)\]\(https?://[^)\s]*\)", r"\1", code)     # a link that nbdev set in a comment
    try: lexer = get_lexer_by_name(language, stripnl=False)
    except ClassNotFound: lexer = get_lexer_by_name("text", stripnl=False)
    papers = set(re.findall(r"arXiv[:\s]+(\d{4}\.\d{4,5})", code, re.I))
    lines: list[list[tuple[str, str]]] = [[]]
    for kind, value in lexer.get_tokens(code):
        color = color_of(kind)
        first, *rest = value.split("\n")
        if lines[-1] and lines[-1][-1][0] == color: lines[-1][-1] = (color, lines[-1][-1][1] + first)
        else: lines[-1].append((color, first))
        for part in rest: lines.append([(color, part)])
    while lines and not any(value for _, value in lines[-1]): lines.pop()
    shown = "".join(code_line(parts) for parts in lines)
    for number in papers: shown = shown.replace(number, f'<a href="https://arxiv.org/abs/{number}">{number}</a>')
    return shown


@functools.cache
def color_of(kind) -> str:
    "The class of a kind of token; nothing for plain text."
    return next((name for token, name in COLORS if kind in token), "")


def code_line(parts: list[tuple[str, str]]) -> str:
    "One line of code."
    text = "".join(value for _, value in parts)
    runs, run = [], []          # what stands between two spaces stays together, the first with its indentation
    for color, value in parts:
        for piece in re.findall(r" +|[^ ]+", value):
            if piece[0] == " " and any(value.strip() for part in [*runs, run] for _, value in part):
                runs += [run, [(color, piece)]]
                run = []
            else: run.append((color, piece))
    indent = len(text) - len(text.lstrip(" "))
    style = f' style="--in:{indent}ch"' if indent else ""
    together = itertools.groupby((code_run(run) for run in [*runs, run] if run), key=lambda part: part[0])
    inner = "".join(in_color(color, "".join(piece for _, piece in pieces)) for color, pieces in together)
    return f'<span class="line"{style}>{inner}\n</span>'


def in_color(color: str, piece: str) -> str:
    return f'<span class="{color}">{piece}</span>' if color and piece.strip() else piece


def code_run(run: list[tuple[str, str]]) -> tuple[str, str]:
    "(colour, HTML) of a run without spaces, kept on one line if a browser might break it; no colour if it has several."
    colors = {color for color, _ in run}
    text, one = "".join(value for _, value in run), colors.pop() if len(colors) == 1 else None
    pieces = [(color, html.escape(value, quote=False)) for color, value in run]
    inner = "".join(piece if one is not None else in_color(color, piece) for color, piece in pieces)
    if BREAKABLE.search(text): inner = f'<span class="nb">{inner}</span>'
    return one or "", inner


def whole_options(body: str) -> str:
    "Options of a command, in the code of a sentence, that a line does not break behind a dash."
    def one(match):
        if match[1] is None: return match[0]        # a block
        return f"<code>{OPTION.sub(shown, match[1])}</code>"

    def shown(match): return f'<span class="nb">{match[0]}</span>' if len(match[0]) < 25 else match[0]
    return re.sub(r"<pre\b.*?</pre>|<code>([^<]*)</code>", one, body, flags=re.S)


def boxed(kind: str, inner: str) -> str:
    "Something that may be wider than the page: it scrolls in its box, and the box shows where it goes on."
    return f'<div class="box {kind}">{inner}</div>'


def code_boxes(body: str) -> str:
    "Code with its colours, outputs, other preformatted text and tables, each in a box."
    body = whole_options(body)
    shown = '<pre class="scroll"><code>{}</code></pre>'.format
    body = CODE.sub(lambda m: boxed(f"code {m[1]}", shown(colored(html.unescape(m[2]), m[1]))), body)
    body = OUTPUT.sub(lambda m: boxed("out", f'<pre class="scroll {m[1]}"><code>{m[2]}</code></pre>'), body)
    body = PLAIN.sub(lambda m: boxed("code plain", shown(colored(html.unescape(m[1]), "text"))), body)
    return TABLE.sub(lambda m: boxed("table", f'<div class="scroll">{sized(m[0])}</div>'), body)


def sized(table: str) -> str:
    "A table without the widths that pandoc took from its dashes; cells with a sentence in them are marked."
    table = re.sub(r"<colgroup>.*?</colgroup>|(?<=<table) style=\"width:[^\"]*\"", "", table, flags=re.S)
    table = re.sub(r"<thead>\s*<tr[^>]*>(\s*<th[^>]*></th>)+\s*</tr>\s*</thead>", "", table)
    table = re.sub(r"<th([^>]*)></th>", r"<td\1></td>", table)         # an empty heading says nothing
    return re.sub(r"<td(?=[^>]*>([^\n]*?)</td>)", lambda cell: '<td class="long"' if long(cell[1]) else "<td", table)


def long(cell: str) -> bool:
    "Whether a cell of a table has a sentence in it; what is a link's address or a class is not seen and not counted."
    return len(re.sub(r"<[^>]+>", "", cell)) >= 60


def promoted(body: str) -> str:
    "A page that begins with headings of level 3 has them on level 2: no level is left out."
    before, first, after = body.partition("<h2")
    return re.sub(r"(</?)h3\b", r"\1h2", before) + first + after


# Formulas

def split_level(tex: str, mark: str) -> list[str]:
    "Splits TeX at a mark that stands outside braces and environments."
    parts, depth, start, i = [], 0, 0, 0
    while i < len(tex):
        if depth == 0 and tex.startswith(mark, i):
            parts.append(tex[start:i])
            i += len(mark)
            if mark == "\\\\" and (skip := re.match(r"\[[^\]]*\]", tex[i:])): i += skip.end()
            start = i
            continue
        if tex[i] == "\\":
            word = re.match(r"\\([a-zA-Z]+|.)", tex[i:], re.S)
            depth += {"begin": 1, "end": -1}.get(word[1], 0) if word else 0
            i += word.end() if word else 1
            continue
        depth += {"{": 1, "}": -1}.get(tex[i], 0)
        i += 1
    return [*parts, tex[start:]]


def narrow(tex: str) -> str | None:
    "A chain for a narrow screen, each left side, right side and reason on a line of its own; None for other formulas."
    found = ALIGNED.match(tex)
    if not found: return None
    lines = []
    for row in split_level(found[3], "\\\\"):
        left, *right = (cell.strip() for cell in split_level(row, "&"))
        if not any((left, *right)): continue
        if not right or len(right) > 3: return None
        value, reason = right[0], " ".join(right[1:]).strip()
        if left and value: lines += [left, rf"\quad {value}"]
        elif left or value: lines.append(left or rf"\quad {value}")
        if reason: lines.append(rf"\qquad {{\small {reason}}}")
    before, after = found[1].strip(), found[4].strip()
    if before: return None
    return r"\begin{aligned}" + r" \\ ".join(f"& {line}" for line in lines) + r"\end{aligned}" + after


def typeset(bodies: list[str], fail: type[Exception]) -> list[str]:
    "Every formula as HTML, in one run of KaTeX; a formula it cannot read is an error."
    found = []
    for body in bodies:
        for kind, tex, _ in FORMULA.findall(body):
            tex = html.unescape(tex)
            found.append({"tex": tex, "display": kind == "display"})
            if kind == "display" and (short := narrow(tex)): found.append({"tex": short, "display": True})
    stray = next((f["tex"] for f in found if "](#eq-" in f["tex"] or "@eq-" in f["tex"]), None)
    if stray: raise fail(f"a formula cannot hold a reference: {stray}")
    done = subprocess.run(
        ["node", PARTS / "katex.mjs"], input=json.dumps(found), capture_output=True, text=True, cwd=PARTS
    )
    if done.returncode: raise fail(done.stderr.strip())
    rendered = iter(json.loads(done.stdout))

    def one(match):
        formula, after = next(rendered), match[3]
        if match[1] == "inline": return f'<span class="math inline">{formula}</span>{after and "&NoBreak;" + after}'
        if not narrow(html.unescape(match[2])): return formula_box(formula, "") + after
        return formula_box(formula, " wide") + formula_box(next(rendered), " narrow") + after

    return [FORMULA.sub(one, body) for body in bodies]


def formula_box(formula: str, kind: str) -> str:
    return f'<span class="math display box{kind}"><span class="scroll">{formula}</span></span>'


# Texts: links to papers, words

def texts(body: str, change: Callable[[str, str], str], outside: set[str]) -> str:
    "`change(text, section)` for the texts in none of the elements `outside`; `section` counts headings of level 2."
    parts, within, section = re.split(r"(<!--.*?-->|<[^>]+>)", body, flags=re.S), [], 0
    for i, part in enumerate(parts):
        if i % 2 == 0:
            if part.strip() and not within: parts[i] = change(part, str(section))
            continue
        tag = re.match(r"</?([a-zA-Z][\w-]*)", part)
        if not tag: continue
        name, closes = tag[1].lower(), part[1] == "/"
        if name == "h2" and not closes: section += 1
        if within and name == within[0]:        # only elements of its own name can hide the end of what is left out
            if closes: within.pop()
            else: within.append(name)
        elif not within and not closes and name not in VOID and is_outside(part, name, outside): within.append(name)
    return "".join(parts)


def is_outside(tag: str, name: str, outside: set[str]) -> bool:
    "Whether a tag opens an element of `outside`, given by names and by `.classes`."
    classes = re.search(r'class="([^"]*)"', tag)
    return name in outside or bool({f".{c}" for c in (classes[1].split() if classes else [])} & outside)


def link_papers(body: str) -> str:
    "Every arXiv number leads to its paper; in code only where it is called one."
    def link(match):
        return f'<a href="https://arxiv.org/abs/{match[1]}">{match[0]}</a>'

    outside = {"a", "script", "style", "button", "summary", "h1", "h2", "h3", ".math"}
    body = texts(body, lambda text, _: PAPER.sub(link, text), outside)
    return texts(body, lambda text, _: NUMBER.sub(link, text), {*outside, "code", "pre"})


def read_words(body: str) -> list[dict]:
    "The rows of the glossary: each word, its other forms, its meaning as HTML."
    words = []
    for row in re.findall(r"<tr[^>]*>(.*?)</tr>", body, re.S):
        cells = re.findall(r"<td[^>]*>(.*?)</td>", row, re.S)
        if len(cells) != 3: continue
        word = re.sub(r"<[^>]+>", "", cells[0]).strip()
        also = re.sub(r'<span class="math.*?</math>.*?</span></span></span>', "", cells[1], flags=re.S)
        also = [form.strip() for form in re.sub(r"<[^>]+>", "", also).split(",")]
        forms = [html.unescape(form) for form in [word, *also] if len(form) > 2 and re.fullmatch(r"[\w -]+", form)]
        slug = "word-" + re.sub(r"\W+", "-", word.lower()).strip("-")
        words.append({"word": word, "id": slug, "forms": forms, "meaning": cells[2]})
    return words


def anchor_words(body: str, words: list[dict]) -> str:
    "The glossary's page, each row with an anchor."
    ids = iter(words)

    def one(match):
        return f'<tr id="{next(ids)["id"]}"{match[1]}>{match[2]}</tr>' if match[2].count("<td") == 3 else match[0]

    return re.sub(r"<tr([^>]*)>(.*?)</tr>", one, body, flags=re.S)


def explain_words(body: str, words: list[dict], glossary: str) -> str:
    "The first use of a word in a section becomes a button that tells its meaning; the meanings follow the text."
    by_form = {form.lower(): word for word in words for form in word["forms"]}
    if not by_form: return body
    longest = sorted(by_form, key=len, reverse=True)
    pattern = re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, longest))})(?![\w-])", re.I)
    told: set[tuple[str, str]] = set()
    used: dict[str, dict] = {}

    def mark(text: str, section: str) -> str:
        def one(match):
            word = by_form[match[1].lower()]
            if (section, word["id"]) in told: return match[0]
            told.add((section, word["id"]))
            used[word["id"]] = word
            told_by = f'data-word="{word["id"]}" aria-describedby="{word["id"]}"'
            return f'<button type="button" class="term" {told_by}>{match[1]}</button>'
        return pattern.sub(one, text)

    outside = {"a", "code", "pre", "h1", "h2", "h3", "h4", "summary", "figure", "script", "style", "button", "table",
               "label", ".math", ".output", ".title", ".box"}
    marked = texts(body, mark, outside)
    meanings = "".join(
        f'<div id="{word["id"]}"><b>{word["word"]}</b>: {word["meaning"]} '
        f'<a href="{glossary}#{word["id"]}">All words</a></div>' for word in used.values()
    )
    return f'{marked}<div id="words" hidden>{meanings}</div>' if used else marked


def anchor_headings(body: str) -> str:
    "Headings with a link to themselves."
    def one(match):
        said = html.escape(re.sub(r"<[^>]+>", "", match[5]).strip())
        link = f'<a class="anchor" href="#{match[3]}" aria-label="Link to “{said}”">#</a>'
        return f'<h{match[1]}{match[2]} id="{match[3]}"{match[4]}>{match[5]}{link}</h{match[1]}>'
    return HEADING.sub(one, body)


# Search, from what pandoc wrote

def prose(body: str) -> str:
    "The sentences of some HTML, without code, formulas and tables."
    left_out = (
        r'<span class="math[^>]*>.*?</span>|<a[^>]* class="badge".*?</a>'
        r"|<(pre|script|style|summary|button|figure|table)\b.*?</\1>"
    )
    text = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", re.sub(left_out, " ", body, flags=re.S))).split())
    return re.sub(r" (?=[,.;:!?)])", "", text)


def names(body: str) -> str:
    "The names in the code and the outputs of some HTML, each once, and the words of its tables."
    parts = re.findall(r"<(code|table)[^>]*>(.*?)</\1>", body, re.S)
    code = " ".join(re.sub(r"<[^>]+>", " ", text) for _, text in parts)
    return " ".join(sorted(set(re.findall(r"[A-Za-z_]\w{2,}", html.unescape(code)))))
