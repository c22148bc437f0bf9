"""The site in a real browser, with the network off. Needs Chromium, Node with `npm ci` run in tools/site, and the
`site` extra: `make test-site`. With TOKPREF_SITE=_site the site that is looked at stays there, to be published;
with TOKPREF_SHOTS=all every page is photographed into build/site, else a few.
"""

import base64
import html
import importlib.util
import itertools
import json
import os
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NEEDS = {"Chromium": CHROMIUM, "chromedriver": shutil.which("chromedriver"), "Node": shutil.which("node"),
         "npm packages in tools/site (npm ci)": (ROOT / "tools" / "site" / "node_modules" / "axe-core").exists(),
         "pypandoc_binary": importlib.util.find_spec("pypandoc"), "selenium": importlib.util.find_spec("selenium")}
MISSING = [name for name, found in NEEDS.items() if not found]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.xdist_group("site"),
]


AXE = ROOT / "tools" / "site" / "node_modules" / "axe-core" / "axe.min.js"
LOOKED_AT = ["index.ipynb", "derivations/02_dpo.ipynb", "library/data/05_prepare.ipynb",
             "library/training/03_trainer.ipynb", "experiments/tasks/01_sentiment.ipynb"]      # one of each kind


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    import build_site
    kept = os.environ.get("TOKPREF_SITE")
    folder = ROOT / kept if kept else tmp_path_factory.mktemp("site") / "html"
    return folder, build_site.build(folder)


@pytest.fixture(scope="module")
def browser(site):
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-features=BackForwardCache",      # pages that were looked at are forgotten
        "--process-per-site",
        "--window-size=1400,1400",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ):     # no address resolves: whatever is fetched fails
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_script_timeout(180)
    yield driver
    driver.quit()


def show(browser, url: str) -> None:
    "Go to a page, and wait until it is this one and complete: `get` may come back while the old one is still there."
    from selenium.webdriver.support.ui import WebDriverWait
    browser.execute_script("window.old = true")
    browser.get(url)
    WebDriverWait(browser, 30).until(
        lambda b: b.execute_script(
            "return !window.old && document.readyState === 'complete' && location.protocol === 'file:'"
        )
    )


def address(site, page) -> str:
    return (site[0] / page.url).as_uri()


def text(site, page) -> str:
    return (site[0] / page.url).read_text(encoding="utf-8")


def article(site, page) -> str:
    return re.search(r"<article>(.*?)</article>", text(site, page), re.S)[1]


def width(browser, pixels: int, mobile: bool = False) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": pixels, "height": 900, "deviceScaleFactor": 1, "mobile": mobile}
    )


def shoot(browser, page, kind: str) -> None:
    "The page as it is now, down to 8000 pixels, into build/site, for looking at."
    path = ROOT / "build" / "site" / f"{page.url.replace('/', '-').removesuffix('.html')}-{kind}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    size = browser.execute_script("return [innerWidth, Math.min(8000, document.documentElement.scrollHeight)]")
    clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
    shot = browser.execute_cdp_cmd(
        "Page.captureScreenshot", {"format": "jpeg", "quality": 70, "captureBeyondViewport": True, "clip": clip}
    )
    path.write_bytes(base64.b64decode(shot["data"]))


PROSE = """const a = document.querySelector('article').cloneNode(true);
a.querySelectorAll('pre, code, .katex, script').forEach(e => e.remove()); return a.textContent"""
BROKEN = """document.querySelectorAll('img').forEach(i => i.loading = 'eager');
await Promise.all([...document.images].map(i => i.decode().catch(() => 0)));
return [...document.images].filter(i => !i.naturalWidth).map(i => i.src)"""
PALE = """    // texts whose contrast with what is behind them is below WCAG's AA, one of each kind
const once = (make, made = new Map()) => key => made.has(key) ? made.get(key) : made.set(key, make(key)).get(key);
const parts = c => c.match(/[\\d.]+/g).map(Number);
const linear = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const bright = once(c => { const [r, g, b] = parts(c).map(linear); return 0.2126 * r + 0.7152 * g + 0.0722 * b });
const behind = once(e => {
  const c = getComputedStyle(e).backgroundColor, a = parts(c)[3];
  return a === undefined || a === 1 ? c : behind(e.parentElement);
});
const told = ['class', 'style', 'aria-current'];
const kind = once(e => !e ? '' :
  [kind(e.parentElement), e.tagName, e.cellIndex ?? '', ...told.map(name => e.getAttribute(name) ?? '')].join('|'));
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_ELEMENT | NodeFilter.SHOW_TEXT, n =>
  n.nodeType === 1 ? n.matches('.katex, script, [hidden]') ? NodeFilter.FILTER_REJECT : NodeFilter.FILTER_SKIP
  : n.data.trim() ? NodeFilter.FILTER_ACCEPT : NodeFilter.FILTER_SKIP);
const found = [], looked = new Set();
while (texts.nextNode()) {
  const e = texts.currentNode.parentElement, one = kind(e);
  if (looked.has(one) || !e.checkVisibility()) continue;
  looked.add(one);
  const style = getComputedStyle(e), size = parseFloat(style.fontSize);
  const large = size >= 24 || size >= 18.66 && style.fontWeight >= 700;
  const [a, b] = [bright(style.color), bright(behind(e))], ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const what = `${e.tagName}.${e.className} ${ratio.toFixed(2)} ${e.textContent.slice(0, 30)}`;
  if (ratio < (large ? 3 : 4.5)) found.push(what);
}
return found"""

