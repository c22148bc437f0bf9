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

let engine;
const query = $("#query"), results = $("#results");
function search() {
  const text = query.value.trim();
  results.hidden = !text;
  if (!text) return;
  if (!engine) {
    engine = new MiniSearch({ fields: ["title", "page", "text"], storeFields: ["url", "page", "title"],
      searchOptions: { boost: { title: 4, page: 2 }, prefix: true, fuzzy: (term) => (term.length > 5 ? 0.2 : 0), combineWith: "AND" } });
    engine.addAll(PAGES);
  }
  const found = engine.search(text).slice(0, 12);
  results.replaceChildren(...found.map((hit) => {
    const a = Object.assign(document.createElement("a"), { href: top_ + hit.url, textContent: hit.title || hit.page });
    if (hit.title) a.append(Object.assign(document.createElement("small"), { textContent: hit.page }));
    const item = document.createElement("li");
    item.append(a);
    return item;
  }));
  if (!found.length) results.replaceChildren(Object.assign(document.createElement("li"), { textContent: "nothing found", className: "none" }));
}
query.addEventListener("input", search);
query.addEventListener("focus", search);
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !/INPUT|TEXTAREA/.test(document.activeElement.tagName)) { event.preventDefault(); query.focus(); }
  if (event.key === "Escape") { results.hidden = true; query.blur(); }
  if (event.key === "ArrowDown" && document.activeElement === query) { event.preventDefault(); $("a", results)?.focus(); }
});
document.addEventListener("click", (event) => { if (!event.target.closest(".search")) results.hidden = true; });
