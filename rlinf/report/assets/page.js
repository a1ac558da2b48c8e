"use strict";
// Everything that comes from the run goes into the page as text nodes and attributes, never as markup.
const D = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function make(namespace, tag, props, children) {
  const [name, ...classes] = tag.split(".");
  const node = namespace ? document.createElementNS(namespace, name) : document.createElement(name);
  if (classes.length) node.setAttribute("class", classes.join(" "));
  for (const [key, value] of Object.entries(props || {})) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "style") node.style.cssText = value;
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((c) => c !== null && c !== undefined && c !== false).map((c) => (c instanceof Node ? c : String(c))));
  return node;
}
const h = (tag, props, ...children) => make(null, tag, props, children);
const s = (tag, props, ...children) => make(SVG, tag, props, children);
const rich = (text) => text.split("`").map((part, i) => (i % 2 ? h("code", null, part) : part));
const known = (values) => values.filter((v) => v !== null);
const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);

function format(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(1).replace("e+", "e").replace("-", "−");
  const text = size >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(size >= 100 ? 4 : 3));
  return text.replace("-", "−");
}
const percent = (value) => (value === null ? "–" : (100 * value).toFixed(1));
function duration(seconds) {
  if (seconds >= 59.95) seconds = Math.round(seconds); // 119.7 s are 2 min
  const m = Math.floor(seconds / 60), hours = Math.floor(m / 60);
  return hours ? `${hours} h ${m % 60} min` : m ? `${m} min ${Math.round(seconds % 60)} s` : `${seconds.toFixed(1)} s`;
}

// ---- theme ------------------------------------------------------------------------------------------------------------------
const dark = matchMedia("(prefers-color-scheme: dark)");
function setTheme(name) {
  document.documentElement.dataset.theme = name;
  byId("theme").textContent = name === "dark" ? "☀" : "☾";
}
setTheme(dark.matches ? "dark" : "light");
dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
byId("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));

// ---- summary ----------------------------------------------------------------------------------------------------------------
const column = (name) => D.metrics[name] || null;
function summary() {
  byId("title").textContent = D.title;
  byId("subtitle").textContent = `${D.path} · ${D.state} · written ${D.written}`;
  const tile = (label, value, note) => h("div.tile", null, h("div.label", null, label), h("div.value", null, value), h("div.note", null, note || " "));
  const tiles = [tile("Steps", D.total ? `${D.step} of ${D.total}` : D.step, D.state)];
  const two = (label, name, show) => { const e = D.summary.ends[name]; if (e) tiles.push(tile(label, `${show(e[0])} → ${show(e[1])}`, "first 3 → last 5 steps")); };
  two("Reward", "rollout/rewards", format);
  two("Accuracy while training, %", "rollout/accuracy", percent);
  const { held, speed, seconds: [seconds, steps] } = D.summary;
  if (held) tiles.push(tile("Held-out accuracy, %", `${percent(held[0])} → ${percent(held[1])}`, "first → last validation"));
  two("Response length, tokens", "rollout/response_length", format);
  if (speed !== null) tiles.push(tile("Tokens a second", format(speed), "median step"));
  if (steps) tiles.push(tile("Time in steps", duration(seconds), `${duration(seconds / steps)} a step`));
  byId("summary").append(...tiles);
}

// ---- findings ---------------------------------------------------------------------------------------------------------------
function go(id) {
  const row = byId(id);
  if (!row) return;
  document.querySelectorAll("tr.hit").forEach((r) => r.classList.remove("hit"));
  row.classList.add("hit");
  row.scrollIntoView({ block: "center" });
  row.focus({ preventScroll: true });
}
function findings() {
  const body = byId("findings-body");
  if (!D.findings.length) {
    body.append(h("div.card.calm", null, h("h3", null, "The rules found nothing wrong"),
      h("p.muted", null, `Looked for: ${D.rules.join(", ")}. That is no proof of health: read a few samples too.`)));
  }
  for (const f of D.findings) {
    const look = [
      ...f.steps.map((step) => h("button", { type: "button", onclick: () => openStep(step) }, `samples of step ${step}`)),
      ...f.metrics.filter((m) => column(m)).map((m) => h("button", { type: "button", onclick: () => go("m-" + m) }, m)),
      ...f.keys.map((k) => h("button", { type: "button", onclick: () => { showAllSettings(); go("k-" + k); } }, k)),
    ];
    body.append(h("div.card", null, h("h3", null, f.title), h("ul", null, f.evidence.map((e) => h("li", null, e))),
      h("div.cols", null, h("div", null, h("h4", null, "Probable cause"), h("p", null, f.cause)),
        h("div", null, h("h4", null, "What to do"), h("ol", null, f.advice.map((a) => h("li", null, a))))),
      h("h4", null, "Where to look"), h("div.look", null, look)));
  }
}

// ---- curves -----------------------------------------------------------------------------------------------------------------
const W = 440, H = 190, L = 46, R = 10, T = 8, B = 20;
const charts = [];
let cursor = null;

function ticks(low, high, count) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((k) => k * power).find((k) => k >= raw);
  const found = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-6; v += step) found.push(Math.abs(v) < step / 1e6 ? 0 : v);
  return found;
}
function pathOf(xs, ys, x, y) { // missing values are bridged: a validation every 50 steps is still a curve
  let d = "";
  for (let i = 0; i < xs.length; i++) if (ys[i] !== null) d += `${d ? "L" : "M"}${x(xs[i]).toFixed(1)} ${y(ys[i]).toFixed(1)}`;
  return d;
}
function areaOf(xs, low, high, x, y) {
  const at = xs.map((_, i) => i).filter((i) => low[i] !== null && high[i] !== null);
  if (!at.length) return "";
  const point = (values) => (i) => `${x(xs[i]).toFixed(1)} ${y(values[i]).toFixed(1)}`;
  return "M" + at.map(point(high)).join("L") + "L" + at.slice().reverse().map(point(low)).join("L") + "Z";
}

