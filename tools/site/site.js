// Theme, menu, copy buttons, boxes that scroll, sliders, words, and search over the index that comes with the site
// (assets/index.js). No request leaves the page.
const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
const made = (name, properties, ...children) => {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
};
const root = document.documentElement, top_ = document.body.dataset.top;

$("#theme").addEventListener("click", () => {
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
});

// The list of chapters: where one is can be seen; on a phone it lies over the page
const chapters = $("#chapters"), menu = $("#menu"), current = $('#chapters [aria-current="page"]');
function showCurrent() {
  const box = current?.getBoundingClientRect(), list = chapters.getBoundingClientRect();
  if (box?.height && (box.bottom > list.bottom || box.top < list.top)) chapters.scrollTop += box.top - list.top - list.height / 3;
}
function openMenu(open) {
  if (open === chapters.classList.contains("open")) return;
  chapters.classList.toggle("open", open);
  menu.setAttribute("aria-expanded", open);
  if (open) chapters.scrollTop = 0;
}
menu.addEventListener("click", () => openMenu(!chapters.classList.contains("open")));
chapters.addEventListener("click", (event) => { if (event.target.closest("a")) openMenu(false); });
matchMedia("(max-width: 56rem)").addEventListener("change", () => openMenu(false));
showCurrent();

for (const block of $$(".box.code")) {
  const button = made("button", { className: "copy", textContent: "copy", type: "button" });
  button.setAttribute("aria-label", "Copy this code");
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText($("code", block).textContent);
    button.textContent = "copied";
    setTimeout(() => (button.textContent = "copy"), 1200);
  });
  block.append(button);
}

// What is wider than the page: its box shows where it goes on, and the keyboard reaches it
const kinds = { code: "Code", out: "Output", table: "Table", math: "Formula" };
// A table of sentences that is too wide for a phone: its rows one below the other, each cell with its heading before it
const small = matchMedia("(max-width: 56rem)");
function stack(scroller) {
  const heads = $$("thead th", scroller).map((head) => head.textContent.trim());
  for (const row of $$("tbody tr", scroller)) [...row.cells].forEach((cell, i) => { if (heads[i]) cell.dataset.label = heads[i]; });
  scroller.closest(".box").classList.add("stack");
}
small.addEventListener("change", () => $$(".stack").forEach((box) => box.classList.remove("stack")));
function mark([scroller, left, whole, width]) {
  const box = scroller.closest(".box"), more = [left > 2 && "left", left + width < whole - 2 && "right"].filter(Boolean).join(" ");
  if (more) box.dataset.more = more; else delete box.dataset.more;
  if (!width) return;
  if (whole > width + 2) {
    const kind = Object.keys(kinds).find((name) => box.classList.contains(name));
    scroller.tabIndex = 0;
    scroller.setAttribute("role", "group");
    scroller.setAttribute("aria-label", `${kinds[kind] || "Figure"}, scrolls sideways`);
  } else for (const name of ["tabindex", "role", "aria-label"]) scroller.removeAttribute(name);
}
// All are measured before one is marked: the page is laid out once, not once a box
function measure(scrollers) {
  if (small.matches) {
    const wide = ({ clientWidth, scrollWidth }) => clientWidth && scrollWidth > clientWidth + 2;
    scrollers.filter((scroller) => $("td.long", scroller) && wide(scroller)).forEach(stack);
  }
  scrollers.map((scroller) => [scroller, scroller.scrollLeft, scroller.scrollWidth, scroller.clientWidth]).forEach(mark);
}
const sized = new ResizeObserver((entries) => measure(entries.map((entry) => entry.target)));
for (const scroller of $$(".scroll")) {
  sized.observe(scroller);
  scroller.addEventListener("scroll", () => measure([scroller]), { passive: true });
}
document.fonts?.ready.then(() => measure($$(".scroll")));