LISTED = """const box = document.querySelector('#chapters [aria-current="page"]').getBoundingClientRect();
return box.height > 0 && box.top >= 0 && box.bottom <= innerHeight"""
UNMARKED = """    // what scrolls sideways without a mark on its box, or cannot be reached with the keyboard
return [...document.querySelectorAll('article *')].filter(e => {
  if (!e.checkVisibility() || e.scrollWidth <= e.clientWidth + 2) return false;
  if (!/auto|scroll/.test(getComputedStyle(e).overflowX)) return false;
  const mark = e.closest('.box') && getComputedStyle(e.closest('.box'), '::after');
  return !mark || mark.content === 'none' || mark.position !== 'absolute' || e.tabIndex !== 0;
}).map(e => e.outerHTML.slice(0, 80))"""
SMALL = """    // pictures whose letters of 8 points are below 9 pixels: drawn for `width` pixels at 100 an inch
return [...document.images].filter(i => i.style.getPropertyValue('--wide') && i.getClientRects().length)
  .filter(i => i.getBoundingClientRect().width / i.getAttribute('width') * 800 / 72 < 9).map(i => i.src)"""


def look(browser, page, see: dict, mobile: bool, shot: bool) -> None:
    "Adds to `see` what is seen of a page at 1400 pixels, light and dark, or as a phone shows it."
    width(browser, 375 if mobile else 1400, mobile)
    theme = lambda name: browser.execute_script("document.documentElement.dataset.theme = arguments[0]", name)
    browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 30))")   # boxes are measured
    see["unmarked"] += browser.execute_script(UNMARKED)
    if mobile:
        see["narrow"] = browser.execute_script("return Math.max(innerWidth, document.documentElement.scrollWidth)")
        see["small"] = browser.execute_script(SMALL)
        if shot: theme("light"), shoot(browser, page, "phone")
        return
    see["listed"] = browser.execute_script(LISTED)
    for name in ("light", "dark"):
        theme(name)
        see["pale"][name] = browser.execute_script(PALE)
        if shot: shoot(browser, page, name)


@pytest.fixture(scope="module")
def visits(site, browser):
    "What a browser sees of each page, in one visit. Every other page is seen first as a phone shows it."
    seen = {}
    for i, page in enumerate(site[1]):
        shot = page.source in LOOKED_AT or os.environ.get("TOKPREF_SHOTS") == "all"
        see = seen[page.source] = {"unmarked": [], "pale": {}}
        show(browser, address(site, page))
        for mobile in (True, False) if i % 2 else (False, True): look(browser, page, see, mobile, shot)
        see["broken"] = browser.execute_async_script(
            f"const done = arguments[0]; (async () => {{ {BROKEN} }})().then(done)"
        )
        see["prose"] = browser.execute_script(PROSE)
        see["log"] = [entry["message"] for entry in browser.get_log("browser")]
    width(browser, 1400)
    return seen


def test_every_page_loads_without_complaint(visits):
    for source, see in visits.items(): assert not see["log"] and not see["broken"], source


def test_the_list_of_chapters_shows_where_one_is(visits):
    assert not [source for source, see in visits.items() if not see["listed"]]


def test_no_formula_is_left_as_text(visits):
    for source, see in visits.items():
        raw = re.search(r".{0,60}(\$|\\\(|\\\[|@(eq|fig|sec|tbl)-|\{#|:::).{0,60}", see["prose"])
        assert not raw, (source, raw)


def test_everything_written_can_be_read(visits):
    for source, see in visits.items(): assert see["pale"] == {"dark": [], "light": []}, source


def test_a_phone_does_not_scroll_sideways(visits):
    for source, see in visits.items(): assert see["narrow"] <= 375, source


def test_what_is_cut_is_marked_and_reached_by_keyboard(visits):
    assert not {source: see["unmarked"] for source, see in visits.items() if see["unmarked"]}


def test_letters_in_figures_can_be_read_on_a_phone(visits):
    assert not {source: see["small"] for source, see in visits.items() if see["small"]}