class Chart {
  constructor(spec) {
    this.spec = spec;
    this.series = spec.series.map((x, k) => ({ color: `var(--c${k % 7})`, ...x, values: x.values || column(x.metric) })).filter((x) => x.values && x.values.some((v) => v !== null));
    if (!this.series.length) return;
    if (spec.stacked) this.stack();
    const all = this.series.flatMap((x) => known(x.top || x.values)).filter((v) => !spec.log || v > 0);
    this.logarithmic = spec.log && all.length > 0;
    const at = this.logarithmic ? Math.log10 : (v) => v;
    let low = Math.min(...all.map(at), spec.stacked || spec.zero ? 0 : Infinity), high = Math.max(...all.map(at));
    if (this.logarithmic) { low = Math.floor(low); high = Math.ceil(high); }
    if (high === low) { const room = Math.abs(high) / 2 || 1; high += room; if (!spec.zero) low -= room; }
    if (!this.logarithmic) { const t = ticks(low, high, 4), gap = t.length > 1 ? t[1] - t[0] : 0; if (gap) { high = gap * Math.ceil(high / gap - 1e-9); low = gap * Math.floor(low / gap + 1e-9); } }
    this.low = low; this.high = high;
    this.x = (step) => L + (W - L - R) * (D.steps.length < 2 ? .5 : (step - D.steps[0]) / (D.steps[D.steps.length - 1] - D.steps[0]));
    this.y = (v) => H - B - (H - T - B) * ((this.logarithmic ? Math.log10(Math.max(v, 10 ** low)) : v) - low) / (high - low);
    this.draw();
    charts.push(this);
  }
  stack() {
    let below = D.steps.map(() => 0);
    for (const x of this.series) { x.bottom = below; below = x.top = below.map((v, i) => v + (x.values[i] || 0)); }
  }
  draw() {
    const { spec } = this, marks = [];
    const values = this.logarithmic ? ticks(this.low, this.high, Math.min(5, this.high - this.low)).filter(Number.isInteger).map((e) => 10 ** e) : ticks(this.low, this.high, 4);
    for (const v of values) marks.push(s("line.grid", { x1: L, x2: W - R, y1: this.y(v), y2: this.y(v) }), s("text", { x: L - 6, y: this.y(v) + 3, "text-anchor": "end" }, format(v)));
    const steps = D.steps.length < 2 ? D.steps : ticks(D.steps[0], D.steps[D.steps.length - 1], 6).filter(Number.isInteger);
    for (const v of steps) marks.push(s("text", { x: this.x(v), y: H - 5, "text-anchor": "middle" }, v));
    const flags = [...new Set(D.findings.filter((f) => spec.series.some((x) => f.metrics.includes(x.metric))).flatMap((f) => f.steps))];
    for (const v of flags) marks.push(s("line.flag", { x1: this.x(v), x2: this.x(v), y1: T, y2: H - B }));
    if (spec.band) {
      const [a, b] = spec.band.map(column);
      if (a && b) marks.push(s("path", { d: areaOf(D.steps, a, b, this.x, this.y), fill: "var(--c0)", opacity: .16 }));
    }
    for (const x of this.series) {
      if (spec.stacked) marks.push(s("path", { d: areaOf(D.steps, x.bottom, x.top, this.x, this.y), fill: x.color, opacity: .8 }));
      else {
        marks.push(s("path.line", { d: pathOf(D.steps, x.values, this.x, this.y), stroke: x.color, "stroke-dasharray": x.dash, opacity: x.dash ? .7 : null }));
        if (!x.dash && known(x.values).length < 40) D.steps.forEach((step, i) => x.values[i] !== null && marks.push(s("circle", { cx: this.x(step), cy: this.y(x.values[i]), r: 1.8, fill: x.color })));
      }
    }
    this.line = s("line.cursor", { y1: T, y2: H - B, visibility: "hidden" });
    this.legend = h("div.legend");
    this.plot = h("div.plot", { tabindex: 0, role: "slider", "aria-label": this.describe(), "aria-valuemin": D.steps[0], "aria-valuemax": D.steps[D.steps.length - 1] },
      s("svg", { viewBox: `0 0 ${W} ${H}`, "aria-hidden": true, focusable: false }, marks, this.line));
    this.plot.addEventListener("pointermove", (e) => setCursor(this.nearest(e)));
    this.plot.addEventListener("pointerleave", () => setCursor(null));
    this.plot.addEventListener("click", (e) => openStep(D.steps[this.nearest(e)]));
    this.plot.addEventListener("keydown", (e) => this.key(e));
    this.figure = h("figure.chart" + (spec.wide ? ".wide" : ""), null, h("figcaption", null, spec.title, h("small", null, spec.unit || "")), this.plot, this.legend);
    this.read(null);
    byId("charts").append(this.figure);
  }
  describe() {
    const part = (x) => { const v = known(x.values); return `${x.name}: first ${format(v[0])}, last ${format(v[v.length - 1])}, lowest ${format(Math.min(...v))}, highest ${format(Math.max(...v))}`; };
    return `${this.spec.title}. ${this.series.map(part).join("; ")}`;
  }
  nearest(event) {
    const box = this.plot.getBoundingClientRect(), at = ((event.clientX - box.left) / box.width) * W;
    let best = 0;
    D.steps.forEach((step, i) => { if (Math.abs(this.x(step) - at) < Math.abs(this.x(D.steps[best]) - at)) best = i; });
    return best;
  }
  key(event) {
    const last = D.steps.length - 1, i = cursor === null ? last : cursor;
    const to = { ArrowLeft: i - 1, ArrowRight: i + 1, PageUp: i - 10, PageDown: i + 10, Home: 0, End: last }[event.key];
    if (to !== undefined) { event.preventDefault(); setCursor(Math.max(0, Math.min(last, to))); }
    if (event.key === "Enter") openStep(D.steps[i]);
    if (event.key === "Escape") setCursor(null);
  }
  read(i) {
    const value = (x) => (i === null ? known(x.values)[known(x.values).length - 1] : x.values[i]);
    this.legend.replaceChildren(...this.series.map((x) => h("span", null, h("i", { style: `background:${x.color}` }), x.name, " ", h("b", null, format(value(x))))),
      i === null ? "" : h("span", null, `step ${D.steps[i]}`));
    if (i !== null) { this.line.setAttribute("x1", this.x(D.steps[i])); this.line.setAttribute("x2", this.x(D.steps[i])); }
    this.line.setAttribute("visibility", i === null ? "hidden" : "visible");
    const at = i === null ? D.steps.length - 1 : i;
    this.plot.setAttribute("aria-valuenow", D.steps[at]);
    this.plot.setAttribute("aria-valuetext", `step ${D.steps[at]}: ${this.series.map((x) => `${x.name} ${format(x.values[at])}`).join(", ")}`);
  }
}
function setCursor(i) {
  cursor = i;
  charts.forEach((c) => c.read(i));
}
function curves() {
  const one = (metric, name) => ({ metric, name: name || metric.split("/")[1].replaceAll("_", " ") });
  const specs = [
    { title: "Reward", series: [one("rollout/rewards", "mean")] },
    { title: "Accuracy", zero: true, series: [one("rollout/accuracy", "training"), one("eval/accuracy", "held out")] },
    { title: "Response length", unit: "tokens; band: median to 95th percentile", zero: true, band: ["rollout/response_length_p50", "rollout/response_length_p95"],
      series: [one("rollout/response_length", "mean"), { ...one("rollout/response_length_max", "longest"), color: "var(--c5)", dash: "2 3" }, { ...one("rollout/response_length_p95", "p95"), color: "var(--c0)", dash: "4 3" }, { ...one("rollout/response_length_p50", "median"), color: "var(--c2)", dash: "1 3" }] },
    { title: "Entropy", unit: "nats a token", zero: true, series: [one("train/entropy_loss", "entropy")] },
    { title: "KL", unit: "per token", zero: true, series: [one("train/kl_loss", "to the reference"), one("train/approx_kl", "of the update")] },
    { title: "Clip fraction", zero: true, series: [one("train/clip_fraction", "clipped"), one("train/dual_clip_fraction", "dual clip")] },
    { title: "Log-probability gap, actor − engine", unit: "log scale", log: true, series: [one("train/rollout_logprob_gap_mean", "mean"), one("train/rollout_logprob_gap_max", "largest"), one("sync/probe_gap_max", "probe at sync")] },
    { title: "Ended and answered?", unit: "share of responses", zero: true, series: [one("rollout/truncated", "cut"), one("rollout/no_box", "no answer"), one("rollout/verdict_undecided", "undecided verdict")] },
    { title: "Groups without a signal", unit: "share of prompts", zero: true, series: [one("rollout/groups_all_right", "all right"), one("rollout/groups_all_wrong", "all wrong")] },
    { title: "Gradient norm", zero: true, series: [one("train/grad_norm", "before clipping")] },
    { title: "Skipped mini-batches", zero: true, series: [one("train/minibatches_skipped", "skipped")] },
    { title: "Learning rate", zero: true, series: [one("train/lr", "rate")] },
    { title: "Time of a step, by phase", unit: "seconds, stacked", stacked: true, wide: true, series: D.phases.map((p) => ({ metric: p.metric, name: p.name, values: p.values })) },
    { title: "Tokens a second", zero: true, series: [one("perf/tokens_per_second", "whole step"), one("perf/rollout_tokens_per_second", "rollout"), one("perf/train_tokens_per_second", "training")] },
    { title: "Memory, largest rank", unit: "GiB", zero: true, series: [one("perf/actor_memory_gib", "actor"), one("perf/critic_memory_gib", "critic"), one("perf/token_reward_memory_gib", "token reward"), one("perf/rollout_memory_gib", "rollout")] },
  ];
  specs.forEach((spec) => new Chart(spec));
}