// The contents of the page follow the reader
const links = new Map();
for (const a of $$("#toc a, .here a")) {
  const id = decodeURIComponent(a.hash.slice(1));
  links.set(id, [...(links.get(id) || []), a]);
}
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) {
    for (const a of [...links.values()].flat()) a.removeAttribute("aria-current");
    for (const a of links.get(entry.target.id) || []) a.setAttribute("aria-current", "true");
  }
}, { rootMargin: "0px 0px -80% 0px" });
for (const id of links.keys()) seen.observe(document.getElementById(id));

// Figures with sliders
for (const figure of $$("figure.slides")) {
  const frames = JSON.parse($("script", figure).textContent), inputs = $$("input", figure), image = $("img", figure);
  const fetchAll = () => { image.loading = "eager"; for (const source of Object.values(frames)) new Image().src = source; };
  figure.addEventListener("pointerenter", fetchAll, { once: true });
  figure.addEventListener("focusin", fetchAll, { once: true });
  for (const input of inputs) input.addEventListener("input", () => {
    const said = JSON.parse(input.dataset.said)[input.value];
    input.parentNode.querySelector("output").textContent = said;
    input.setAttribute("aria-valuetext", said);
    image.src = frames[inputs.map((i) => i.value).join()];
  });
}

// Words of the glossary: the meaning is shown on pointing, on focus, and on a tap; Escape and a tap elsewhere take it away
let told = null, waiting;
const meaning = made("div", { id: "meaning", hidden: true });
meaning.setAttribute("role", "tooltip");
function tell(term) {
  clearTimeout(waiting);
  if (told === term) return;
  told?.setAttribute("aria-expanded", "false");
  told = term;
  meaning.hidden = !term;
  if (!term) return;
  term.setAttribute("aria-expanded", "true");
  meaning.replaceChildren(...document.getElementById(term.dataset.word).cloneNode(true).childNodes);
  term.after(meaning);
  const at = term.getBoundingClientRect(), around = meaning.offsetParent.getBoundingClientRect();
  const left = Math.max(16, Math.min(at.left, root.clientWidth - meaning.offsetWidth - 16));
  const below = at.bottom + meaning.offsetHeight + 12 < innerHeight || at.top < meaning.offsetHeight + 70;
  meaning.style.left = `${left - around.left}px`;
  meaning.style.top = `${(below ? at.bottom + 6 : at.top - meaning.offsetHeight - 6) - around.top}px`;
}
const later = () => { clearTimeout(waiting); waiting = setTimeout(() => { if (!meaning.contains(document.activeElement)) tell(null); }, 250); };
for (const term of $$(".term")) {
  term.setAttribute("aria-expanded", "false");
  term.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse") tell(term); });
  term.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse" && document.activeElement !== term) later(); });
  term.addEventListener("focus", () => { if (term.matches(":focus-visible")) tell(term); });
  term.addEventListener("blur", later);
  term.addEventListener("click", () => tell(term));
}
meaning.addEventListener("pointerenter", () => clearTimeout(waiting));
meaning.addEventListener("pointerleave", later);
meaning.addEventListener("focusout", later);

// Search; a Greek letter is found by its name
const letters = { α: "alpha", β: "beta", γ: "gamma", δ: "delta", ε: "epsilon", λ: "lambda", π: "pi", ρ: "rho", σ: "sigma", τ: "tau" };
const query = $("#query"), results = $("#results");
const load = (name) => new Promise((done) => document.head.append(made("script", { src: `${top_}assets/${name}`, onload: done })));
let engine;    // made when somebody first searches: the index is the largest file of the site
const ready = () => engine ??= Promise.all([load("minisearch.js"), load("index.js")]).then(() => {
  const engine = new MiniSearch({
    fields: ["keywords", "name", "page", "promise", "text", "code"], storeFields: ["url", "page", "title", "text", "promise"],
    processTerm: (term) => letters[term.toLowerCase()] || term.toLowerCase(),
    extractField: (entry, field) => (field === "name" ? entry.title || entry.page : entry[field]),
    searchOptions: {
      boost: { keywords: 40, name: 12, promise: 3, page: 1, text: 1, code: 0.4 }, prefix: (term) => term.length > 2, combineWith: "AND",
      fuzzy: (term) => (term.length > 5 ? 0.2 : 0), boostDocument: (id, term, stored) => (stored.title ? 1 : 2.5) },
  });
  engine.addAll(PAGES);
  return engine;
});