def test_links_and_anchors_resolve(site):
    anchors = {page.url: set(re.findall(r'\bid="([^"]+)"', text(site, page))) for page in site[1]}
    for page in site[1]:
        for target in set(re.findall(r'href="(?!https?:|mailto:|data:)([^"]*)"', text(site, page))):
            path, _, anchor = html.unescape(target).partition("#")
            found = (
                (site[0] / page.url).parent.joinpath(path).resolve() if path else site[0] / page.url
            )
            assert found.exists(), f"{page.source}: {target} leads nowhere"
            if anchor and found.suffix == ".html":
                assert unquote(anchor) in anchors[found.relative_to(site[0].resolve()).as_posix()], (
                    f"{page.source}: no anchor {target}"
                )


def test_one_title_and_headings_in_order(site):
    for page in site[1]:
        levels = [int(level) for level in re.findall(r"<h([1-6])\b", article(site, page))]
        assert levels.count(1) == 1 and all(b <= a + 1 for a, b in itertools.pairwise(levels)), page.source


def test_every_figure_says_what_it_shows(site):
    for page in site[1]:
        assert not re.findall(r'<img(?![^>]*\balt="[^"]+")[^>]*>', text(site, page)), page.source


def found_first(browser, words: str) -> str:
    "Where the first hit of a search leads."
    from selenium.webdriver.support.ui import WebDriverWait
    query = browser.find_element("id", "query")
    query.clear()
    browser.execute_script("document.getElementById('results').replaceChildren()")
    query.send_keys(words)
    WebDriverWait(browser, 30).until(lambda b: b.find_elements("css selector", "#results > *"))
    return browser.find_element("css selector", "#results a").get_attribute("href")


def test_search_finds_what_a_person_means(site, browser):
    show(browser, address(site, site[1][0]))
    for words, wanted in (
        ("tdpo2", "use.html"), ("my model", "use.html"), ("own data", "use.html"), ("custom loss", "use.html"),
        ("adpo", "derivations/adpo.html"), ("two optima", "derivations/token_mdp.html"),
        ("sentiment", "experiments/tasks/sentiment.html"),
        ("model card", "library/training/card.html"), ("command line", "library/cli/commands.html"),
        ("beta", "derivations/objective.html#what-β-does"), ("jsonl", "use.html"),
        ("colab", "use.html"), ("oom", "use.html"),
        ("out of memory", "use.html#memory-and-time"), ("kl", "library/evaluation/frontier.html"),
        ("win rate", "library/evaluation/judging.html"), ("dpo_loss", "derivations/dpo.html#dpo_loss"),
    ):
        found = unquote(found_first(browser, words))
        assert found.endswith(f"/{wanted}"), (words, found)
    said = [small.text for small in browser.find_elements("css selector", "#results small")]
    code = re.compile(r"[{}`]|\b(?:def|import) \w+|\w = \w| [,.;]")
    assert said and not [text for text in said if code.search(text)], "excerpts are prose"
    assert found_first(browser, "out of memory")
    marked = [mark.text.lower() for mark in browser.find_elements("css selector", "#results mark")]
    assert marked and "of" not in marked, "the word that says most is marked"
    show(browser, found_first(browser, "adpo"))
    assert not browser.get_log("browser")


def test_dark_is_dark_and_is_remembered(site, browser):
    show(browser, address(site, site[1][0]))
    paper = lambda: browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    light = paper()
    browser.find_element("id", "theme").click()
    dark = paper()
    browser.refresh()
    assert light != dark == paper()
    browser.find_element("id", "theme").click()


def test_a_figure_slides_without_a_kernel(site, browser):
    page = next(page for page in site[1] if 'class="slides"' in text(site, page))
    show(browser, address(site, page))
    moved = browser.execute_async_script("""
        const done = arguments[0], figure = document.querySelector('figure.slides');
        const slider = figure.querySelector('input'), image = figure.querySelector('img'), before = image.src;
        figure.scrollIntoView();
        slider.value = slider.value == 0 ? 1 : 0;
        slider.dispatchEvent(new Event('input'));
        image.decode().then(() => done(before !== image.src && image.naturalWidth))""")
    assert moved and "base64" not in text(site, page)


def test_the_keyboard_reaches_everything(site, browser):
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.support.ui import WebDriverWait
    press = lambda key: ActionChains(browser).send_keys(key).perform()
    at = lambda: browser.execute_script(
        "const e = document.activeElement, r = e.getBoundingClientRect();"
        "return [e.id || e.className || e.rel || e.tagName,"
        "getComputedStyle(e).outlineStyle !== 'none' && r.right > 0 && r.bottom > 0 && r.width > 0]"
    )
    show(browser, address(site, site[1][1]))
    stops = []
    for _ in range(12):
        press(Keys.TAB)
        stops.append(at())
    assert stops[0][0] == "skip" and all(seen for _, seen in stops), stops
    assert {"home", "query", "theme"} <= {name for name, _ in stops}
    show(browser, address(site, site[1][1]))
    press(Keys.TAB), press(Keys.ENTER)
    WebDriverWait(browser, 10).until(lambda b: b.execute_script("return document.activeElement.id") == "content")
    width(browser, 375, mobile=True)
    try:
        browser.execute_script("document.getElementById('menu').focus()")
        menu, chapters = browser.find_element("id", "menu"), browser.find_element("id", "chapters")
        assert not chapters.is_displayed()
        press(Keys.ENTER)
        WebDriverWait(browser, 10).until(lambda _: chapters.is_displayed())
        assert menu.get_attribute("aria-expanded") == "true"
        press(Keys.TAB)
        press(Keys.ESCAPE)
        WebDriverWait(browser, 10).until(lambda _: not chapters.is_displayed())
        assert at()[0] == "menu"
    finally: width(browser, 1400)


