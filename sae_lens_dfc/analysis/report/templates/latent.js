// One latent's page.
const MODELS = ["a", "b"];

function latentPage(latent) {
  const i = columns.latent.indexOf(latent);
  if (i < 0) {
    return [steps(null), make("h2", {}, `Latent ${latent}`), make("p", {}, "It is not on this page: it never fired on held-out text, or the crosscoder has no such latent.")];
  }
  const card = cards[latent], finding = findings[latent];
  const partition = columns.partition[i];
  const verdict = DATA.verdicts[columns.verdict[i]];
  return [
    steps(i),
    make("h2", {}, `Latent ${latent} `, make("span", { class: "chip " + partition }, DATA.partitions[partition])),
    finding ? findingSection(latent) : null,
    make("p", { class: finding ? "soft" : "lead" }, make("span", { class: finding ? "" : "verdict" }, finding ? "From activations: " : "", verdict || "Whether it is exclusive was not measured.")),
    numbers(i, card),
    card ? contextSections(i, card) : make("p", { class: "soft" }, "No contexts are stored for this latent: the page holds them only for selected latents."),
    card ? logitSection(card) : null,
    evidenceSection(i),
    finding ? sampleSection(finding) : null,
  ].flat().filter(Boolean);
}

/** Links to the table and to the previous and next latent. */
function steps(i) {
  const at = table.order.indexOf(i);
  const to = (other, label) => (other === undefined ? make("span", { class: "soft" }, label) : make("a", { href: "#latent-" + columns.latent[other] }, label));
  const links = at < 0 ? [] : [to(table.order[at - 1], "‹ previous"), to(table.order[at + 1], "next ›"), make("span", { class: "soft" }, `${at + 1} of ${table.order.length} in the table's order`)];
  return make("nav", { class: "steps", "aria-label": "Latents" }, make("a", { href: "#latents" }, "← All latents"), links);
}

