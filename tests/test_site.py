"""The site in a real browser, with the network off. Needs Chromium, Node with `npm ci` run in tools/site, and the
`site` extra: `make test-site`.
"""

import base64
import html
import importlib.util
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
         "npm packages in tools/site (npm ci)": (ROOT / "tools" / "site" / "node_modules").exists(),
         "pypandoc_binary": importlib.util.find_spec("pypandoc"), "selenium": importlib.util.find_spec("selenium")}
MISSING = [name for name, found in NEEDS.items() if not found]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.xdist_group("site"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    import build_site
    folder = tmp_path_factory.mktemp("site")
    return folder, build_site.build(folder / "html")


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
        "--window-size=1400,1400",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ):     # no address resolves: whatever is fetched fails
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
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
    return (site[0] / "html" / page.url).as_uri()


def text(site, page) -> str:
    return (site[0] / "html" / page.url).read_text(encoding="utf-8")


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
PALE = """    // texts whose contrast with what is behind them is below WCAG's AA
const parts = c => c.match(/[\\d.]+/g).map(Number);
const linear = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const bright = c => { const [r, g, b] = parts(c).map(linear); return 0.2126 * r + 0.7152 * g + 0.0722 * b };
const behind = e => {
  for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor, a = parts(c)[3];
    if (a === undefined || a === 1) return c;
  }
};
const written = e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && e.getClientRects().length;
const found = new Map();
for (const e of document.querySelectorAll('body *')) {
  if (e.closest('.katex, script, [hidden]') || !written(e)) continue;
  const style = getComputedStyle(e), size = parseFloat(style.fontSize);
  const large = size >= 24 || size >= 18.66 && style.fontWeight >= 700;
  const [a, b] = [bright(style.color), bright(behind(e))], ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const what = `${e.tagName}.${e.className} ${ratio.toFixed(2)} ${e.textContent.slice(0, 30)}`;
  if (ratio < (large ? 3 : 4.5)) found.set(style.color + behind(e), what);
}
return [...found.values()]"""

LISTED = """const box = document.querySelector('#chapters [aria-current]').getBoundingClientRect();
return box.height > 0 && box.bottom <= innerHeight"""


@pytest.fixture(scope="module")
def visits(site, browser):
    "What a browser sees of each page, in one visit: light and dark at 1400 pixels, then as a phone."
    seen = {}
    for page in site[1]:
        width(browser, 1400)
        show(browser, address(site, page))
        see = seen[page.source] = {
            "broken": browser.execute_async_script(
                f"const done = arguments[0]; (async () => {{ {BROKEN} }})().then(done)"
            ),
            "prose": browser.execute_script(PROSE),
            "listed": browser.execute_script(LISTED),
            "pale": {},
        }
        for theme in ("dark", "light"):
            browser.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
            see["pale"][theme] = browser.execute_script(PALE)
            shoot(browser, page, theme)
        width(browser, 375, mobile=True)
        see["narrow"] = browser.execute_script("return Math.max(innerWidth, document.documentElement.scrollWidth)")
        shoot(browser, page, "phone")
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


def test_links_and_anchors_resolve(site):
    anchors = {page.url: set(re.findall(r'\bid="([^"]+)"', text(site, page))) for page in site[1]}
    for page in site[1]:
        for target in set(re.findall(r'href="(?!https?:|mailto:|data:)([^"]*)"', text(site, page))):
            path, _, anchor = html.unescape(target).partition("#")
            found = (
                (site[0] / "html" / page.url).parent.joinpath(path).resolve() if path else site[0] / "html" / page.url
            )
            assert found.exists(), f"{page.source}: {target} leads nowhere"
            if anchor and found.suffix == ".html":
                assert unquote(anchor) in anchors[found.relative_to((site[0] / "html").resolve()).as_posix()], (
                    f"{page.source}: no anchor {target}"
                )


def test_one_title_and_headings_in_order(site):
    for page in site[1]:
        levels = [int(level) for level in re.findall(r"<h([1-6])\b", article(site, page))]
        assert levels.count(1) == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=True)), page.source


def test_every_figure_says_what_it_shows(site):
    for page in site[1]:
        assert not re.findall(r'<img(?![^>]*\balt="[^"]+")[^>]*>', text(site, page)), page.source


def test_search_finds(site, browser):
    from selenium.webdriver.support.ui import WebDriverWait
    show(browser, address(site, site[1][0]))
    browser.find_element("id", "query").send_keys("TDPO2")
    links = WebDriverWait(browser, 30).until(lambda b: b.find_elements("css selector", "#results a"))
    found = [a.get_attribute("href") for a in links]
    assert any("tdpo" in href for href in found)
    show(browser, found[0])
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
    blocks, buttons = (
        len(browser.find_elements("css selector", s)) for s in ("div.sourceCode", "div.sourceCode > button.copy")
    )
    assert blocks == buttons > 0


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
    folder, pages = site[0] / "html", site[1]
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


@pytest.mark.skipif(
    not (ROOT / "_docs" / "index.html").exists(), reason="there is no _docs: made by nbdev_docs, with Quarto"
)
def test_quarto_renders_the_same(site):
    strip = lambda html_: " ".join(html.unescape(re.sub(r"<[^>]+>", "", html_)).split())
    for page in site[1]:
        theirs, ours = (
            re.search(r"<main.*?</main>", (ROOT / "_docs" / page.url).read_text(encoding="utf-8"), re.S)[0],
            article(site, page),
        )
        facts = [
            {
                "headings": [strip(h) for h in re.findall(r"<h2[^>]*>(.*?)</h2>", body, re.S)],
                "equations": len(re.findall(r'class="math display"', body)),
                "figures": len(re.findall(r'<img(?![^>]*src="https?:)', body)),
                "links": {link for link in re.findall(r'href="(https?://(?!tokpref\.github)[^"]+)"', body)},
            }
            for body in (ours, theirs)
        ]
        assert facts[0] == facts[1], page.source


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
    code = nbformat.v4.new_code_cell("#| exports\nimport math\nmath.no_such_name")
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A page\n\n> It breaks."), code]),
        tmp_path / "nbs" / "01_page.ipynb",
    )
    monkeypatch.setattr(build_site, "ROOT", tmp_path)
    with pytest.raises(build_site.SiteError, match="nbs/01_page.ipynb: AttributeError: .*no_such_name"):
        build_site.process_notebooks()