def test_code_can_be_copied(site, browser):
    show(browser, address(site, site[1][0]))
    blocks, buttons = (len(browser.find_elements("css selector", s)) for s in (".box.code", ".box.code > button.copy"))
    assert blocks == buttons > 0
    page = next(page for page in site[1] if page.source == "derivations/02_dpo.ipynb")
    show(browser, address(site, page))
    copied = browser.execute_script("""
        Object.defineProperty(navigator, 'clipboard', {value: {writeText: async text => { window.copied = text }}});
        for (const fold of document.querySelectorAll('details')) fold.open = true;
        document.querySelectorAll('.copy')[1].click();
        return [window.copied, document.querySelectorAll('.box.code code')[1].textContent]""")
    shown = [cell.source.rstrip() for cell in page.cells if cell.cell_type == "code"]
    assert copied[0] == copied[1] and copied[0].rstrip() in shown, "what is copied is the cell, line by line"


def test_print_is_dark_on_white_and_without_menus(site, browser):
    show(browser, address(site, site[1][0]))
    browser.execute_script("document.documentElement.dataset.theme = 'dark'")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        style = browser.execute_script("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
        assert (
            style == ["rgb(255, 255, 255)", "rgb(0, 0, 0)"]
            and not browser.find_element("css selector", "header").is_displayed()
        )
    finally: browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_machines_find_every_page(site):
    import xml.etree.ElementTree as xml
    folder, pages = site
    home = "https://tokpref.github.io/tokpref"
    urls = [f"{home}/{page.url}" for page in pages]
    assert [
        loc.text for loc in xml.parse(folder / "sitemap.xml").iter("{http://www.sitemaps.org/schemas/sitemap/0.9}loc")
    ] == urls
    assert re.findall(r"^- \[[^]]+\]\(([^)]+)\): \S", (folder / "llms.txt").read_text(encoding="utf-8"), re.M) == urls
    for page, url in zip(pages, urls, strict=True):
        assert f'<link rel="canonical" href="{url}">' in text(site, page)
        card = re.search(rf'property="og:image" content="{home}/([^"]+)"', text(site, page))
        assert (folder / card[1]).exists()


def test_pages_are_complete(site):
    "Formulas, colours, numbers of equations, documentation with its source, neighbours, contents, Colab."
    pages = {page.source: text(site, page) for page in site[1]}
    dpo, data = pages["derivations/02_dpo.ipynb"], pages["library/data/05_prepare.ipynb"]
    assert all(
        part in dpo
        for part in (
            'class="katex"',
            'class="kw"',
            'id="eq-dpo"',
            ">equation&nbsp;" if ">equation&nbsp;" in dpo else ">equation\u00a0",
            '<nav id="toc"',
        )
    )
    assert (
        re.search(r'href="https://github.com/tokpref/tokpref/blob/main/tokpref/data/prepare.py#L\d+"', data)
        and "prepare" in data
    )
    for source, page in pages.items():
        assert (
            source == "index.ipynb"
            or 'rel="prev"' in page
            and f'https://colab.research.google.com/github/tokpref/tokpref/blob/main/nbs/{source}"' in page
        )
        assert not re.findall(
            r'<(?:script|img|iframe|source)[^>]* src="(?:https?:)?//|<link rel="stylesheet" href="http', page
        ), "nothing is fetched"


@pytest.mark.parametrize("fold, closed", [("true", True), ("show", False)])
def test_a_folded_cell_is_closed_and_says_what_is_in_it(fold, closed):
    import build_site
    import nbformat
    source = f'#| code-fold: {fold}\n#| code-summary: "Check: a < b"\n#@title Check: a < b\nassert a < b'
    cell = nbformat.v4.new_code_cell(source)
    page = build_site.Page("derivations/01_page.ipynb", "Derivations")
    made = build_site.code_markdown(page, cell, "", None)
    assert ("<summary>Check: a &lt; b</summary>" in made) == closed and "assert a < b" in made and "#|" not in made
    assert "#@title" not in made


def test_a_notebook_that_breaks_the_site_is_named(tmp_path, monkeypatch):
    import build_site
    import nbformat
    for name in ("settings.ini", "pyproject.toml"): shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "nbs").mkdir()
    sources = ("#| default_exp losses.dpo", "#| export\ndef no_such_name(): pass")
    cells = [nbformat.v4.new_markdown_cell("# A page\n\n> It breaks."), *map(nbformat.v4.new_code_cell, sources)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "nbs" / "01_page.ipynb")
    monkeypatch.setattr(build_site, "ROOT", tmp_path)
    with pytest.raises(build_site.SiteError, match="nbs/01_page.ipynb: AttributeError: .*no_such_name"):
        build_site.process_notebooks()


