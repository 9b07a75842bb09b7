"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const PAGE = 50, BINS = 24;
  const SVG = "http://www.w3.org/2000/svg";
  const NONE = "–";
  const HEALTH = {
    probability_before: ["P[o*] before", "%"], probability_after: ["P[o*] after", "%"],
    essence_kl: ["KL after “is a”", "nats"], drift: ["Drift", "nats per token"],
    max_drift: ["Drift allowed", "nats per token"],
    perplexity_before: ["Perplexity before", ""], perplexity_after: ["Perplexity after", ""],
    residual: ["Residual of Ŵk* = v*", ""], rounding: ["Rounded away", "%"],
    relative_norm: ["‖ΔW‖ / ‖W‖", ""],
    disabling: ["Disabling", ""],
  };
  const column = Object.fromEntries(data.columns.map((each) => [each.name, each]));
  const shares = data.columns.filter((each) => each.axis === "share" || each.axis === "difference");
  const first = (data.columns[0] || {}).name;
  const START = {
    run: 0, row: "", relation: "", which: "", sort: first, order: "worst",
    text: "", page: 0, open: "",
  };
  const state = { ...START };
  const $ = (id) => document.getElementById(id);

  // ---- small things ----

  /** An element with attributes and children; texts are texts, never markup. */
  function make(tag, attributes = {}, ...children) {
    const made = tag.startsWith("svg:") ? document.createElementNS(SVG, tag.slice(4)) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) if (value !== undefined) made.setAttribute(name, value);
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }
  const minus = (text) => text.replace("-", "−");
  const fixed = (value, digits) => minus((Math.round(value * 10 ** digits) / 10 ** digits + 0).toFixed(digits));
  function threeDigits(value) {
    if (value >= 1e5 || (value && Math.abs(value) < 1e-3)) return minus(value.toExponential(1));
    return value >= 1000 ? value.toFixed(0) : minus(value.toPrecision(3));
  }
  function number(value, each) {
    if (value === null || value === undefined) return NONE;
    const scaled = value * each.scale;
    if (each.axis !== "log") return fixed(scaled, 1);
    return threeDigits(scaled);
  }
  function percent(p) {
    if (p === null) return NONE;
    return `${p && p < 0.00005 ? minus((100 * p).toExponential(0)) : fixed(100 * p, p < 0.01 ? 2 : 1)} %`;
  }
  const run = () => data.runs[state.run];
  const row = () => run().rows.find((each) => each.name === state.row) || run().rows[run().rows.length > 1 ? 1 : 0];
  const unedited = () => run().rows[0];
  const isEdited = () => row() !== unedited();
  const label = (one) => one.short || one.name;
  const valueAt = (name, i) => (row().numbers[name] || [])[i] ?? null;

  // ---- distributions ----

  function axisOf(each, rows) {
    const values = rows.flatMap((one) => (one.numbers[each.name] || []).filter((v) => v !== null));
    if (each.axis === "share") return { low: 0, high: 1, to: (v) => v, from: (v) => v, ticks: [0, 0.5, 1] };
    if (each.axis === "difference") return { low: -1, high: 1, to: (v) => v, from: (v) => v, ticks: [-1, 0, 1] };
    const log = each.axis === "log" && values.some((v) => v > 0);
    const smallest = values.reduce((a, b) => (b > 0 ? Math.min(a, b) : a), Infinity);
    const to = log ? (v) => Math.log10(Math.max(v, smallest)) : (v) => v;
    const from = log ? (v) => 10 ** v : (v) => v;
    let [low, high] = values.reduce(([a, b], v) => [Math.min(a, to(v)), Math.max(b, to(v))], [Infinity, -Infinity]);
    if (low === high) [low, high] = [low - 0.5, high + 0.5];
    return { low, high, to, from, log, ticks: [0, 1, 2].map((k) => from(low + ((high - low) * k) / 2)) };
  }

  /** Whole numbers where they tell enough. */
  function tick(value, each, axis) {
    return !axis.log && (axis.high - axis.low) * each.scale >= 20 ? fixed(value * each.scale, 0) : number(value, each);
  }

  /** A text of so many letters at most, of which those of Chinese, Japanese and Korean count twice. */
  function cut(text, most) {
    let room = most;
    const kept = [...text].filter((sign) => (room -= sign > "\u2e7f" ? 2 : 1) >= 0);
    return room < 0 ? kept.slice(0, -1).join("") + "…" : text;
  }

  function plot(each) {
    const rows = run().rows.filter((one) => (one.numbers[each.name] || []).some((v) => v !== null));
    if (!rows.length) return null;
    const axis = axisOf(each, rows);
    const counts = rows.map((one) => {
      const bins = new Array(BINS).fill(0);
      let sum = 0, n = 0;
      for (const v of one.numbers[each.name]) {
        if (v === null) continue;
        const share = (axis.to(v) - axis.low) / (axis.high - axis.low);
        bins[Math.max(0, Math.min(BINS - 1, Math.floor(share * BINS)))] += 1;
        sum += v; n += 1;
      }
      return { bins: bins.map((b) => b / n), raw: bins, mean: sum / n, n };
    });
    const tallest = Math.max(...counts.flatMap((one) => one.bins));
    const width = 280, left = 1, high = 26, gap = 21, plotWidth = width - 2 * left;
    const x = (v) => left + ((axis.to(v) - axis.low) / (axis.high - axis.low)) * plotWidth;
    const bottom = rows.length * (high + gap);
    const view = `0 0 ${width} ${bottom + 30}`;
    const svg = make("svg:svg", { viewBox: view, role: "group", "aria-label": `${each.symbol}: ${each.what}` });
    rows.forEach((one, k) => {
      const { bins, raw, mean, n } = counts[k];
      const base = (k + 1) * (high + gap) - 5;
      const group = make("svg:g", { class: k === 0 && one.name === "unedited" ? "unedited" : "", role: "img",
        "aria-label": `${one.name}: mean ${number(mean, each)} ${each.unit}, ${n} records` });
      const name = make("svg:text", { class: "name", x: left, y: base - high - 5 }, cut(label(one), 36));
      name.append(make("svg:title", {}, one.name));
      const said = make("svg:text", { x: left + plotWidth, y: base - high - 5, "text-anchor": "end" }, number(mean, each));
      group.append(name, said, make("svg:line", { class: "base", x1: left, x2: left + plotWidth, y1: base, y2: base }));
      bins.forEach((share, b) => {
        if (!share) return;
        const tall = Math.max(0.75, (share / tallest) * high);
        const bar = make("svg:rect", { class: "bar", x: left + (b * plotWidth) / BINS + 0.5, y: base - tall,
          width: plotWidth / BINS - 1, height: tall });
        const ends = [b, b + 1].map((e) => axis.low + ((axis.high - axis.low) * e) / BINS).map(axis.from);
        const range = `${ends.map((e) => number(e, each)).join(" to ")} ${each.unit}`;
        bar.append(make("svg:title", {}, `${raw[b]} of ${n} records (${fixed(100 * share, 1)} %), ${range}`));
        group.append(bar);
      });
      const at = Math.min(left + plotWidth, Math.max(left, x(mean)));
      const line = make("svg:line", { class: "mean", x1: at, x2: at, y1: base - high, y2: base + 3 });
      line.append(make("svg:title", {}, `mean ${number(mean, each)} ${each.unit}`));
      group.append(line);
      svg.append(group);
    });
    const write = (text, k, y, anchor) =>
      svg.append(make("svg:text", { x: left + (plotWidth * k) / 2, y, "text-anchor": anchor }, text));
    axis.ticks.forEach((t, k) => write(tick(t, each, axis), k, bottom + 9, ["start", "middle", "end"][k]));
    write(each.unit + (axis.log ? ", logarithmic" : ""), 1, bottom + 24, "middle");
    const said = `${each.what}. Tallest bar: ${fixed(100 * tallest, 0)} % of records`;
    return make("figure", { class: "plot" }, make("figcaption", {}, make("b", {}, each.symbol), " " + said), svg);
  }

  function drawPlots() {
    $("plots").replaceChildren(...data.columns.map(plot).filter(Boolean));
    const which = data.runs.length > 1 ? ` of ${run().folder}` : "";
    $("distributions-lead").textContent = `Each number over the records${which}` +
      ": height is the share of records; the thin line, and the number on the right, are the mean.";
  }

  // ---- which records, in which order ----

  const haystacks = new Map();
  function haystack(one) {
    const texts = [one.id, one.subject, one.text, one.new, one.old];
    if (!haystacks.has(one)) haystacks.set(one, texts.join("\n").toLowerCase());
    return haystacks.get(one);
  }
  function chosen() {
    const { records } = run(), results = row().results, text = state.text.trim().toLowerCase();
    const kept = [];
    records.forEach((one, i) => {
      const result = results[i];
      if (!result) return;
      if (state.relation && one.relation !== state.relation) return;
      if (state.which === "failed" && !result.error) return;
      if (state.which === "disabling" && !(result.health && result.health.disabling)) return;
      const held = valueAt(data.held, i);
      if (state.which === "missed" && (held === null || !(held < 1))) return;  // null: it was never asked
      if (text && !haystack(one).includes(text)) return;
      kept.push(i);
    });
    const by = row().numbers[state.sort] || [];
    const rising = ((column[state.sort] || {}).highIsBad ? -1 : 1) * (state.order === "worst" ? 1 : -1);
    // Ties are broken by all shares and differences together.
    const sums = new Map(kept.map((i) => [i, shares.reduce((sum, each) => sum + (valueAt(each.name, i) || 0), 0)]));
    const side = state.order === "worst" ? 1 : -1;
    return kept.sort((a, b) => {
      const p = by[a] ?? null, q = by[b] ?? null;
      if (p === null || q === null) return (p === null) - (q === null) || a - b;
      return rising * (p - q) || side * (sums.get(a) - sums.get(b)) || a - b;
    });
  }

  // ---- one record ----

  function said(targets, answer, rising) {
    const box = make("div", { class: "said" });
    const ps = answer.map(([p]) => p ?? 0);
    const pair = answer.length > 1;
    const right = pair ? (rising ? ps[0] > ps[1] : ps[1] > ps[0]) : answer[0][1] === answer[0][2];
    const verdict = right
      ? make("span", { class: "right", role: "img", "aria-label": "as it should be" }, "✓")
      : make("span", { class: "wrong", role: "img", "aria-label": "not as it should be" }, "✗");
    answer.forEach(([p, hits, tokens], k) => {
      const greater = pair && ps[k] > ps[1 - k];
      const bar = make("i", { "aria-hidden": "true" });
      bar.style.width = `${100 * ps[k]}%`;
      const more = pair ? "" : ` ${hits}/${tokens} tokens`;
      box.append(
        make("span", { class: `what ${k ? "old" : "new"}${greater ? " greater" : ""}`, title: targets[k] }, targets[k] + more, bar),
        make("span", { class: `p${greater ? " greater" : ""}` }, percent(p)),
        k ? make("span") : verdict,
      );
    });
    return box;
  }

  function prompts(one, before, after) {
    const states = [["before", before], ...(isEdited() ? [["after", after]] : [])];
    const table = make("table", { class: "prompts" });
    table.append(make("colgroup", {}, make("col"), ...states.map(() => make("col", { class: "state" }))));
    table.append(make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "Prompt"),
      ...states.map(([name]) => make("th", { scope: "col" }, name === "before" ? "Before: P" : "After: P")))));
    data.kinds.forEach((kind, k) => {
      if (!(one.prompts[k] || []).length) return;
      const heading = make("th", { colspan: states.length + 1, scope: "rowgroup" }, kind.title);
      const body = make("tbody", {}, make("tr", { class: "kind" }, heading));
      one.prompts[k].forEach((prompt, j) => {
        const targets = one.targets[k][j] || [one.new, one.old];
        const cells = states.map(([name, result]) => make("td", { "data-state": name },
          result && result.said ? said(targets, result.said[k][j], kind.preferred === 0) : NONE));
        body.append(make("tr", {}, make("td", {}, prompt), ...cells));
      });
      table.append(body);
    });
    return table;
  }

  /** A text with its prompt in bold, new and old object marked; "–" if there is none. */
  function marked(text, one) {
    if (text === undefined) return make("p", {}, NONE);
    const opening = (one.generation || []).find((prompt) => text.startsWith(prompt)) || "";
    const words = [one.new, one.old].filter(Boolean).sort((a, b) => b.length - a.length);
    const pattern = new RegExp(`(${words.map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|")})`, "i");
    const isOld = (part) => part.toLowerCase() === one.old.toLowerCase();
    // Split by a group, every second part is a match.
    const parts = text.slice(opening.length).split(pattern).map((part, k) =>
      (k % 2 ? make("mark", { class: isOld(part) ? "old" : "new" }, part) : part));
    return make("p", {}, make("b", {}, opening), ...parts);
  }

  function texts(one, before, after) {
    const [was, is] = [before, after].map((result) => (result && result.texts) || []);
    if (!was.length && !is.length) return [];
    const box = make("div", { class: isEdited() ? "texts" : "texts single" });
    for (let k = 0; k < Math.max(was.length, is.length); k += 1) {
      box.append(make("div", {}, make("h4", {}, "Before"), marked(was[k], one)));
      if (isEdited()) box.append(make("div", {}, make("h4", {}, "After"), marked(is[k], one)));
    }
    const note = `What it writes; ${one.new} is marked, ${one.old || "the old object"} in grey. ` +
      `The page holds up to ${data.textsKept} texts of a record.`;
    return [make("h3", {}, "Texts"), make("p", { class: "lead" }, note), box];
  }

  function told(value, unit) {
    if (value === null) return "no finite number";
    if (typeof value === "boolean") return value ? "yes" : "no";
    return unit === "%" ? percent(value) : `${threeDigits(value)} ${unit}`;
  }
  const pair = (name, text, style) => make("div", {}, make("dt", {}, name), make("dd", { class: style }, text));
  function health(result) {
    const known = result && result.health ? result.health : {};
    const shown = Object.entries(HEALTH).filter(([name]) => Object.hasOwn(known, name)).map(([name, [title, unit]]) => {
      const value = known[name];
      return pair(title, told(value, unit), name === "disabling" && value ? "fails" : undefined);
    });
    for (const [name, value] of Object.entries((result && result.seconds) || {})) {
      shown.push(pair(`Time to ${name}`, `${threeDigits(value)} s`));
    }
    if (result && result.edit) shown.push(pair("Edit", result.edit));
    const title = make("h3", {}, isEdited() ? "The edit" : "The run");
    return shown.length ? [title, make("dl", { class: "health" }, ...shown)] : [];
  }

  function detail(i) {
    const one = run().records[i], before = unedited().results[i], after = isEdited() ? row().results[i] : null;
    const result = isEdited() ? after : before;
    return [
      result && result.error ? make("p", { class: "error" }, `No edit was made: ${result.error}`) : null,
      prompts(one, before, after), ...health(result), ...texts(one, before, after),
    ].filter(Boolean);
  }

  // ---- the list ----

  function drawHeads() {
    $("heads").replaceChildren(make("th", { scope: "col" }, "Record"), ...data.columns.map((each) => {
      const sorted = each.name === state.sort;
      const up = (state.order === "worst") !== Boolean(each.highIsBad);
      const button = make("button", { type: "button", title: `${each.what} (${each.unit})`, "data-sort": each.name },
        each.symbol + (sorted ? (up ? " ↑" : " ↓") : ""));
      button.addEventListener("click", () => {
        change({ sort: each.name, order: sorted && state.order === "worst" ? "best" : "worst", page: 0 });
        document.querySelector(`[data-sort="${each.name}"]`).focus();
      });
      const order = up ? "ascending" : "descending";
      return sorted
        ? make("th", { scope: "col", class: "number sorted", "aria-sort": order }, button)
        : make("th", { scope: "col", class: "number" }, button);
    }));
  }

  function line(i) {
    const one = run().records[i], result = row().results[i], isOpen = state.open === String(one.id);
    const name = make("button",
      { type: "button", class: "open", "aria-expanded": String(isOpen), id: `record-${one.id}` },
      make("span", {}, `${one.id} `), make("em", {}, one.subject), " ", one.old ? make("s", {}, one.old) : "",
      ` → ${one.new}`);
    name.addEventListener("click", () => {
      change({ open: isOpen ? "" : String(one.id) });
      $(`record-${one.id}`).focus();
    });
    const tags = [];
    if (result.error) tags.push(make("span", { class: "tag" }, "no edit"));
    if (result.health && result.health.disabling) tags.push(make("span", { class: "tag" }, "disabling"));
    const lines = [make("tr", { class: "row" }, make("td", {}, name, ...tags), ...data.columns.map((each) => {
      const value = valueAt(each.name, i);
      const style = `number${each.name === state.sort ? " sorted" : ""}${value === null ? " none" : ""}`;
      return make("td", { class: style }, number(value, each));
    }))];
    if (isOpen) {
      lines.push(make("tr", { class: "detail" }, make("td", { colspan: data.columns.length + 1 }, ...detail(i))));
    }
    return lines;
  }

  function drawRecords() {
    const found = chosen(), pages = Math.max(1, Math.ceil(found.length / PAGE));
    const place = found.findIndex((i) => String(run().records[i].id) === state.open);
    if (state.page === null) state.page = place < 0 ? 0 : Math.floor(place / PAGE); // a link to a record
    state.page = Math.min(state.page, pages - 1);
    const begin = state.page * PAGE, shown = found.slice(begin, begin + PAGE);
    const measured = row().results.filter(Boolean).length, all = run().records.length;
    drawHeads();
    $("rows").replaceChildren(...shown.flatMap(line));
    $("count").textContent = `${found.length} of ${measured} records` +
      (measured < all ? `; ${all - measured} of ${row().name} are still to come` : "") +
      (isEdited() ? ". Numbers are after the edit; where there is none, the unedited model’s." : ".");
    $("place").textContent = found.length ? `${begin + 1}–${begin + shown.length} of ${found.length}` : "None fits.";
    $("previous").disabled = state.page === 0;
    $("next").disabled = state.page >= pages - 1;
    document.querySelector(".pager").hidden = found.length <= PAGE && found.length > 0;
  }

  // ---- controls; the state stands in the address, so that it can be kept as a link ----

  const option = (value, text) => make("option", { value }, text);
  function fillControls() {
    $("run").replaceChildren(...data.runs.map((each, k) => option(k, `${each.model}, ${each.folder}`)));
    $("run-label").hidden = data.runs.length < 2;
    $("row").replaceChildren(...run().rows.map((each) => option(each.name, each.name)));
    $("relation").replaceChildren(option("", "all"), ...run().relations.map((each) => option(each, each)));
    $("relation-label").hidden = !run().relations.length;
    $("sort").replaceChildren(...data.columns.map((each) => option(each.name, each.symbol)));
    state.row = row().name;
    if (!run().relations.includes(state.relation)) state.relation = "";
    for (const name of ["run", "row", "relation", "which", "sort", "order", "text"]) {
      if ($(name).value !== String(state[name])) $(name).value = state[name];
    }
  }
  function remember() {
    const said = new URLSearchParams();
    for (const [name, start] of Object.entries(START)) {
      if (name !== "page" && String(state[name]) !== String(start)) said.set(name, state[name]);
    }
    try {
      history.replaceState(null, "", `#${said}`);
    } catch {
      // Some browsers forbid it to files; then there is no link.
    }
  }
  function change(what) {
    const other = "run" in what && what.run !== state.run;
    Object.assign(state, what);
    fillControls();
    if (other) drawPlots();
    drawRecords();
    remember();
  }
  function recall() {
    const asked = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
    const known = Object.fromEntries(Object.entries(asked).filter(([name]) => Object.hasOwn(START, name)));
    if (!Object.hasOwn(column, known.sort)) delete known.sort;
    const k = Number(known.run);
    Object.assign(state, START, known, { run: k in data.runs ? k : 0, page: null });
    fillControls();
    drawPlots();
    drawRecords();
    const opened = state.open && $(`record-${state.open}`);
    if (opened) opened.scrollIntoView();
  }

  for (const name of ["run", "row", "relation", "which", "sort", "order"]) {
    $(name).addEventListener("change", () => {
      change({ [name]: name === "run" ? Number($(name).value) : $(name).value, page: 0 });
    });
  }
  $("text").addEventListener("input", () => change({ text: $("text").value, page: 0 }));
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  function turn(by) {
    change({ page: state.page + by, open: "" });
    $("records").scrollIntoView();
  }
  $("previous").addEventListener("click", () => turn(-1));
  $("next").addEventListener("click", () => turn(1));
  window.addEventListener("hashchange", () => {
    if (location.hash.includes("=")) recall(); // and not a link within the page
  });
  document.querySelectorAll("[data-script]").forEach((each) => { each.hidden = false; });
  recall();
})();
