"use strict";
// The page's data, and the virtualized table of latents: only rows in view are in the document.
const DATA = JSON.parse(document.getElementById("data").textContent);
const { columns, evidence, cards, findings } = DATA;
const N = columns.latent.length;
const ROW = 34;
const BEYOND = 20;
const find = (id) => document.getElementById(id);

/** An element; text is always text, never markup. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

function shown(x) {
  if (x === null || x === undefined) return "–";
  if (typeof x === "boolean") return x ? "yes" : "no";
  const size = Math.abs(x);
  if (size >= 1000 || Number.isInteger(x)) return x.toLocaleString("en");
  if (size < 0.001) return x.toPrecision(2);
  return x.toFixed(size >= 10 ? 2 : 3);
}
const percent = (x) => (x === null ? "–" : x === 0 || x >= 1e-4 ? (100 * x).toFixed(2) + " %" : (100 * x).toPrecision(2) + " %");

const verdictOf = (i) => findings[columns.latent[i]]?.verdict ?? (DATA.verdicts[columns.verdict[i]].split(":")[0] || "not measured");
const tokensOf = (segment, model) => (typeof segment === "string" ? [segment] : segment[model === "a" ? 0 : 1]);
const textOf = (context, model) => context[0].map((segment) => tokensOf(segment, model).join("")).join("");

const COLUMNS = [
  { title: "rank", width: "5rem", value: (i) => i + 1, up: true },
  { title: "latent", width: "5.5rem", value: (i) => columns.latent[i], up: true, cell: link },
  { title: "partition", width: "6rem", value: (i) => DATA.partitions[columns.partition[i]], up: true, text: true },
  { title: "verdict", width: "14rem", value: verdictOf, up: true, text: true },
  { title: "firing rate", about: "share of pairs on which it fires", width: "5.5rem", value: (i) => columns.rate[i], show: percent },
  { title: "max", about: "maximum activation", width: "5.5rem", value: (i) => columns.max[i] },
  { title: "norm", about: "relative decoder norm: 1 is A only, 0 is B only", width: "5rem", value: (i) => columns.norm[i] },
  { title: "AUROC", about: "how well its firing is predicted from the other model; 0.5 is chance", width: "5rem", value: (i) => evidence.auc[i], up: true, needs: "auc" },
  { title: "q", about: "smallest false discovery rate at which it is significant (exclusive)", width: "5.5rem", value: (i) => evidence.q[i], up: true, needs: "q" },
  { title: "description or strongest context", width: "auto", value: (i) => glimpseText(i), up: true, text: true, cell: glimpse },
].filter((column) => !column.needs || evidence[column.needs]);

function link(i) {
  return make("a", { href: "#latent-" + columns.latent[i], "data-i": i }, String(columns.latent[i]));
}

function glimpseText(i) {
  const description = findings[columns.latent[i]]?.description;
  const context = cards[columns.latent[i]]?.contexts[0];
  return description ?? (context ? textOf(context, "a") : null);
}

/** Its description, or its strongest context from shortly before the place where it fires most. */
function glimpse(i) {
  const description = findings[columns.latent[i]]?.description;
  const context = cards[columns.latent[i]]?.contexts[0];
  if (description || !context) return description ?? make("span", { class: "soft" }, "no context stored");
  const [segments, acts] = context;
  let peak = 0;
  for (let j = 2; j < acts.length; j += 2) if (acts[j + 1] > acts[peak + 1]) peak = j;
  const part = (from, to) => segments.slice(from, to).map((segment) => tokensOf(segment, "a").join("")).join("").slice(0, 200);
  const at = acts[peak];
  return make("bdi", { class: "context" }, part(Math.max(0, at - 5), at), make("mark", {}, part(at, at + 1)), part(at + 1, at + 12));
}

/** The text that a search looks through, built at the first search. */
let haystacks = null;
function haystack(i) {
  haystacks ??= columns.latent.map((latent, j) => {
    const card = cards[latent], finding = findings[latent];
    const parts = [latent, DATA.verdicts[columns.verdict[j]]];
    if (finding) parts.push(finding.verdict, finding.description, ...finding.said);
    if (card) {
      parts.push(...card.contexts.map((context) => textOf(context, "a")));
      for (const effect of Object.values(card.logits)) parts.push(...effect.flat().map(([token]) => token));
    }
    return parts.join("\n").toLowerCase();
  });
  return haystacks[i];
}

const table = { order: Array.from({ length: N }, (_, i) => i), column: 0, up: true, drawn: new Map(), onPaper: false };

function refresh() {
  const words = find("search").value.trim().toLowerCase();
  const partition = find("partition").value, verdict = find("verdict").value;
  const withContexts = find("with-contexts").checked;
  const exact = /^#\d+$/.test(words) ? Number(words.slice(1)) : null;
  const kept = [];
  for (let i = 0; i < N; i++) {
    if (partition && columns.partition[i] !== partition) continue;
    if (verdict && verdictOf(i) !== verdict) continue;
    if (withContexts && !cards[columns.latent[i]]) continue;
    if (exact !== null ? columns.latent[i] !== exact : words && !haystack(i).includes(words)) continue;
    kept.push(i);
  }
  table.order = sorted(kept);
  find("count").textContent = kept.length === N ? `${N.toLocaleString("en")} latents` : `${kept.length.toLocaleString("en")} of ${N.toLocaleString("en")} latents`;
  find("table").setAttribute("aria-rowcount", kept.length + 1);
  find("rows").scrollTop = 0;
  draw(true);
}