def test_documentation_has_the_names_that_one_writes_and_no_addresses():
    from site_docs import short
    said = """### f

```python
def f(
    a:torch.nn.modules.module.Module | None, b:Mapping={'x.Y': <function g.<locals>.<lambda> at 0x7f>}, # of a.B
    c:Callable=<function half at 0x7f3a>
)->collections.abc.Sequence[tokpref.exact.Pairs]:
```

*What torch.nn.Module is.*"""
    assert short(said) == """### f

```python
def f(
    a:Module | None, b:Mapping={'x.Y': <lambda>}, # of a.B
    c:Callable=half
)->Sequence[Pairs]:
```

*What torch.nn.Module is.*"""


def test_fields_of_a_dataclass_are_documented_where_they_stand(site):
    page = text(site, next(page for page in site[1] if page.source == "library/losses/00_types.ipynb"))
    code = (ROOT / "tokpref" / "losses" / "types.py").read_text(encoding="utf-8")
    line = code.split("class TokenStats")[0].count("\n") + 1
    assert f'losses/types.py#L{line}"' in page
    assert "mask:Tensor, # [B, T] bool, True at response tokens" in html.unescape(re.sub(r"<[^>]+>", "", page))


def phone(browser, site, source: str) -> None:
    "A page as a phone shows it."
    width(browser, 375, mobile=True)
    show(browser, address(site, next(page for page in site[1] if page.source == source)))


def settled(browser, script: str, seconds: float = 10):
    "Waits until a script returns something true, and returns that."
    from selenium.webdriver.support.ui import WebDriverWait
    return WebDriverWait(browser, seconds).until(lambda b: b.execute_script(script))


def test_the_menu_of_a_phone_opens_where_the_reader_is(site, browser):
    phone(browser, site, "derivations/02_dpo.ipynb")
    try:
        browser.execute_script("scrollTo(0, document.documentElement.scrollHeight / 2)")
        before = browser.execute_script("return scrollY")
        browser.find_element("id", "menu").click()
        box = browser.execute_script(
            "const r = document.getElementById('chapters').getBoundingClientRect(); return [r.top, r.bottom, r.width]"
        )
        assert 0 < box[0] < 80 and box[1] == 900 and box[2] == 375, "it lies over the page, below the bar"
        assert browser.execute_script("return scrollY") == before > 1000
        first = browser.find_element("css selector", ".here li a")
        assert first.is_displayed() and first.location["y"] - before < 300, "the page's contents come first"
        first.click()
        settled(browser, "return !document.getElementById('chapters').classList.contains('open')")
        assert browser.execute_script("return scrollY") < before, "a tap on them leads there and closes the menu"
    finally: width(browser, 1400)


BROKEN_LINES = """    // lines of code that lost their indentation, or that are broken inside a run without spaces
const found = [], one = parseFloat(getComputedStyle(document.querySelector('.line')).lineHeight);
for (const line of document.querySelectorAll('.line')) {
  const text = line.firstChild && document.createTreeWalker(line, NodeFilter.SHOW_TEXT);
  if (!text || !line.getClientRects().length) continue;
  let flat = '', places = [];
  for (let node; node = text.nextNode();)
    for (let i = 0; i < node.length; i++) { flat += node.data[i]; places.push([node, i]); }
  const at = (i) => {
    const range = document.createRange(), [node, place] = places[i];
    range.setStart(node, place);
    range.setEnd(node, place + 1);
    return range.getBoundingClientRect();
  };
  const start = flat.search(/\\S/);
  if (start < 0) continue;
  const letter = at(start), pre = line.closest('pre'), margin = parseFloat(getComputedStyle(pre).paddingLeft);
  const shift = letter.left - pre.getBoundingClientRect().left - margin - start * letter.width;
  const runs = line.getBoundingClientRect().height > one * 1.5 ? [...flat.matchAll(/\\S+/g)] : [];
  const broken = runs.some(m => at(m.index + m[0].length - 1).top - at(m.index).top > 2);
  const hung = runs.every(m => at(m.index).left >= letter.left - 1);
  if (Math.abs(shift) > 2 || broken || !hung) found.push(flat);
}
return found"""


@pytest.mark.parametrize("pixels", [375, 1400])
def test_code_keeps_its_indentation_and_its_words(site, browser, pixels):
    width(browser, pixels, mobile=pixels < 1000)
    try:
        for source in ("derivations/02_dpo.ipynb", "library/training/03_trainer.ipynb"):
            show(browser, address(site, next(page for page in site[1] if page.source == source)))
            browser.execute_script("for (const fold of document.querySelectorAll('details')) fold.open = true")
            assert not browser.execute_script(BROKEN_LINES)[:3], source
    finally: width(browser, 1400)