function numbers(i, card) {
  const items = [
    ["firing rate", percent(columns.rate[i]) + " of pairs"],
    ["mean activation when it fires", shown(columns.mean[i])],
    ["maximum activation", shown(columns.max[i])],
    ["relative decoder norm (1: A only, 0: B only)", shown(columns.norm[i])],
    ...MODELS.filter((m) => card?.cosine[m] !== undefined).map((m) => [`cosine of encoder and decoder, ${m.toUpperCase()}`, shown(card.cosine[m])]),
  ];
  return make("dl", { class: "numbers" }, items.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

/** The screening's finding, copied from the list of findings. */
function findingSection(latent) {
  const copy = find("finding-" + latent).cloneNode(true);
  copy.querySelector("h4 a").replaceWith("Screening:");
  copy.removeAttribute("id");
  return make("div", { class: copy.className }, [...copy.childNodes]);
}

const headRow = (...titles) => make("thead", {}, make("tr", {}, titles.map((title, j) => make("th", { scope: "col", class: j === 2 ? "text" : null }, title))));
const wide = (label, child) => make("div", { class: "wide", role: "region", tabindex: 0, "aria-label": label }, child);

function contextSections(i, card) {
  const values = make("input", { type: "checkbox" });
  values.addEventListener("change", () => find("latent").classList.toggle("show-values", values.checked));
  const most = columns.max[i] || 1;
  const step = (share) => sample(`${shown(share * most)}`, share);
  const legend = make("p", { class: "legend " + columns.partition[i] }, "Activation: ", step(0.1), step(0.5), step(1), make("span", { class: "soft" }, "a deeper shade and a thicker underline mean a larger activation; a line ends each token; ▯ is a token with part of a character"), make("label", {}, values, " show values"));
  const quantiles = Math.max(0, ...card.contexts.map((context) => (context[6] ?? -1) + 1));
  const groups = [["Max-activating examples", card.contexts.filter((context) => context[6] === null)]];
  for (let q = quantiles - 1; q >= 0; q--) {
    groups.push([`Quantile ${q + 1} of ${quantiles} of its activations${q === 0 ? ", the weakest" : ""}`, card.contexts.filter((context) => context[6] === q)]);
  }
  return [make("h3", {}, "Contexts"), legend, ...groups.filter(([, contexts]) => contexts.length).map(([title, contexts]) =>
    make("section", { class: columns.partition[i] }, make("h4", {}, title), make("ol", { class: "context-list" }, contexts.map((context) => contextBox(context, most)))))];
}

function sample(text, share) {
  const element = make("span", { class: "fires" }, text);
  element.style.setProperty("--p", share);
  return element;
}

/** One context, in A's tokens and in B's. */
function contextBox(context, most) {
  const [segments, acts, document_, positionA, positionB, activation] = context;
  const at = new Map();
  for (let j = 0; j < acts.length; j += 2) at.set(acts[j], acts[j + 1]);
  const peak = Math.max(...at.values());
  const line = (model) => {
    const parts = segments.map((segment, s) => {
      const tokens = tokensOf(segment, model).map((token) => make("span", { class: "token" }, token || "▯"));
      const value = at.get(s);
      if (value === undefined) return make("span", { "data-s": s }, tokens);
      const share = Math.max(0.08, Math.min(1, value / most));
      const span = make("span", { class: value === peak ? "fires peak" : "fires", "data-s": s, title: shown(value) }, tokens, make("span", { class: "hidden value" }, ` (${shown(value)}) `));
      span.style.setProperty("--p", share.toFixed(3));
      return span;
    });
    return make("p", { class: "tokens", dir: "auto" }, make("span", { class: "who " + model }, model.toUpperCase(), make("span", { class: "hidden" }, ": ")), parts);
  };
  const where = `activation ${shown(activation)} · document ${document_}, A's token ${positionA}, B's token ${positionB}`;
  const box = make("li", { class: "context-box" }, make("p", { class: "where" }, where), make("div", { class: "pair" }, line("a"), line("b")));
  // Highlight the same segment in the other model's tokens.
  box.addEventListener("pointerover", (event) => {
    const s = event.target.closest("[data-s]")?.dataset.s;
    for (const span of box.querySelectorAll("[data-s]")) span.classList.toggle("same", span.dataset.s === s);
  });
  box.addEventListener("pointerleave", () => box.querySelectorAll(".same").forEach((span) => span.classList.remove("same")));
  return box;
}

function logitSection(card) {
  const models = MODELS.filter((model) => card.logits[model]);
  const parts = [make("h3", {}, "Direct logit effect")];
  if (!models.length) return [...parts, make("p", { class: "soft" }, "Its effect on logits was not measured.")];
  parts.push(make("p", { class: "soft" }, "Its decoder direction through the model's unembedding: the tokens whose logits it raises and lowers most, ignoring later layers. Later layers may counteract this; check with steering."));
  const list = (title, tokens) => make("table", { class: "logits" }, headRow(title, "logit"), make("tbody", {}, tokens.map(([token, value]) => make("tr", {}, make("td", {}, make("bdi", {}, token)), make("td", {}, shown(value))))));
  parts.push(make("div", { class: "pair" }, models.map((model) => make("section", { class: model }, make("h4", { class: "who" }, `${model.toUpperCase()}: `, make("bdi", {}, DATA.names[model])), make("div", { class: "pair" }, list("raises", card.logits[model][0]), list("lowers", card.logits[model][1]))))));
  return parts;
}

function evidenceSection(i) {
  const parts = [make("h3", {}, "Evidence")];
  const names = Object.keys(DATA.words).filter((name) => evidence[name]);
  if (names.every((name) => evidence[name][i] === null)) return [...parts, make("p", { class: "soft" }, "Nothing was measured about this latent's exclusivity.")];
  const [source, target] = (evidence.is_a ? evidence.is_a[i] : columns.norm[i] >= 0.5) ? ["A", "B"] : ["B", "A"];
  const said = (text) => text.replaceAll("{source}", source).replaceAll("{target}", target);
  const rows = names.map((name) => {
    const [title, words] = DATA.words[name];
    const error = evidence[name + "_se"]?.[i] ?? null;
    const beside = (DATA.references[name] ?? []).map(([whose, middle, low, high]) => make("div", {}, `${shown(middle)} (${shown(low)} to ${shown(high)}): ${whose}`));
    const value = evidence[name][i];
    return make("tr", {}, make("th", { scope: "row" }, said(title), make("span", { class: "means" }, said(words))), make("td", {}, value === null ? make("span", { class: "soft" }, "not measured") : shown(value) + (error === null ? "" : ` ± ${shown(error)}`)), make("td", { class: "text soft" }, beside));
  });
  return [...parts, make("p", { class: "soft" }, `Its source model, in which its decoder norm is larger, is ${source}; the other is ${target}.`), wide("Evidence", make("table", { class: "evidence" }, headRow("measure", "this latent", "reference: median (5th to 95th percentile)"), make("tbody", {}, rows)))];
}

/** Samples of one change and prompt, both models side by side. */
function sampleSection(finding) {
  const parts = [make("h3", {}, "Steering samples")];
  if (!finding.samples.length) return [...parts, make("p", { class: "soft" }, "No samples are stored.")];
  for (const samples of groupBy(finding.samples, sampleKey).values()) {
    const { change, strength, prompt } = samples[0];
    const sides = MODELS.map((model) => make("div", { class: model }, make("h4", { class: "who" }, `${model.toUpperCase()}: `, make("bdi", {}, DATA.names[model])), said(samples.filter((s) => s.model === model))));
    parts.push(make("div", { class: "sample" }, make("p", {}, make("strong", {}, `${change}, strength ${shown(strength)}`), " · prompt: ", make("bdi", {}, prompt)), make("div", { class: "pair" }, sides)));
  }
  return parts;
}
const sampleKey = (sample) => JSON.stringify([sample.change, sample.strength, sample.prompt]);

function groupBy(items, key) {
  const groups = new Map();
  for (const item of items) groups.set(key(item), [...(groups.get(key(item)) ?? []), item]);
  return groups;
}

/** Both continuations; the changed one is marked from where they diverge. */
function said(samples) {
  if (!samples.length) return make("p", { class: "soft" }, "Not sampled.");
  return samples.map(({ before, after }) => {
    let same = 0;
    while (same < after.length && after[same] === before[same]) same++;
    // Back to the start of the word.
    while (same > 0 && same < after.length && !/\s/.test(after[same - 1])) same--;
    const rest = after.slice(same);
    return make("div", {}, make("div", { class: "soft" }, "unchanged"), make("div", { class: "said", dir: "auto" }, before), make("div", { class: "soft" }, rest ? "changed" : "changed: the same text"), make("div", { class: "said", dir: "auto" }, after.slice(0, same), rest ? make("ins", {}, rest) : ""));
  });
}