// ---- samples ----------------------------------------------------------------------------------------------------------------
async function blob(id) {
  const node = byId(id);
  if (!node) return null;
  const bytes = Uint8Array.from(atob(node.textContent), (c) => c.charCodeAt(0));
  return JSON.parse(await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text());
}
const SIGN = { right: "✓", wrong: "✗", undecided: "?" };
let file = null;
let opened = 0, shown = 0; // of the last step and sample that were asked for: what an earlier one brings comes too late

function samples() {
  const select = byId("step");
  for (const f of D.files) select.append(h("option", { value: f.label }, `${f.validation ? "validation at step " : ""}${f.step} · ${f.samples} samples${f.texts ? ` · ${f.texts} with text` : ""}`));
  const move = (by) => { const i = select.selectedIndex + by; if (i >= 0 && i < D.files.length) { select.selectedIndex = i; openFile(D.files[i]); } };
  byId("previous").addEventListener("click", () => move(-1));
  byId("next").addEventListener("click", () => move(1));
  select.addEventListener("change", () => openFile(D.files[select.selectedIndex]));
  byId("show").addEventListener("change", () => file && listGroups());
  byId("left-out").append(h("h3", { style: "margin-top:1rem" }, "What this page leaves out"), h("ul", null, D.leftOut.map((line) => h("li", null, line))));
  const first = D.files.filter((f) => f.texts && !f.validation).pop() || D.files[D.files.length - 1];
  if (first) openFile(first); else byId("groups").append(h("p.group.muted", null, "The run has no sample files."));
}
function openStep(step) {
  const found = D.files.find((f) => f.step === step && !f.validation) || D.files.find((f) => f.step === step);
  if (!found) return;
  openFile(found);
  byId("samples").scrollIntoView();
}
async function openFile(f) {
  const mine = ++opened;
  byId("step").value = f.label;
  byId("step-note").textContent = f.path;
  const groups = await blob("h-" + f.label);
  if (mine !== opened) return;
  file = { ...f, groups };
  listGroups();
  const first = groups && groups.flatMap((g) => g.samples.map((x) => [g, x])).find(([, x]) => byId(textId(x)));
  if (first) await showSample(...first);
  else shown++, byId("sample").replaceChildren(h("p.muted", null, groups ? "Choose a sample." : `The samples of this step are not in this page; they are in ${f.path}.`));
}
const textId = (x) => `t-${file.label}-${x.line}`;
function listGroups() {
  const want = byId("show").value, list = byId("groups");
  const keep = {
    all: () => true, text: (g) => g.samples.some((x) => byId(textId(x))), undecided: (g) => g.samples.some((x) => x.status === "undecided"),
    mixed: (g) => new Set(g.samples.map((x) => x.status)).size > 1, wrong: (g) => g.samples.every((x) => x.status !== "right"),
  }[want];
  const groups = (file.groups || []).filter(keep);
  list.replaceChildren(...groups.map((g) => {
    const right = g.samples.filter((x) => x.status === "right").length;
    return h("div.group", null, h("div.prompt", null, h("div", null, g.prompt)),
      h("div.meta", null, `${g.task} · ${right} of ${g.samples.length} right · mean ${format(mean(g.samples.map((x) => x.length)))} tokens · solution ${g.solutions}`),
      h("div.chips", null, g.samples.map((x, k) => {
        const has = !!byId(textId(x));
        return h(`button.chip.${SIGN[x.status] ? x.status : "undecided"}${has ? ".full" : ""}`, { type: "button", id: "s-" + x.line, "aria-pressed": "false", onclick: () => showSample(g, x),
          "aria-label": `sample ${k}, ${x.status}, reward ${format(x.reward)}, ${x.length} tokens${has ? ", text in this page" : ""}`, title: `${x.id}\nreward ${format(x.reward)}, ${x.length} tokens` }, SIGN[x.status] || "?", " ", format(x.reward));
      })));
  }));
  if (!groups.length) list.append(h("div.group.muted", null, "No such prompt in this step."));
}
async function showSample(g, x) {
  const mine = ++shown;
  document.querySelectorAll(".chip[aria-pressed=true]").forEach((c) => c.setAttribute("aria-pressed", "false"));
  const chip = byId("s-" + x.line);
  if (chip) chip.setAttribute("aria-pressed", "true");
  const from = file.path, text = await blob(textId(x));
  if (mine !== shown) return;
  const fact = (name, value, kind) => h("div" + (kind || ""), null, h("dt", null, name), h("dd", null, value));
  const versions = x.oldest === x.newest ? String(x.newest) : `${x.oldest}–${x.newest}`;
  byId("sample").replaceChildren(
    h("h3", null, h(`span.badge.${SIGN[x.status] ? x.status : "undecided"}`, null, x.status), h("span.mono", null, x.id)),
    h("dl", null, fact("Reward", format(x.reward)), fact("Advantage", format(x.advantage)), fact("Tokens", x.length), fact("Ended by", x.finish), fact("Weight version", versions),
      fact("Mean ratio π/π_old", format(x.ratio)), fact("Largest log-prob gap", format(x.gap)), fact("File, line", `${from}:${x.line}`, ".long")),
    h("div.verdict", null, "Extracted ", h("code", null, x.extracted === null ? "nothing" : x.extracted), " · solution ", h("code", null, g.solutions), " · decided by ", h("code", null, x.route),
      text && text.reason ? [" · ", text.reason] : null,
      text && text.rewarded.length ? [" · of the reward: ", text.rewarded.map(([name, value]) => `${name} ${format(value)}`).join(", ")] : null),
    ...(text ? textParts(text) : [h("p.muted", null, `The text of this sample is not in this page: line ${x.line} of ${from}.`), h("details", null, h("summary", null, "Prompt, as far as it is here"), h("div.text", null, g.prompt))]));
}