def test_reasons_of_a_proof_stand_below_its_lines_on_a_phone(site, browser):
    count = "return [...document.querySelectorAll(arguments[0])].filter(e => e.getClientRects().length).length"
    phone(browser, site, "derivations/01_objective.ipynb")
    try: assert not browser.execute_script(count, ".wide") and browser.execute_script(count, ".narrow") > 3
    finally: width(browser, 1400)
    assert browser.execute_script(count, ".wide") > 3 and not browser.execute_script(count, ".narrow")


def test_a_chain_of_lines_becomes_narrow():
    from site_html import narrow
    chain = (
        r"\begin{aligned} a &= \frac{b & c}{d} && \text{why \& how} \\[2pt] "
        r"&= \begin{cases} 1 & 2 \\ 3 & 4 \end{cases} \end{aligned} \tag{3}"
    )
    assert narrow(chain) == (
        r"\begin{aligned}& a \\ & \quad = \frac{b & c}{d} \\ & \qquad {\small \text{why \& how}} \\ "
        r"& \quad = \begin{cases} 1 & 2 \\ 3 & 4 \end{cases}\end{aligned}\tag{3}"
    )
    assert narrow(r"a = b") is None and narrow(r"x = \begin{aligned} a &= b \end{aligned}") is None


def test_a_cell_is_long_by_what_is_seen_of_it():
    from site_html import sized
    link = f'<a href="{"x" * 80}">short</a>'
    table = f'<table>\n<tr>\n<td>{link}</td>\n<td style="text-align: right;">{"a word " * 9}</td>\n</tr>\n</table>'
    assert sized(table).count('class="long"') == 1 and f"<td>{link}</td>" in sized(table)


def test_a_comment_in_the_last_line_of_a_command_has_its_colour():
    from site_html import colored
    assert colored("make demo    # draws it in a folder", "bash").count('<span class="co"') == 1
    assert colored("make demo  # a\n\n", "sh") == colored("make demo  # a", "sh")


def test_tables_of_sentences_are_whole_on_a_phone(site, browser):
    cut = """return [...document.querySelectorAll('.box.table')].filter(box => box.querySelector('td.long'))
        .map(box => [box.classList.contains('stack'), box.firstElementChild]).filter(([, s]) => s.clientWidth)
        .map(([stacked, s]) => [stacked, s.scrollWidth > s.clientWidth + 2])"""
    source = "library/training/03_trainer.ipynb"
    try:
        phone(browser, site, source)
        settled(browser, "return document.querySelector('.stack')")
        assert not [stacked for stacked, is_cut in browser.execute_script(cut) if is_cut]
        label = "return getComputedStyle(document.querySelector('.stack td:last-child'), '::before').content"
        assert browser.execute_script(label).startswith('"what it is')
    finally: width(browser, 1400)
    settled(browser, "return !document.querySelector('.stack')")