// A sentence of the text that holds the longest of the words that it has, with the word marked
function excerpt(hit) {
  const text = hit.promise && !hit.title ? `${hit.promise} ${hit.text}` : hit.text;
  const word = (term) => new RegExp(`(?<![\\p{L}\\d])(${term.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")})`, "iu");
  const place = hit.terms.filter((term) => term.length > 2 || hit.terms.length < 2).sort((a, b) => b.length - a.length).map(word).find((one) => one.test(text));
  const at = place ? text.search(place) : 0, before = text.lastIndexOf(". ", at) + 1;
  const from = at - before < 60 ? before : text.lastIndexOf(" ", at - 40) + 1;
  const shown = text.slice(from, from + 130).trim(), cut = text.length > from + 130 ? "…" : "";
  const parts = place ? shown.split(place) : [];
  return parts.length > 2 ? [parts[0], made("mark", { textContent: parts[1] }), parts.slice(2).join("") + cut] : [shown + cut];
}
// A title that is just what was asked for comes first, that of a page before that of a section
const bare = (title) => title.toLowerCase().replace(/^\d+ · /, "").trim();
function rank(hits, text) {
  const exact = (hit) => (bare(hit.title || hit.page) === bare(text) ? (hit.title ? 1 : 2) : 0);
  return hits.map((hit, i) => [exact(hit), i, hit]).sort((a, b) => b[0] - a[0] || a[1] - b[1]).map(([, , hit]) => hit);
}
function entry(hit) {
  const a = made("a", { href: top_ + hit.url }, hit.title ? `${hit.page}: ${hit.title}` : hit.page);
  a.append(made("small", {}, ...excerpt(hit)));
  return a;
}
async function search() {
  const text = query.value.trim();
  if (text) {
    const all = (await ready()).search(text), hits = all.length ? all : (await ready()).search(text, { combineWith: "OR" });
    const found = rank(hits, text).slice(0, 12);
    if (text !== query.value.trim()) return;
    results.replaceChildren(...found.map(entry));
    if (!found.length) results.replaceChildren(made("p", { textContent: "nothing found", className: "none" }));
  }
  results.hidden = !text;
}
query.addEventListener("input", search);
query.addEventListener("focus", search);

document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !/INPUT|TEXTAREA/.test(document.activeElement.tagName)) { event.preventDefault(); query.focus(); }
  if (event.key === "Escape") {
    if (told) { const term = told; tell(null); if (meaning.contains(document.activeElement)) term.focus(); }
    results.hidden = true;
    if (document.activeElement === query || results.contains(document.activeElement)) query.blur();
    if (chapters.classList.contains("open")) { openMenu(false); menu.focus(); }
  }
  if (event.key === "Enter" && event.target === query) $("a", results)?.click();
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step && event.target.closest(".search")) {
    const stops = [query, ...$$("a", results)];
    event.preventDefault();
    stops[stops.indexOf(document.activeElement) + step]?.focus();
  }
});
document.addEventListener("click", (event) => {
  if (!event.target.closest(".search")) results.hidden = true;
  if (!event.target.closest(".term, #meaning")) tell(null);
});

// On paper everything is open
addEventListener("beforeprint", () => { for (const fold of $$("article details:not([open])")) { fold.open = true; fold.dataset.printed = ""; } });
addEventListener("afterprint", () => { for (const fold of $$("details[data-printed]")) { fold.open = false; delete fold.dataset.printed; } });
