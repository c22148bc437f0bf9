// Theme, menu, copy buttons, and search over the index that comes with the site (assets/index.js). No request leaves the page.
const $ = (selector, root = document) => root.querySelector(selector);
const root = document.documentElement, top_ = document.body.dataset.top;

$("#theme").addEventListener("click", () => {
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
});

$("#menu").addEventListener("click", (event) => {
  const open = $("#chapters").classList.toggle("open");
  event.currentTarget.setAttribute("aria-expanded", open);
});

for (const block of document.querySelectorAll("div.sourceCode")) {
  const button = Object.assign(document.createElement("button"), { className: "copy", textContent: "copy" });
  button.setAttribute("aria-label", "Copy this code");
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText($("code", block).innerText);
    button.textContent = "copied";
    setTimeout(() => (button.textContent = "copy"), 1200);
  });
  block.append(button);
}

const links = new Map([...document.querySelectorAll("#toc a")].map((a) => [a.getAttribute("href").slice(1), a]));
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) {
    for (const a of links.values()) a.removeAttribute("aria-current");
    links.get(entry.target.id)?.setAttribute("aria-current", "true");
  }
}, { rootMargin: "0px 0px -80% 0px" });
for (const id of links.keys()) seen.observe(document.getElementById(id));

const query = $("#query"), results = $("#results");
const load = (name) => new Promise((done) => document.head.append(Object.assign(document.createElement("script"), { src: `${top_}assets/${name}`, onload: done })));
let engine;    // made when somebody first searches: the index is the largest file of the site
const ready = () => engine ??= Promise.all([load("minisearch.js"), load("index.js")]).then(() => {
  const made = new MiniSearch({ fields: ["title", "page", "text"], storeFields: ["url", "page", "title", "text"],
    searchOptions: { boost: { title: 4, page: 2 }, prefix: true, fuzzy: (term) => (term.length > 5 ? 0.2 : 0), combineWith: "AND" } });
  made.addAll(PAGES);
  return made;
});

function entry(hit) {
  const a = Object.assign(document.createElement("a"), { href: top_ + hit.url, textContent: hit.title || hit.page });
  const at = Math.max(0, hit.text.toLowerCase().indexOf(hit.terms[0]) - 30);
  const about = [hit.title ? hit.page : "", hit.text.slice(at, at + 90)].filter(Boolean).join(" · ");
  a.append(Object.assign(document.createElement("small"), { textContent: about }));
  const item = document.createElement("li");
  item.append(a);
  return item;
}

async function search() {
  const text = query.value.trim();
  if (text) {
    const found = (await ready()).search(text).slice(0, 12);
    if (text !== query.value.trim()) return;
    results.replaceChildren(...found.map(entry));
    if (!found.length) results.replaceChildren(Object.assign(document.createElement("li"), { textContent: "nothing found", className: "none" }));
  }
  results.hidden = !text;
}
query.addEventListener("input", search);
query.addEventListener("focus", search);
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !/INPUT|TEXTAREA/.test(document.activeElement.tagName)) { event.preventDefault(); query.focus(); }
  if (event.key === "Escape") {
    results.hidden = true;
    if (document.activeElement === query || results.contains(document.activeElement)) query.blur();
    if ($("#chapters").classList.contains("open")) { $("#menu").click(); $("#menu").focus(); }
  }
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step && event.target.closest(".search")) {
    const stops = [query, ...results.querySelectorAll("a")];
    event.preventDefault();
    stops[stops.indexOf(document.activeElement) + step]?.focus();
  }
});
for (const wide of document.querySelectorAll("pre, table, .equation"))    // what scrolls sideways can be reached with the keyboard
  if (wide.scrollWidth > wide.clientWidth) wide.tabIndex = 0;
document.addEventListener("click", (event) => { if (!event.target.closest(".search")) results.hidden = true; });