def test_tables_of_options_are_those_of_the_package(site):
    "The pages show what the notebooks have stored."
    import argparse
    import dataclasses

    from tokpref.cli.parser import make_parser
    from tokpref.training import PreferenceConfig
    pages = {page.source: html.unescape(re.sub(r"<[^>]+>", "", article(site, page))) for page in site[1]}
    commands = next(a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices.values()
    actions = [action for command in commands for action in command._actions if action.dest != "help" and action.help]
    flags = {flag for action in actions for flag in action.option_strings}
    assert len(flags) > 20 and not [flag for flag in flags if flag not in pages["library/cli/02_commands.ipynb"]]
    trainer = " ".join(pages["library/training/03_trainer.ipynb"].split()).replace("’", "'")
    own = [field for field in dataclasses.fields(PreferenceConfig) if field.name in PreferenceConfig.__annotations__]
    told = [f"{field.name} {field.default} {field.metadata.get('help', '')[:20]}" for field in own]
    assert len(told) > 15 and not [row for row in told if row not in trainer]


def test_options_keep_their_two_dashes(site):
    page = next(page for page in site[1] if page.source == "library/cli/02_commands.ipynb")
    told = re.sub(r"<[^>]+>", "", article(site, page))
    assert "--eval-split" in told and not re.search(r"[–—][a-z]{2,}", told)
    assert "<code>'loss_options={window: 4}'</code>" in article(site, page), "what is typed is code"


def test_an_option_is_not_broken_behind_a_dash():
    from build_site import OPTION, to_html
    from site_html import whole_options
    assert '<span class="nb">--eval-split</span>' in to_html(OPTION.sub(r"[\\-\\-\1]{.nb}", "every --eval-split, a--b"))
    code = "<pre><code>f --x</code></pre><p><code>tokpref f --model M -x</code> <code>a-b</code></p>"
    whole = whole_options(code)
    assert whole.startswith("<pre><code>f --x</code></pre>") and whole.endswith("<code>a-b</code></p>")
    assert 'f <span class="nb">--model</span> M <span class="nb">-x</span></code>' in whole


def test_a_fault_can_be_reported_in_private(site):
    where = "https://github.com/tokpref/tokpref/blob/main/SECURITY.md"
    assert (ROOT / "SECURITY.md").exists() and where in (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f'<a href="{where}">Report a fault in private</a></p>' in text(site, page) for page in site[1])


def test_folded_checks_open_by_keyboard(site, browser):
    from selenium.webdriver import ActionChains, Keys
    page = next(page for page in site[1] if page.source == "derivations/02_dpo.ipynb")
    show(browser, address(site, page))
    folds = browser.find_elements("css selector", "details.source")
    assert [fold for fold in folds if fold.text.startswith("Check")] and not any(f.get_attribute("open") for f in folds)
    browser.execute_script("arguments[0].querySelector('summary').focus()", folds[0])
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    settled(browser, "return document.querySelector('details.source').open")
    assert folds[0].find_element("css selector", "pre").is_displayed()


TOLD = [("import math\nfrom a import b", "Imports"), ("assert a == b\nassert_close(a, b)", "Check"),
        ("# sums are one\nfor p in ps: assert_close(p.sum(), 1.0)", "Check: sums are one"),
        ("for bad in (f, g):\n    try: bad()\n    except ValueError as e: print(e)", "Check: what is refused"),
        ("with raises(ValueError): f()", "Check"), ("x = f(3)\nprint(x)", ""), ("x = 3\nassert x", "Check")]


@pytest.mark.parametrize("source, said", TOLD)
def test_cells_that_the_story_can_do_without_are_told_by_their_code(source, said):
    import nbformat
    from site_cells import Page, told_by_its_code
    assert told_by_its_code(Page("library/00_page.ipynb", ""), nbformat.v4.new_code_cell(source)) == said


def test_an_experiment_shows_what_came_out_and_folds_how_it_is_read():
    import nbformat
    from site_cells import Page, told_by_its_code
    cell = nbformat.v4.new_code_cell('for run in shown["runs"]: print(run)', outputs=[nbformat.v4.new_output("stream")])
    told = [told_by_its_code(Page(f"{place}/01_page.ipynb", ""), cell) for place in ("experiments/tasks", "library")]
    assert told == ["How it is read from the record", ""]
    assert not told_by_its_code(Page("experiments/tasks/01_page.ipynb", ""), nbformat.v4.new_code_cell(cell.source))


def test_words_are_explained_by_pointing_keyboard_and_tap(site, browser):
    from selenium.webdriver import ActionChains, Keys
    shown = "const m = document.getElementById('meaning'); return m && !m.hidden && m.textContent"
    page = next(page for page in site[1] if page.source == "derivations/02_dpo.ipynb")
    show(browser, address(site, page))
    term = browser.find_element("css selector", ".term")
    said = browser.execute_script("return document.getElementById(arguments[0].dataset.word).textContent", term)
    assert len(said) > 20 and not browser.execute_script(shown)
    ActionChains(browser).move_to_element(term).perform()
    assert settled(browser, shown) == said
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    settled(browser, f"return !(() => {{ {shown} }})()")
    browser.execute_script("arguments[0].focus({focusVisible: true})", term)
    assert settled(browser, shown) == said and term.get_attribute("aria-expanded") == "true"
    ActionChains(browser).send_keys(Keys.TAB).perform()
    assert browser.execute_script("return document.activeElement.closest('#meaning') !== null"), "its link comes next"
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert browser.execute_script("return document.activeElement") == term
    phone(browser, site, "derivations/02_dpo.ipynb")
    try:
        term = browser.find_element("css selector", ".term")
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].click()", term)
        assert settled(browser, shown) == said
        box = browser.execute_script(
            "const r = document.getElementById('meaning').getBoundingClientRect(); return [r.left, r.right]"
        )
        assert box[0] >= 0 and box[1] <= 375
    finally: width(browser, 1400)


def test_sliders_say_their_value(site, browser):
    page = next(page for page in site[1] if page.source == "derivations/02_dpo.ipynb")
    show(browser, address(site, page))
    for slider in browser.find_elements("css selector", "figure.slides input"):
        shown = browser.execute_script("return arguments[0].labels[0].textContent", slider)
        assert shown and not re.search("alpha|beta|lam", shown) and slider.size["height"] >= 24
        browser.execute_script("arguments[0].value = 0; arguments[0].dispatchEvent(new Event('input'))", slider)
        assert slider.get_attribute("aria-valuetext") == json.loads(slider.get_attribute("data-said"))[0]