// ---- tokens -----------------------------------------------------------------------------------------------------------------
function decode(codes) { // the inverse of rlinf.data.token_values.encode
  return Int8Array.from(atob(codes), (c) => (c.charCodeAt(0) << 24) >> 24);
}
const valueOf = (code) => (code === -128 ? null : code === 0 ? 0 : Math.sign(code) * 1e-6 * 10 ** (((Math.abs(code) - 1) * 7) / 126));
const COLOURS = {
  advantages: { name: "advantage", scale: "below 0 – above 0", strength: (v) => Math.min(1, Math.abs(v) / 2), show: format },
  log_ratios: { name: "ratio π/π_old", scale: "less likely – more likely", strength: (v) => Math.max(0, Math.min(1, Math.log10(Math.abs(v) / 1e-3) / 3)), show: (v) => format(v === null ? null : Math.exp(v)) },
  gaps: { name: "log-prob gap actor − engine", scale: "engine higher – actor higher", strength: (v) => Math.max(0, Math.min(1, Math.log10(Math.abs(v) / 1e-3) / 3)), show: format },
};
function textParts(text) {
  const parts = [];
  parts.push(h("details", null, h("summary", null, "Prompt"), h("div.text.mono", null, text.prompt)));
  if (!text.pieces) return [...parts, h("div.text", null, text.response)];
  const codes = Object.fromEntries(Object.keys(COLOURS).map((k) => [k, decode(text[k])]));
  const body = h("div.text"), readout = h("div", { id: "token" }, "Point at a token to read its values."), scale = h("span.scale");
  body.append(...text.pieces.map((piece, i) => { const span = h("span", null, piece); span.dataset.i = i; return span; }));
  const paint = (kind) => {
    [...body.children].forEach((span, i) => {
      const v = kind ? valueOf(codes[kind][i]) : 0;
      span.className = v === null ? "ignored" : "";
      const a = v ? COLOURS[kind].strength(v) * .75 : 0;
      span.style.background = a > .02 ? `rgba(var(${v > 0 ? "--plus" : "--minus"}), ${a.toFixed(2)})` : "";
    });
    scale.replaceChildren(...(kind ? [h("i"), COLOURS[kind].scale] : []));
  };
  body.addEventListener("pointerover", (e) => {
    const i = e.target.dataset.i;
    if (i === undefined) return;
    readout.textContent = `token ${i} ${JSON.stringify(text.pieces[i])}: ` + Object.entries(COLOURS).map(([k, c]) => `${c.name} ${c.show(valueOf(codes[k][i]))}`).join(" · ");
  });
  const start = codes.advantages.some((c) => c !== 0 && c !== -128) ? "advantages" : "gaps"; // a group of equal rewards has no advantage to show
  const choice = (kind, name, checked) => h("label", null, h("input", { type: "radio", name: "colour", checked, onchange: () => paint(kind) }), " ", name);
  const set = h("fieldset", null, h("legend", null, "Colour by"), Object.entries(COLOURS).map(([k, c]) => choice(k, c.name, k === start)), choice(null, "nothing", false), scale);
  paint(start);
  return [...parts, set, body, readout];
}