/** Sort by the chosen column; missing values come last in either direction. */
function sorted(kept) {
  const { value, text } = COLUMNS[table.column];
  const keys = new Map(kept.map((i) => [i, value(i)]));
  const collator = new Intl.Collator("en");
  const way = table.up ? 1 : -1;
  return kept.sort((i, j) => {
    const x = keys.get(i) ?? null, y = keys.get(j) ?? null;
    if (x === null || y === null) return (x === null) - (y === null) || i - j;
    return way * (text ? collator.compare(x, y) : x - y) || i - j;
  });
}

function draw(anew = false) {
  if (table.onPaper) return;
  const rows = find("rows"), body = find("table").tBodies[0];
  const first = Math.max(0, Math.floor(rows.scrollTop / ROW) - BEYOND);
  const last = Math.min(table.order.length, first + Math.ceil(rows.clientHeight / ROW) + 2 * BEYOND);
  if (anew) table.drawn = new Map();
  const drawn = new Map();
  for (let at = first; at < last; at++) drawn.set(at, table.drawn.get(at) ?? row(at));
  if (anew) body.replaceChildren(gap(), gap());
  // Rows still in view are not moved, so that focus is kept.
  for (const [at, element] of table.drawn) if (!drawn.has(at)) element.remove();
  let before = body.firstChild;
  for (const element of drawn.values()) {
    if (before.nextSibling !== element) before.after(element);
    before = element;
  }
  body.firstChild.firstChild.style.height = first * ROW + "px";
  body.lastChild.firstChild.style.height = (table.order.length - last) * ROW + "px";
  table.drawn = drawn;
}

const gap = () => make("tr", { class: "gap", "aria-hidden": "true" }, make("td", { colspan: COLUMNS.length }));

function row(at) {
  const i = table.order[at];
  const cells = COLUMNS.map(({ value, cell, show, text, title }) =>
    make(title === "latent" ? "th" : "td", { class: text ? "text" : null, scope: title === "latent" ? "row" : null }, cell ? cell(i) : (show ?? (text ? String : shown))(value(i))));
  return make("tr", { "aria-rowindex": at + 2, "data-at": at }, cells);
}

function head() {
  const cells = COLUMNS.map(({ title, about, width, text }, j) => {
    const button = make("button", { type: "button", title: about ?? null }, title, make("span", { class: "arrow", "aria-hidden": "true" }));
    button.addEventListener("click", () => sortBy(j));
    const cell = make("th", { scope: "col", class: text ? "text" : null }, button);
    cell.style.width = width;
    return cell;
  });
  find("table").tHead.replaceChildren(make("tr", { "aria-rowindex": 1 }, cells));
  mark();
}

function sortBy(j) {
  table.up = table.column === j ? !table.up : COLUMNS[j].up ?? false;
  table.column = j;
  mark();
  refresh();
}

function mark() {
  for (const [j, cell] of [...find("table").tHead.rows[0].cells].entries()) {
    const way = j === table.column ? (table.up ? "ascending" : "descending") : null;
    if (way) cell.setAttribute("aria-sort", way);
    else cell.removeAttribute("aria-sort");
    cell.querySelector(".arrow").textContent = way ? (table.up ? " ▲" : " ▼") : "";
  }
}

/** Focus a row, and draw it first if it is out of view. */
function focusRow(at) {
  const rows = find("rows");
  at = Math.max(0, Math.min(at, table.order.length - 1));
  const room = rows.clientHeight - find("table").tHead.offsetHeight - ROW;
  if (at * ROW < rows.scrollTop) rows.scrollTop = at * ROW;
  else if (at * ROW > rows.scrollTop + room) rows.scrollTop = at * ROW - room;
  draw();
  table.drawn.get(at)?.querySelector("a").focus({ preventScroll: true });
}

function onKey(event) {
  const at = event.target.closest("[data-at]")?.dataset.at;
  const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 15, PageUp: -15, Home: -N, End: N };
  if (at === undefined || !(event.key in steps)) return;
  event.preventDefault();
  focusRow(Number(at) + steps[event.key]);
}

function openTable() {
  const verdicts = [...new Set(columns.latent.map((_, i) => verdictOf(i)))];
  find("verdict").append(...verdicts.map((verdict) => make("option", { value: verdict }, verdict)));
  head();
  for (const id of ["controls", "rows"]) find(id).hidden = false;
  for (const id of ["search", "partition", "verdict", "with-contexts"]) find(id).addEventListener("input", refresh);
  find("controls").addEventListener("submit", (event) => event.preventDefault());
  find("rows").addEventListener("scroll", () => draw(), { passive: true });
  find("rows").addEventListener("keydown", onKey);
  refresh();
}