def test_the_palette_can_be_seen_as_the_pages_show_it(site, browser):
    from tokpref.plots.style import CYCLE, LEVEL, LOSS_STYLES, SPARE_COLORS
    colors = [*(color for color, _ in LOSS_STYLES.values()), *SPARE_COLORS, *CYCLE, LEVEL]
    show(browser, address(site, next(page for page in site[1] if page.figures)))
    found = browser.execute_script("""
        const linear = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
        const seen = (color, filter) => {
          const canvas = document.createElement('canvas').getContext('2d');
          [canvas.filter, canvas.fillStyle] = [filter, color];
          canvas.fillRect(0, 0, 9, 9);
          const [r, g, b] = [...canvas.getImageData(4, 4, 1, 1).data].map(linear);
          return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const image = document.querySelector('article img'), weak = [];
        for (const theme of ['light', 'dark']) {
          document.documentElement.dataset.theme = theme;
          const filter = getComputedStyle(image).filter, paper = seen('#fff', filter);
          for (const color of arguments[0]) {
            const [low, high] = [paper, seen(color, filter)].sort((a, b) => a - b);
            if ((high + 0.05) / (low + 0.05) < 3) weak.push([theme, color, (high + 0.05) / (low + 0.05)]);
          }
        }
        return weak""", colors)
    assert not found


def test_no_page_is_without_its_result(site):
    for page in site[1]:
        empty = re.search(r"no run yet|no run to show|has no sweep|Traceback \(most", text(site, page), re.I)
        assert not empty, (page.source, empty)
        if page.source.startswith("experiments/tasks/"):
            body = article(site, page)
            assert "<img " in body and re.search(r'class="scroll output|<table', body), page.source


def test_no_chapter_number_stands_twice(site):
    numbers = [match[1] for page in site[1] if (match := re.match(r"(\d+)\b", page.title))]
    assert numbers and len(numbers) == len(set(numbers))


def test_every_paper_is_linked(site):
    for page in site[1]:
        left_out = r"<a\b.*?</a>|<script.*?</script>|<summary.*?</summary>|<h[123].*?</h[123]>"
        told = re.sub(r"<[^>]+>", "", re.sub(left_out, "", article(site, page), flags=re.S))
        assert not re.findall(r"arXiv[:\s]+\d{4}\.\d{4,5}|arxiv\.org/abs/\S+", told, re.I), page.source


def test_headings_have_anchors_and_figures_numbers(site):
    for page in site[1]:
        body = article(site, page)
        ids = re.findall(r'<h[23][^>]* id="([^"]+)"', body)
        assert ids == re.findall(r'class="anchor" href="#([^"]+)"', body), page.source
        numbers = re.findall(r"<figcaption><b>Figure (\d+)\.</b>", body)
        assert numbers == [str(i + 1) for i in range(body.count("<figure"))], page.source


def test_a_lost_reader_is_helped(site):
    lost = (site[0] / "404.html").read_text(encoding="utf-8")
    targets = re.findall(r'(?:href|src)="(?!https?:|#)([^"]*)"', lost)
    assert targets and all(target.startswith("/tokpref/") for target in targets), "it is shown at any depth"
    assert all((site[0] / target.removeprefix("/tokpref/").partition("#")[0]).exists() for target in targets)


def test_axe_finds_nothing(site, browser):
    script = AXE.read_text(encoding="utf-8")
    wrong = {}
    try:
        for page in site[1]:
            if page.source not in LOOKED_AT: continue
            for mode, pixels, theme in (("light", 1400, "light"), ("dark", 1400, "dark"), ("phone", 375, "light")):
                width(browser, pixels, mobile=pixels < 1000)
                if mode != "dark":
                    show(browser, address(site, page))
                    browser.execute_script(script)
                browser.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
                found = browser.execute_async_script("""
                    const told = v => [v.id, v.nodes.length, v.nodes[0].html.slice(0, 150)], done = arguments[0];
                    axe.run({exclude: ['.katex']}, {resultTypes: ['violations']})
                      .then(r => done(r.violations.map(told)), e => done([String(e)]))""")
                if found: wrong[page.source, mode] = found
    finally: width(browser, 1400)
    assert not wrong


def test_documentation_is_upright_and_its_examples_are_code():
    from site_cells import upright
    said = upright("### f\n\n*KL from π* and from π_imp.*\n\n>>> f(1)\n2\n>>> f(2)\n3\n\nMore.")
    assert said == "### f\n\nKL from π\\* and from π_imp.\n\n```{.pycon}\n>>> f(1)\n2\n>>> f(2)\n3\n```\n\nMore."


def test_a_name_that_nbdev_links_is_no_link_in_a_link():
    import build_site
    said = "[[`a`](https://x/a.html#a) and [`b`](https://x/b.html)](../01_page.ipynb), [`c`](https://x/c.html)"
    plain = build_site.LINK_IN_LINK.sub(lambda m: "[" + build_site.NAME_LINK.sub(r"\1", m[1]) + "](", said)
    assert plain == "[`a` and `b`](../01_page.ipynb), [`c`](https://x/c.html)"
