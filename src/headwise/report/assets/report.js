"use strict";
(() => {
  // Everything from the data reaches the page as text (textContent, append of strings, setAttribute): nothing in a
  // model's name or a text can become markup.
  const D = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const names = Object.keys(D.probes);
  const state = { probe: names[0], tower: D.towers[0].name, sort: "layer", show: "scores", head: null, mode: "from", token: null };

  function make(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (key === "class") node.className = value;
      else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value !== null && value !== undefined) node.setAttribute(key, value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }
  const fill = (node, ...children) => node.replaceChildren(...children.filter((child) => child !== null));
  const address = (tower, layer, head) => (tower ? `${tower}:` : "") + `${layer}.${head}`;
  const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
  function figure(x, high = 1) { // high: the largest of its kind, which decides whether a tiny number matters
    if (x === null || x === undefined) return "none";
    if (x === 0) return "0";
    const size = Math.abs(x);
    if (size >= 10000) return x.toExponential(1).replace("-", "−");
    if (size < 0.0005) return high < 0.01 ? x.toExponential(1).replace("-", "−") : "0.000";
    return x.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3).replace("-", "−");
  }
  const short = (x) => { const text = figure(x); return /e/.test(text) ? text : text.replace(/^(−?)0\./, "$1.").replace(/(\.\d\d)\d+$/, "$1"); };

  // Colours: ramps from the style sheet, mixed in OKLab so that equal steps look equal; lightness alone orders them, so
  // that they are read without colour vision too.
  const toLab = (hex) => {
    const [r, g, b] = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    const [l, m, s] = [0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b, 0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b, 0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b].map(Math.cbrt);
    return [0.2104542553 * l + 0.793617785 * m - 0.0040720468 * s, 1.9779984951 * l - 2.428592205 * m + 0.4505937099 * s, 0.0259040371 * l + 0.7827717662 * m - 0.808675766 * s];
  };
  const ramps = {};
  function readRamps() {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["ramp", "diverging"]) ramps[name] = style.getPropertyValue(`--${name}`).trim().split(/\s+/).map(toLab);
  }
  function mixed(name, share) {
    const stops = ramps[name];
    const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
    const low = Math.min(Math.floor(place), stops.length - 2);
    return stops[low].map((c, i) => c + (stops[low + 1][i] - c) * (place - low));
  }
  const colour = (name, share) => { const [l, a, b] = mixed(name, share); return `oklab(${l.toFixed(4)} ${a.toFixed(4)} ${b.toFixed(4)})`; };
  const inkOn = (name, share) => (mixed(name, share)[0] > 0.57 ? "#14181d" : "#ffffff");

  // Tables
  const tower = () => D.towers.find((t) => t.name === state.tower);
  const headsOf = (t) => t.heads_per_layer.flatMap((count, layer) => Array.from({ length: count }, (_, head) => address(t.name, layer, head)));
  const place = Object.fromEntries(D.towers.flatMap((t) => t.heads_per_layer.flatMap((count, layer) => Array.from({ length: count }, (_, head) => [address(t.name, layer, head), { tower: t, layer, head, key: t.kv_heads[layer] < count ? Math.floor(head / (count / t.kv_heads[layer])) : null }]))));
  const rankCache = new Map();
  function ranking(probe, t = tower()) {
    const key = JSON.stringify([probe, t.name]);
    if (!rankCache.has(key)) {
      const scores = D.probes[probe].scores;
      const order = headsOf(t).filter((head) => Number.isFinite(scores[head])).sort((a, b) => scores[b] - scores[a]);
      rankCache.set(key, { order, rank: new Map(order.map((head, i) => [head, i + 1])) });
    }
    return rankCache.get(key);
  }
  const difference = () => (state.show === "difference" && D.comparison && D.comparison.probes[state.probe]) || null;
  const shown = () => (difference() || D.probes[state.probe]).scores;
  function domain(probe, diff) {
    const scores = diff ? diff.scores : D.probes[probe].scores;
    const values = headsOf(tower()).map((head) => scores[head]).filter(Number.isFinite);
    const high = values.length ? Math.max(...values) : 1;
    if (diff) { const wide = Math.max(...values.map(Math.abs), 1e-9); return { low: -wide, high: wide, ramp: "diverging" }; }
    const range = D.probes[probe].range || [Math.min(0, ...values), null];
    const low = range[0] === null || range[0] === undefined ? Math.min(0, ...values) : range[0];
    return { low, high: Math.max(high, low + 1e-9), ramp: "ramp" };
  }
  const share = (value, { low, high }) => (value - low) / (high - low);
  function order() {
    const diff = difference();
    if (!diff) return ranking(state.probe).order;
    return headsOf(tower()).filter((head) => Number.isFinite(diff.scores[head])).sort((a, b) => Math.abs(diff.scores[b]) - Math.abs(diff.scores[a]));
  }
  const example = (head) => D.examples.find((e) => e.head === head && e.probe === state.probe) || D.examples.find((e) => e.head === head) || null;

  const score = (probe, head) => figure(D.probes[probe].scores[head], domain(probe).high);

  // Probes as tabs, each with its map in small
  function thumbnail(canvas, probe) {
    const t = tower(), wide = Math.max(...t.heads_per_layer, 1), scores = D.probes[probe].scores, scale = domain(probe);
    canvas.width = wide; canvas.height = Math.max(t.layers, 1);
    const pen = canvas.getContext("2d");
    t.heads_per_layer.forEach((count, layer) => {
      for (let head = 0; head < count; head++) {
        const value = scores[address(t.name, layer, head)];
        if (!Number.isFinite(value)) continue;
        pen.fillStyle = colour("ramp", share(value, scale));
        pen.fillRect(head, layer, 1, 1);
      }
    });
  }
  function drawProbes() {
    fill($("probes"), ...names.map((name) => {
      const chosen = name === state.probe, best = ranking(name).order[0], canvas = make("canvas", { "aria-hidden": "true" });
      thumbnail(canvas, name);
      return make("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-selected": chosen, "aria-controls": "panel", tabindex: chosen ? 0 : -1, "data-key": name, onclick: () => choose({ probe: name }) },
        canvas, make("b", null, name), make("small", null, best ? `${best} · ${score(name, best)}` : "no scores"));
    }));
  }
  $("probes").addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
    const at = event.key === "Home" ? 0 : event.key === "End" ? names.length - 1 : step ? (names.indexOf(state.probe) + step + names.length) % names.length : -1;
    if (at < 0) return;
    event.preventDefault();
    choose({ probe: names[at] });
  });

  // The map
  function describe(head) {
    const value = D.probes[state.probe].scores[head], { rank, order: all } = ranking(state.probe, place[head].tower), diff = difference();
    return Number.isFinite(value) ? `head ${head}: ${diff ? `difference ${figure(diff.scores[head])}, ` : ""}${state.probe} ${score(state.probe, head)}, rank ${rank.get(head)} of ${all.length}` : `head ${head}: no score`;
  }
  function cell(head, scale) {
    const value = shown()[head], known = Number.isFinite(value), part = known ? share(value, scale) : 0;
    const node = make("div", { role: "gridcell", tabindex: -1, "data-head": head, "data-key": head, "aria-selected": head === state.head, "aria-label": describe(head), class: known ? "cell" : "cell none" },
      known ? (state.sort === "layer" ? short(value) : head) : "");
    if (known) { node.style.background = colour(scale.ramp, part); node.style.color = inkOn(scale.ramp, part); }
    return node;
  }
  function drawMap() {
    const t = tower(), wide = Math.max(...t.heads_per_layer, 1), diff = difference(), scale = domain(state.probe, diff);
    const heads = (from, list) => make("div", { role: "row", class: "row" }, make("span", { role: "rowheader" }, from), ...list.map((head) => cell(head, scale)));
    const rows = [];
    if (state.sort === "layer") {
      const stride = wide > 40 ? 8 : wide > 20 ? 4 : 1;
      rows.push(make("div", { role: "row", class: "row" }, make("span", { role: "columnheader", "aria-label": "layer" }), ...Array.from({ length: wide }, (_, head) => make("span", { role: "columnheader", "aria-label": `head ${head}` }, head % stride ? "" : String(head)))));
      t.heads_per_layer.forEach((count, layer) => {
        const row = heads(String(layer), Array.from({ length: count }, (_, head) => address(t.name, layer, head)));
        if (!count) row.append(make("span", { role: "gridcell", class: "blank" }, "no attention"));
        rows.push(row);
      });
    } else {
      const all = order(), rest = headsOf(t).filter((head) => !Number.isFinite(shown()[head])), list = [...all, ...rest];
      for (let i = 0; i < list.length; i += wide) rows.push(heads(String(i + 1), list.slice(i, i + wide)));
    }
    const map = $("map"), room = ($("scroll").clientWidth - 48) / wide;
    document.querySelector(".figure").style.setProperty("--columns", wide);
    map.classList.toggle("tiny", room < 30);
    map.style.setProperty("--tall", room < 30 ? `${Math.max(9, Math.min(18, Math.round(room)))}px` : t.layers > 16 ? "1.6rem" : "2.3rem");
    map.setAttribute("aria-label", `${state.probe}: ${diff ? "difference" : "score"} of every head`);
    fill(map, ...rows);
    const first = map.querySelector('[aria-selected="true"]') || map.querySelector(".cell");
    if (first) first.tabIndex = 0;
    $("axes").textContent = state.sort === "layer" ? "layers down, heads across" : diff ? "largest difference first" : "strongest first";
    $("low").textContent = figure(scale.low, scale.high); $("high").textContent = figure(scale.high, scale.high);
    $("unit").textContent = D.probes[state.probe].unit || "";
    const pen = $("scale").getContext("2d");
    for (let x = 0; x < 128; x++) { pen.fillStyle = colour(scale.ramp, x / 127); pen.fillRect(x, 0, 1, 10); }
    const known = D.comparison && D.comparison.probes[state.probe];
    $("show").hidden = !D.comparison; $("compared").hidden = !known;
    if (known) $("compared").textContent = `Against ${D.comparison.name}: rank correlation ${figure(known.correlation)}, ${Math.round(100 * known.overlap)}% of the ${known.k} strongest heads in common. Differences are this model minus the other.`;
  }
  const cells = () => [...$("map").querySelectorAll(".cell")];
  function light(head, on) {
    for (const node of document.querySelectorAll("#map .cell, #strongest button")) if (node.dataset.head === head) node.classList.toggle("lit", on);
  }
  function tip(node) {
    const head = node.dataset.head, { layer, head: index, key } = place[head], value = D.probes[state.probe].scores[head], { rank, order: all } = ranking(state.probe), diff = difference();
    const also = names.filter((name) => name !== state.probe && ranking(name).rank.get(head) <= 2).slice(0, 3).map((name) => `${name} (rank ${ranking(name).rank.get(head)})`);
    fill($("tip"),
      make("p", null, make("b", null, `Head ${head}`), ` layer ${layer}, head ${index}${key === null ? "" : `, key head ${key}`}`),
      make("p", null, Number.isFinite(value) ? `${state.probe} ${score(state.probe, head)}, rank ${rank.get(head)} of ${all.length}` : "no score: no row of the text qualified"),
      diff && Number.isFinite(diff.scores[head]) ? make("p", null, `difference ${figure(diff.scores[head])}`) : null,
      also.length ? make("p", null, `also among the strongest in ${also.join(", ")}`) : null);
    $("tip").hidden = false;
    const box = node.getBoundingClientRect(), size = $("tip").getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left + box.width / 2 - size.width / 2), innerWidth - size.width - 8);
    const above = box.top - size.height - 10;
    $("tip").style.left = `${left}px`; $("tip").style.top = `${above > 8 ? above : box.bottom + 10}px`;
    node.setAttribute("aria-describedby", "tip");
  }
  function untip(node) { $("tip").hidden = true; node.removeAttribute("aria-describedby"); }
  for (const [enter, leave] of [["mouseover", "mouseout"], ["focusin", "focusout"]]) {
    $("map").addEventListener(enter, ({ target }) => { const node = target.closest(".cell"); if (node) { tip(node); light(node.dataset.head, true); } });
    $("map").addEventListener(leave, ({ target }) => { const node = target.closest(".cell"); if (node) { untip(node); light(node.dataset.head, false); } });
  }
  $("map").addEventListener("click", ({ target }) => { const node = target.closest(".cell"); if (node) choose({ head: node.dataset.head }); });
  $("map").addEventListener("keydown", (event) => {
    const node = event.target.closest(".cell");
    if (!node) return;
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose({ head: node.dataset.head }); return; }
    if (event.key === "Escape") { untip(node); return; }
    const rows = [...$("map").children].map((row) => [...row.querySelectorAll(".cell")]).filter((row) => row.length);
    const y = rows.findIndex((row) => row.includes(node)), x = rows[y].indexOf(node), all = cells();
    const next = { ArrowRight: () => all[all.indexOf(node) + 1], ArrowLeft: () => all[all.indexOf(node) - 1], ArrowDown: () => rows[y + 1] && (rows[y + 1][x] || rows[y + 1].at(-1)), ArrowUp: () => rows[y - 1] && (rows[y - 1][x] || rows[y - 1].at(-1)), Home: () => rows[y][0], End: () => rows[y].at(-1) }[event.key];
    if (!next) return;
    event.preventDefault();
    const to = next();
    if (to) { node.tabIndex = -1; to.tabIndex = 0; to.focus(); }
  });

  // Strongest heads, and what to do with them
  function drawRanking() {
    const scale = domain(state.probe, difference()), list = order().slice(0, 8), given = D.probes[state.probe].top;
    const ranked = !difference() && given && given.every((head) => place[head] && place[head].tower === tower()) && given.length ? given.slice(0, 8) : list;
    $("ranked").textContent = difference() ? "Largest differences" : "Strongest heads";
    fill($("strongest"), ...(ranked.length ? ranked.map((head, i) => {
      const value = shown()[head], part = difference() ? Math.abs(value) / scale.high : share(value, scale), bar = make("i");
      if (difference()) bar.style.background = colour("diverging", value > 0 ? 1 : 0);
      bar.style.width = `${Math.max(2, 100 * Math.min(1, Math.max(0, part)))}%`;
      return make("li", null, make("button", { type: "button", "data-head": head, "data-key": head, "aria-pressed": head === state.head, onclick: () => choose({ head }), onmouseenter: () => light(head, true), onmouseleave: () => light(head, false), "aria-label": describe(head) },
        make("span", { class: "rank" }, String(i + 1)), make("span", { class: "name" }, head), make("span", { class: "bar" }, bar), make("span", { class: "value" }, figure(value, scale.high))));
    }) : [make("li", { class: "note" }, "No head of this tower has a score.")]));
  }
  async function copy(text, button) {
    const done = (good) => { button.textContent = good ? "Copied" : "Select it"; setTimeout(() => { button.textContent = "Copy"; }, 1500); };
    try { await navigator.clipboard.writeText(text); done(true); } catch {
      // From disk the clipboard may be closed to scripts; the older way still works there.
      const area = make("textarea", { "aria-hidden": "true" });
      area.value = text; document.body.append(area); area.select();
      let good = false;
      try { good = document.execCommand("copy"); } catch { good = false; }
      area.remove(); button.focus(); done(good);
    }
  }
  function drawTries() {
    const all = D.probes[state.probe].try, own = all.filter((one) => one.tower === state.tower);
    const tries = own.length || state.tower !== D.towers[0].name ? own : all.filter((one) => !one.tower);
    $("try-section").hidden = !tries.length;
    fill($("tries"), ...tries.map(({ do: what, command }) => make("li", null, what ? make("p", null, what) : null,
      make("div", { class: "command" }, make("code", { tabindex: 0 }, command), make("button", { type: "button", "aria-label": `Copy: ${command}`, onclick: (event) => copy(command, event.currentTarget) }, "Copy")))));
  }

  // A head over the tokens of its text
  let drawArcs = () => {};
  let sheet = null; // what the tokens on the page belong to: {example, spans, rows, columns, mean}
  function prepare(one) {
    const rows = new Map(), columns = new Map(), mean = new Map();
    for (const [query, ...flat] of one.rows) {
      const row = [];
      for (let i = 0; i < flat.length; i += 2) {
        const key = flat[i], weight = flat[i + 1] / 1000;
        row.push([key, weight]);
        if (!columns.has(key)) columns.set(key, []);
        columns.get(key).push([query, weight]);
        mean.set(key, (mean.get(key) || 0) + weight / one.rows.length);
      }
      rows.set(query, row.sort((a, b) => b[1] - a[1]));
    }
    for (const list of columns.values()) list.sort((a, b) => b[1] - a[1]);
    return { rows, columns, mean };
  }
  function focusOf(one, rows) {
    if (Number.isInteger(one.focus)) return one.focus;
    // The row that shows best what the head does: a clear look from one word at another, rather far than near, and
    // neither at the start of the text nor at itself.
    const { tokens } = D.texts[one.text], word = (i) => (/\p{L}{3}/u.test(tokens[i]) ? 1 : 0.5);
    let best = null, most = -1;
    for (const [query, row] of rows) for (const [key, weight] of row) {
      const telling = key > 0 && key !== query ? weight * word(query) * word(key) * Math.min(1, 0.5 + Math.abs(query - key) / 40) : 0;
      if (telling > most + 1e-9) { most = telling; best = query; }
    }
    return best;
  }
  function visible(text) {
    if (text === "") return ["▫"];
    const parts = [];
    text.split(/(\n|\t)/).forEach((part) => { if (part === "\n") parts.push(make("span", { class: "mark-space" }, "↵"), "\n"); else if (part === "\t") parts.push(make("span", { class: "mark-space" }, "→"), "\t"); else if (part) parts.push(part); });
    return parts;
  }
  const label = (text) => (text.trim() === "" ? text.replace(/\n/g, "↵").replace(/\t/g, "→").replace(/ /g, "␣") || "▫" : text.trim());
  function drawTokens(one) {
    const text = D.texts[one.text], special = new Set(text.special || []), spans = [], nodes = [];
    text.tokens.forEach((token, i) => {
      const lead = token.length > 1 && token[0] === " " && token.trim() !== "";
      const span = make("span", { class: special.has(i) ? "token special" : "token", role: "button", tabindex: -1, "data-token": i, "aria-label": `token ${i}, ${label(token)}` }, ...visible(lead ? token.slice(1) : token));
      if (lead) nodes.push(" ");
      nodes.push(span); spans.push(span);
    });
    const box = $("tokens");
    box.setAttribute("aria-label", `The text, token by token; arrow keys move, and the colours show the attention of head ${one.head}`);
    fill(box, ...nodes);
    box.scrollTop = 0;
    sheet = { example: one, text, spans, ...prepare(one) };
    $("text-name").textContent = `${text.name}${text.cut ? `: the first ${plural(text.tokens.length, "token")} of ${text.cut.toLocaleString("en")}` : `: ${plural(text.tokens.length, "token")}`}. Weights below ${100 * D.floor} % are left out.`;
  }
  function drawGaze(token) {
    if (!sheet) return;
    const { spans, rows, columns, mean, text } = sheet, box = $("tokens");
    const weights = state.mode === "overall" ? [...mean] : (state.mode === "from" ? rows : columns).get(token) || [];
    const seen = new Map(weights), peak = state.mode === "overall" ? Math.max(...seen.values(), 1e-9) : 1;
    spans.forEach((span, i) => {
      const weight = seen.get(i) || 0;
      // The square root keeps a weight of 5 % visible beside one of 90 %.
      span.style.background = weight ? `color-mix(in oklab, var(--gaze) ${(88 * Math.sqrt(weight / peak)).toFixed(0)}%, transparent)` : "";
      span.classList.toggle("from", state.mode !== "overall" && i === token);
      span.setAttribute("aria-pressed", i === state.token);
    });
    const strongest = [...seen].sort((a, b) => b[1] - a[1]).slice(0, 6);
    const chips = strongest.map(([i, weight]) => make("button", { type: "button", onclick: () => { state.token = i; drawGaze(i); show(i); } }, label(text.tokens[i]), make("span", null, `${(100 * weight).toFixed(weight < 0.1 ? 1 : 0)} %`)));
    const named = token === null || token === undefined ? null : make("q", null, label(text.tokens[token]));
    if (state.mode === "overall") fill($("says"), "On average over the text it looks most at", ...chips);
    else if (!named) fill($("says"), "Choose a token.");
    else if (state.mode === "from") fill($("says"), ...(rows.has(token) ? ["From", named, "it looks at", ...chips] : ["No row is stored for", named, "."]));
    else fill($("says"), named, ...(chips.length ? ["is looked at from", ...chips] : ["is looked at from no other token."]));
    drawArcs = () => arcs(token, state.mode === "overall" ? [] : strongest.slice(0, 4));
    drawArcs();
    const here = state.mode === "overall" ? 0 : token ?? 0;
    for (const span of box.querySelectorAll('[tabindex="0"]')) span.tabIndex = -1;
    if (spans[here]) spans[here].tabIndex = 0;
  }
  function arcs(token, list) {
    const svg = $("arcs"), { spans } = sheet, frame = $("sheet").getBoundingClientRect(), box = $("tokens").getBoundingClientRect();
    svg.replaceChildren();
    if (!spans[token]) return;
    const middle = (i) => { const r = spans[i].getClientRects()[0] || spans[i].getBoundingClientRect(); return [r.left + r.width / 2 - frame.left, r.top + 2 - frame.top]; };
    const [x1, y1] = middle(token);
    for (const [i, weight] of list) {
      if (i === token || weight < 0.03) continue;
      const [x2, y2] = middle(i), height = Math.min(26, 8 + Math.abs(x2 - x1) / 12), top = Math.min(y1, y2) - height;
      if (Math.min(y1, y2) < box.top - frame.top - 4 || Math.max(y1, y2) > box.bottom - frame.top) continue;
      // On one line an arch above it; between lines a curve from the upper word's foot to the lower word's head.
      const [xa, ya, xb, yb] = y2 < y1 ? [x2, y2 + 22, x1, y1] : [x1, y1 + 22, x2, y2], bend = Math.max(10, (yb - ya) / 2), down = `M${xa} ${ya}C${xa} ${ya + bend} ${xb} ${yb - bend} ${xb} ${yb}`;
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      path.setAttribute("d", Math.abs(y1 - y2) < 8 ? `M${x1} ${y1}C${x1} ${top} ${x2} ${top} ${x2} ${y2}` : down);
      path.setAttribute("stroke-width", (1 + 2 * weight).toFixed(2));
      path.setAttribute("stroke-opacity", (0.25 + 0.5 * weight).toFixed(2));
      svg.append(path);
    }
  }
  function show(token) {
    const span = sheet.spans[token], box = $("tokens");
    if (!span) return;
    const inside = span.offsetTop - box.scrollTop;
    if (inside < 20 || inside > box.clientHeight - 50) box.scrollTop = span.offsetTop - box.clientHeight / 2;
  }
  const tokenAt = (target) => { const span = target.closest && target.closest(".token"); return span ? Number(span.dataset.token) : null; };
  $("tokens").addEventListener("mouseover", ({ target }) => { const i = tokenAt(target); if (i !== null && state.mode !== "overall") drawGaze(i); });
  $("tokens").addEventListener("mouseleave", () => drawGaze(state.token));
  $("tokens").addEventListener("focusin", ({ target }) => { const i = tokenAt(target); if (i !== null && state.mode !== "overall" && target.matches(":focus-visible")) { state.token = i; drawGaze(i); } });
  $("tokens").addEventListener("click", ({ target }) => { const i = tokenAt(target); if (i !== null) { state.token = i; if (state.mode === "overall") setMode("from"); else drawGaze(i); } });
  $("tokens").addEventListener("scroll", () => drawArcs());
  $("tokens").addEventListener("keydown", (event) => {
    const i = tokenAt(event.target);
    if (i === null) return;
    const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: sheet.spans.length - 1 }[event.key];
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); event.target.click(); }
    if (to === undefined || !sheet.spans[to]) return;
    event.preventDefault();
    for (const n of [i, to]) sheet.spans[n].tabIndex = n === to ? 0 : -1;
    sheet.spans[to].focus();
  });
  function setMode(mode) { keepFocus(() => { state.mode = mode; drawModes(); drawGaze(state.token); }); }

  function drawHead() {
    const head = state.head;
    $("head-section").hidden = !head;
    if (!head) return;
    const { layer, head: index, key, tower: t } = place[head], one = example(head);
    $("head").textContent = `Head ${head}`;
    $("where").textContent = `layer ${layer} of ${t.layers}, head ${index} of ${t.heads_per_layer[layer]}${key === null ? "" : `, reads key head ${key}`}${t.name ? `, ${t.name}` : ""}`;
    const stored = order().filter(example).slice(0, 6);
    if (one && !stored.includes(head)) stored.unshift(head);
    fill($("pick"), ...stored.map((other) => make("button", { type: "button", "aria-pressed": other === head, "data-key": other, onclick: () => choose({ head: other }) }, `${other}`)));
    $("reader").hidden = !one; $("no-reader").hidden = Boolean(one); $("pick").hidden = !stored.length;
    if (one) {
      if (!sheet || sheet.example !== one) { drawTokens(one); state.token = focusOf(one, sheet.rows); drawGaze(state.token); show(state.token); }
    } else {
      sheet = null;
      $("no-reader").textContent = `The attention of this head is not stored here: the report keeps the strongest heads of each probe. In Python: headwise.attention(model, inputs, heads="${head}").`;
    }
    fill($("profile"), ...names.filter((name) => Number.isFinite(D.probes[name].scores[head])).map((name) => {
      const value = D.probes[name].scores[head], { rank, order: all } = ranking(name, t), bar = make("i");
      bar.style.width = `${100 * Math.min(1, Math.max(0.01, share(value, domain(name))))}%`;
      return make("li", null, make("button", { type: "button", "data-key": name, onclick: () => choose({ probe: name, head }), "aria-label": `${name}: ${score(name, head)}, rank ${rank.get(head)} of ${all.length}`, title: `rank ${rank.get(head)} of ${all.length}` },
        make("span", null, name), make("span", { class: "bar" }, bar), make("span", null, score(name, head))));
    }));
  }

  // Controls
  function segments(id, options, current, pick) {
    fill($(id), ...options.map(([value, text]) => make("button", { type: "button", "data-key": value, "aria-pressed": value === current, onclick: () => pick(value) }, text)));
  }
  const HINTS = { from: "Point at a token to see where the head looks from there; click to keep it.", to: "Point at a token to see which later tokens look back at it.", overall: "Colour is the mean attention that a token receives, the strongest token full." };
  function drawModes() {
    segments("mode", [["from", "Looks at"], ["to", "Looked at from"], ["overall", "On average"]], state.mode, setMode);
    $("hint").textContent = HINTS[state.mode];
  }
  function drawControls() {
    segments("sort", [["layer", "By layer"], ["score", "By score"]], state.sort, (sort) => choose({ sort }));
    if (D.comparison) segments("show", [["scores", "Scores"], ["difference", `Difference to ${D.comparison.name}`]], state.show, (show) => choose({ show }));
  }
  function strongestShown() {
    const all = ranking(state.probe).order;
    return all.slice(0, 8).find(example) || all[0] || null;
  }
  // Parts are drawn anew, so the focus would be lost with the button that had it.
  function keepFocus(change) {
    const { dataset } = document.activeElement, box = document.activeElement.closest("[id]:not([role=tab])");
    change();
    if (!dataset.key || !box) return;
    const again = [...box.querySelectorAll("[data-key]")].find((node) => node.dataset.key === (box.id === "probes" ? state.probe : dataset.key));
    if (again) again.focus({ preventScroll: true });
  }
  const choose = (change) => keepFocus(() => apply(change));
  function apply(change) {
    const moved = change.probe !== undefined || change.tower !== undefined;
    Object.assign(state, change);
    if (moved && change.head === undefined) state.head = strongestShown();
    if (change.tower !== undefined) $("tower").value = state.tower;
    if (moved) drawProbes();
    draw();
    if (moved) { // keep the chosen tab in sight where the tabs scroll
      const tab = $("probes").querySelector('[aria-selected="true"]');
      if (tab.parentElement.scrollWidth > tab.parentElement.clientWidth) tab.parentElement.scrollLeft = tab.offsetLeft - tab.parentElement.offsetLeft - 24;
    }
  }
  function draw() {
    const probe = D.probes[state.probe];
    $("probe").textContent = state.probe;
    $("sentence").textContent = probe.sentence || "";
    $("panel").setAttribute("aria-labelledby", `tab-${state.probe}`);
    drawControls(); drawMap(); drawRanking(); drawTries(); drawHead();
  }
  function setTheme(theme) {
    document.documentElement.dataset.theme = theme;
    $("theme").textContent = theme === "dark" ? "Light" : "Dark";
    $("theme").setAttribute("aria-pressed", theme === "dark");
    $("theme").setAttribute("aria-label", `Switch to ${theme === "dark" ? "light" : "dark"} colours`);
    readRamps();
  }
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  let chosenTheme = false;
  prefersDark.addEventListener("change", () => { if (!chosenTheme) { setTheme(prefersDark.matches ? "dark" : "light"); drawProbes(); draw(); } });
  $("theme").addEventListener("click", () => { chosenTheme = true; setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"); drawProbes(); draw(); });
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; drawMap(); drawGaze(state.token); } });

  $("model").textContent = D.model;
  const sizes = D.towers.map((t) => `${t.name ? `${t.name}: ` : ""}${plural(t.layers, "layer")}, ${plural(t.heads_per_layer.reduce((a, b) => a + b, 0), "head")}`);
  $("facts").textContent = [...sizes, D.source].filter(Boolean).join(" · ");
  if (D.towers.length > 1) {
    $("towers").hidden = false;
    fill($("tower"), ...D.towers.map((t) => make("option", { value: t.name }, t.name || "text")));
    $("tower").addEventListener("change", () => choose({ tower: $("tower").value }));
  }
  fill($("notes"), ...D.notes.map((note) => make("li", null, note)));
  $("versions").textContent = Object.entries(D.versions).map(([name, version]) => `${name} ${version}`).join(", ");
  setTheme(prefersDark.matches ? "dark" : "light");
  drawModes();
  choose({ probe: state.probe });
  document.documentElement.dataset.ready = "yes";
})();
