"""The site in a real browser, with the network off. Needs Chromium, Node with `npm ci` run in tools/site, and the `site` extra: `make test-site`."""
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
pytestmark = [pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"), pytest.mark.xdist_group("site")]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    import build_site
    folder = tmp_path_factory.mktemp("site")
    return folder, build_site.build(folder / "html")


@pytest.fixture(scope="module")
def browser(site):
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--window-size=1400,1400",
                     "--host-resolver-rules=MAP * ~NOTFOUND"):     # no address resolves: whatever is fetched fails
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def address(site, page) -> str:
    return (site[0] / "html" / page.url).as_uri()


def text(site, page) -> str:
    return (site[0] / "html" / page.url).read_text(encoding="utf-8")


def test_every_page_loads_without_complaint(site, browser):
    for page in site[1]:
        browser.get(address(site, page))
        assert [entry["message"] for entry in browser.get_log("browser")] == [], page.source
        broken = browser.execute_script("return [...document.images].filter(i => { i.loading = 'eager'; return i.complete && !i.naturalWidth }).map(i => i.src)")
        assert not broken, page.source


def test_no_formula_is_left_as_text(site, browser):
    for page in site[1]:
        browser.get(address(site, page))
        prose = browser.execute_script("const a = document.querySelector('article').cloneNode(true);"
                                       "a.querySelectorAll('pre, code, .katex, script').forEach(e => e.remove()); return a.textContent")
        assert not re.search(r"\$|\\\(|\\\[|@(eq|fig|sec)-|\{#", prose), (page.source, re.search(r".{0,60}(\$|\\\(|@(eq|fig|sec)-|\{#).{0,60}", prose))


def test_links_and_anchors_resolve(site):
    anchors = {page.url: set(re.findall(r'\bid="([^"]+)"', text(site, page))) for page in site[1]}
    for page in site[1]:
        for target in set(re.findall(r'href="(?!https?:|mailto:|data:)([^"]*)"', text(site, page))):
            path, _, anchor = html.unescape(target).partition("#")
            found = (site[0] / "html" / page.url).parent.joinpath(path).resolve() if path else site[0] / "html" / page.url
            assert found.exists(), f"{page.source}: {target} leads nowhere"
            if anchor: assert unquote(anchor) in anchors[found.relative_to((site[0] / "html").resolve()).as_posix()], f"{page.source}: no anchor {target}"


def test_one_title_and_headings_in_order(site):
    for page in site[1]:
        levels = [int(level) for level in re.findall(r"<h([1-6])\b", re.search(r"<article>(.*?)</article>", text(site, page), re.S)[1])]
        assert levels.count(1) == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:])), page.source


def test_every_figure_says_what_it_shows(site):
    for page in site[1]:
        assert not re.findall(r'<img(?![^>]*\balt="[^"]+")[^>]*>', text(site, page)), page.source


def test_search_finds(site, browser):
    browser.get(address(site, site[1][0]))
    browser.find_element("id", "query").send_keys("TDPO2")
    found = [a.get_attribute("href") for a in browser.find_elements("css selector", "#results a")]
    assert any("tdpo" in href for href in found)
    browser.get(found[0])
    assert not browser.get_log("browser")


def test_narrow_pages_do_not_scroll_sideways(site, browser):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 375, "height": 800, "deviceScaleFactor": 1, "mobile": True})
    try:
        for page in site[1]:
            browser.get(address(site, page))
            wide = browser.execute_script("return document.documentElement.scrollWidth")
            assert wide <= 375, f"{page.source} is {wide} pixels wide"
    finally: browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_dark_is_dark_and_is_remembered(site, browser):
    browser.get(address(site, site[1][0]))
    paper = lambda: browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    light = paper()
    browser.find_element("id", "theme").click()
    dark = paper()
    browser.refresh()
    assert light != dark == paper()
    browser.find_element("id", "theme").click()


def test_a_figure_slides_without_a_kernel(site, browser):
    page = next(page for page in site[1] if 'class="slides"' in text(site, page))
    browser.get(address(site, page))
    moved = browser.execute_script("const f = document.querySelector('figure.slides'), i = f.querySelector('input'), before = f.querySelector('img').src;"
                                   "i.value = i.value == 0 ? 1 : 0; i.dispatchEvent(new Event('input')); return before !== f.querySelector('img').src")
    assert moved


def test_a_notebook_that_breaks_the_site_is_named(tmp_path, monkeypatch):
    import build_site
    import nbformat
    for name in ("settings.ini", "pyproject.toml"): shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "nbs").mkdir()
    code = nbformat.v4.new_code_cell("#| exports\nimport math\nmath.no_such_name")
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A page\n\n> It breaks."), code]), tmp_path / "nbs" / "01_page.ipynb")
    monkeypatch.setattr(build_site, "ROOT", tmp_path)
    with pytest.raises(build_site.SiteError, match="nbs/01_page.ipynb: AttributeError: .*no_such_name"): build_site.process_notebooks()