// ---- metrics, configuration, environment ------------------------------------------------------------------------------------
function spark(values) {
  const v = known(values), low = Math.min(...v), high = Math.max(...v);
  const x = (i) => (values.length < 2 ? 55 : (i * 110) / (values.length - 1)), y = (value) => (high > low ? 20 - (18 * (value - low)) / (high - low) : 11);
  return s("svg", { viewBox: "0 0 110 22", "aria-hidden": true }, s("path.line", { d: pathOf(values.map((_, i) => i), values, x, y), stroke: "var(--c0)", "stroke-width": 1.2 }));
}
function table(heads, rows) {
  return h("table", null, h("thead", null, h("tr", null, heads.map((t) => h("th", { scope: "col" }, t)))), h("tbody", null, rows));
}
function metricsTable() {
  const rows = Object.entries(D.metrics).map(([name, values]) => {
    const v = known(values), [meaning, healthy, action] = D.meanings[name] || ["", "", ""];
    return h("tr", { id: "m-" + name, tabindex: -1 }, h("th", { scope: "row" }, h("code", null, name)), h("td", null, v.length ? spark(values) : ""), h("td.n", null, format(v[0])), h("td.n", null, format(v[v.length - 1])),
      h("td", null, rich(meaning)), h("td", null, rich(healthy)), h("td", null, rich(action)));
  });
  byId("metrics-body").append(table(["Metric", "", "First", "Last", "What it is", "Healthy", "If not"], rows));
}
function showAllSettings() {
  byId("config-filter").value = "";
  byId("config-set").checked = false;
  filterSettings();
}
function filterSettings() {
  const word = byId("config-filter").value.toLowerCase(), set = byId("config-set").checked;
  for (const row of byId("config-body").querySelectorAll("tbody tr")) row.hidden = !row.textContent.toLowerCase().includes(word) || (set && row.dataset.origin === "default");
}
function settings() {
  const rows = D.settings.map(([key, value, origin, help]) => h("tr", { id: "k-" + key, tabindex: -1, "data-origin": origin }, h("th", { scope: "row" }, h("code", null, key)), h("td", { style: "overflow-wrap:anywhere" }, h("code", null, value)), h("td.muted", null, origin), h("td.muted", null, rich(help))));
  byId("config-body").append(table(["Key", "Value", "Set by", "What it is"], rows));
  byId("config-filter").addEventListener("input", filterSettings);
  byId("config-set").addEventListener("change", filterSettings);
}
function environment() {
  const text = (v) => (Array.isArray(v) ? v.join(" ") || "–" : v && typeof v === "object" ? Object.entries(v).map(([k, x]) => `${k} ${x}`).join(", ") : v === null || v === "" ? "–" : String(v));
  for (const start of D.environment) byId("environment-body").append(h("div.scroll", { style: "margin-bottom:1rem" }, h("table", null, h("tbody", null, Object.entries(start).map(([k, v]) => h("tr", null, h("th", { scope: "row" }, k.replaceAll("_", " ")), h("td.mono", { style: "overflow-wrap:anywhere" }, text(v))))))));
  if (!D.environment.length) byId("environment-body").append(h("p.muted", null, "The run has not recorded where it ran."));
}

for (const part of [summary, findings, curves, samples, metricsTable, settings, environment]) part();
document.documentElement.dataset.ready = Math.round(performance.now());
