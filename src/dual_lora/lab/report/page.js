"use strict";
// Everything shown is set as text or as an SVG attribute, never as markup: names come from other people's files.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const memory = remember();

  // ---------- small things ----------
  function remember() {
    const key = "dual-lora-report:" + location.pathname;
    let held = {};
    try { held = JSON.parse(sessionStorage.getItem(key) || "{}"); } catch { /* private window */ }
    return {
      get: (name, other) => (name in held ? held[name] : other),
      set: (name, value) => {
        held[name] = value;
        try { sessionStorage.setItem(key, JSON.stringify(held)); } catch { /* the same */ }
      },
    };
  }

  function make(tag, attributes = {}, text) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    return node;
  }

  function shape(parent, tag, attributes = {}, text) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    parent.appendChild(node);
    return node;
  }

  function figure(value, axis = {}) {
    if (value === null || value === undefined) return "–";
    if (axis.percent) return plain(100 * value) + " %";
    if (axis.bytes) {
      for (const unit of ["B", "kB", "MB", "GB"]) {
        if (Math.abs(value) < 1000 || unit === "GB") return plain(value) + " " + unit;
        value /= 1000;
      }
    }
    return plain(value);
  }

  function tick(value, axis, ticks) {
    // As many digits as it takes to tell one tick from the next.
    const step = Math.abs(ticks[1] - ticks[0]) * (axis.percent ? 100 : 1);
    if (ticks.length < 2 || axis.bytes || axis.log || !(step > 0)) return figure(value, axis);
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9) + (String(step / 10 ** Math.floor(Math.log10(step))).startsWith("2.5") ? 1 : 0));
    if (digits > 7 || digits < 3) return figure(value, axis);
    return ((axis.percent ? 100 : 1) * value).toFixed(digits).replace("-", "−") + (axis.percent ? " %" : "");
  }

  function plain(value) {
    const size = Math.abs(value);
    let text;
    if (size >= 1e6 || (size > 0 && size < 1e-4)) text = value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
    else if (Number.isInteger(value)) text = value.toLocaleString("en-US");
    else text = String(Number(value.toPrecision(4)));
    return text.replace("-", "−");
  }

  // ---------- theme ----------
  const themes = ["auto", "light", "dark"];
  const themeButton = document.getElementById("theme");
  function setTheme(name) {
    if (name === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    themeButton.textContent = { auto: "◐ auto", light: "☀ light", dark: "☾ dark" }[name];
    themeButton.setAttribute("aria-label", "Colours: " + name + ". Press to change.");
    try { localStorage.setItem("dual-lora-theme", name); } catch { /* private window */ }
  }
  let theme = "auto";
  try { theme = localStorage.getItem("dual-lora-theme") || "auto"; } catch { /* the same */ }
  setTheme(themes.includes(theme) ? theme : "auto");
  themeButton.addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    setTheme(theme);
  });

  // ---------- tables: sort, filter, export ----------
  for (const table of document.querySelectorAll("table[id]")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const falling = head.getAttribute("aria-sort") === "ascending" || (!head.hasAttribute("aria-sort") && head.classList.contains("n"));
      sort(table, column, head.getAttribute("aria-sort") === "descending" ? false : falling);
      memory.set("sort " + table.id, [column, head.getAttribute("aria-sort") === "descending"]);
    }));
    const [column, falling] = memory.get("sort " + table.id, [-1, false]);
    if (heads[column]) sort(table, column, falling);
    const card = table.closest(".card");
    const filter = card.querySelector("input[type=search]");
    if (filter) filter.addEventListener("input", () => {
      const wanted = filter.value.toLowerCase();
      let shown = 0;
      for (const row of table.tBodies[0].rows) {
        row.hidden = !row.textContent.toLowerCase().includes(wanted);
        shown += row.hidden ? 0 : 1;
      }
      card.querySelector(".status").textContent = `${shown} of ${table.tBodies[0].rows.length} rows`;
    });
    for (const button of card.querySelectorAll("button[data-export]")) {
      button.addEventListener("click", () => download(table, button.dataset.export));
    }
  }

  function sort(table, column, falling) {
    const number = table.tHead.rows[0].cells[column].classList.contains("n");
    const body = table.tBodies[0];
    const keyed = [...body.rows].map((row, i) => [row.cells[column].dataset.v ?? row.cells[column].textContent, i, row]);
    keyed.sort(([a, i], [b, j]) => {
      if (number) {
        if (a === "" || b === "") return (a === "") - (b === "") || i - j; // what is not there goes last either way
        return (falling ? b - a : a - b) || i - j;
      }
      const order = a.localeCompare(b, "en", { numeric: true });
      return (falling ? -order : order) || i - j;
    });
    for (const [, , row] of keyed) body.appendChild(row);
    for (const head of table.tHead.rows[0].cells) head.removeAttribute("aria-sort");
    table.tHead.rows[0].cells[column].setAttribute("aria-sort", falling ? "descending" : "ascending");
  }

  function cells(table, raw) {
    const line = (row) => [...row.cells].map((cell) => {
      const value = raw && cell.dataset.v !== undefined ? cell.dataset.v : cell.textContent.trim();
      return [value, cell.classList.contains("n")];
    });
    return [line(table.tHead.rows[0]), ...[...table.tBodies[0].rows].filter((row) => !row.hidden).map(line)];
  }

  const writers = {
    // A text that a spreadsheet would take for a formula gets an apostrophe.
    csv: (rows) => rows.map((row) => row.map(([value, number]) => {
      const safe = !number && /^[=+\-@\t\r]/.test(value) ? "'" + value : value;
      return /[",\n\r]/.test(safe) ? '"' + safe.replaceAll('"', '""') + '"' : safe;
    }).join(",")).join("\r\n") + "\r\n",
    md: ([head, ...rows]) => {
      const cell = ([value]) => value.replaceAll("\\", "\\\\").replaceAll("|", "\\|").replaceAll("<", "&lt;").replaceAll("\n", " ");
      const line = (row) => "| " + row.map(cell).join(" | ") + " |\n";
      return line(head) + "|" + head.map(([, number]) => (number ? "---:|" : "---|")).join("") + "\n" + rows.map(line).join("");
    },
    tex: ([head, ...rows]) => {
      const signs = { "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "−": "$-$", "±": "$\\pm$", "×": "$\\times$", "Δ": "$\\Delta$", "‖": "$\\|$", "λ": "$\\lambda$", "₀": "$_0$", "⊙": "$\\odot$", "✓": "", "✗": "" };
      const cell = ([value]) => value.replace(/[\\~^−±×Δ‖λ₀⊙✓✗]|[&%$#_{}]/g, (c) => signs[c] ?? "\\" + c);
      const line = (row) => "  " + row.map(cell).join(" & ") + " \\\\\n";
      return "\\begin{tabular}{" + head.map(([, n]) => (n ? "r" : "l")).join("") + "}\n  \\toprule\n" + line(head) + "  \\midrule\n" + rows.map(line).join("") + "  \\bottomrule\n\\end{tabular}\n";
    },
  };

  function download(table, kind) {
    const text = writers[kind](cells(table, kind === "csv"));
    const type = { csv: "text/csv", md: "text/markdown", tex: "text/x-tex" }[kind];
    const link = make("a", { download: table.id + "." + kind });
    link.href = URL.createObjectURL(new Blob([text], { type: type + ";charset=utf-8" }));
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    window.lastExport = text;
  }

  // ---------- charts ----------
  const dashes = ["", "7 3", "2 3", "9 3 2 3"];
  const same = (name) => name.toLowerCase().replaceAll("_", "-");
  const namesOf = (chart) => [...new Set(chart.views.flatMap((v) => v.series.map((s) => same(s.name ?? ""))))];
  const charts = new Map(); // name -> the number of charts that it is in
  for (const chart of Object.values(data.charts)) for (const name of namesOf(chart)) charts.set(name, (charts.get(name) ?? 0) + 1);
  const usual = new Map([...charts].sort((a, b) => b[1] - a[1]).map(([name], i) => [name, i % 8]));
  function stylesOf(chart) {
    // The same name has the same colour in all charts where that is free: no two names of one chart look alike.
    const taken = new Set(), styles = new Map();
    for (const name of namesOf(chart).sort((a, b) => charts.get(b) - charts.get(a))) {
      let n = usual.get(name);
      while (taken.has(n)) n = n < 8 && taken.size < 8 ? (n + 1) % 8 : n + 8;
      taken.add(n);
      styles.set(name, { colour: `var(--s${n % 8})`, dash: dashes[Math.floor(n / 8) % 4], mark: styles.size % 5 });
    }
    return (name) => styles.get(same(name));
  }

  function mark(parent, kind, x, y, r, attributes) {
    const at = (points) => points.map(([a, b]) => `${x + a * r},${y + b * r}`).join(" ");
    if (kind === 0) return shape(parent, "circle", { cx: x, cy: y, r, ...attributes });
    if (kind === 1) return shape(parent, "rect", { x: x - r * 0.9, y: y - r * 0.9, width: r * 1.8, height: r * 1.8, ...attributes });
    const outlines = { 2: [[0, -1.25], [1.15, 0.85], [-1.15, 0.85]], 3: [[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]], 4: [[0, 1.25], [1.15, -0.85], [-1.15, -0.85]] };
    return shape(parent, "polygon", { points: at(outlines[kind]), ...attributes });
  }

  function scale(values, axis, from, to, zero) {
    values = values.filter((v) => v !== null && v !== undefined && Number.isFinite(v));
    let low = Math.min(...values), high = Math.max(...values);
    const log = axis.log && low > 0 && high / low >= 1.5;
    if (zero && !log) { low = Math.min(low, 0); high = Math.max(high, 0); }
    if (log) {
      const pad = Math.max((Math.log(high) - Math.log(low)) * 0.05, 0.02);
      const a = Math.log(low) - pad, b = Math.log(high) + pad;
      const at = (v) => from + ((Math.log(v) - a) / (b - a)) * (to - from);
      return { at, ticks: logTicks(Math.exp(a), Math.exp(b)), low: Math.exp(a), high: Math.exp(b), log };
    }
    const natural = low >= 0;
    const pad = (high - low) * 0.06 || Math.abs(high) * 0.1 || 0.5;
    low -= pad; high += pad;
    if (natural && low < 0) low = 0;
    const at = (v) => from + ((v - low) / (high - low)) * (to - from);
    return { at, ticks: evenTicks(low, high, Math.abs(to - from)), low, high, log };
  }

  function evenTicks(low, high, room) {
    const wanted = Math.max(2, Math.min(7, room / 70));
    const raw = (high - low) / wanted, ten = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * ten).find((s) => s >= raw);
    const ticks = [];
    for (let k = Math.ceil(low / step); k * step <= high + step * 1e-9; k++) ticks.push(Number((k * step).toPrecision(12)));
    return ticks;
  }

  function logTicks(low, high) {
    const decades = Math.log10(high / low);
    const steps = decades > 4 ? [1] : decades > 1.5 ? [1, 3] : [1, 2, 3, 5, 7];
    const ticks = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
      for (const s of steps) { const v = Number((s * 10 ** e).toPrecision(6)); if (v >= low && v <= high) ticks.push(v); }
    }
    return ticks.length > 1 ? ticks : evenTicks(low, high, 300);
  }

  const ruler = document.createElement("canvas").getContext("2d");
  function widthOf(text, size = 12) {
    ruler.font = `${size}px system-ui, sans-serif`;
    return ruler.measureText(text).width;
  }
  function shorten(text, room) {
    if (widthOf(text) <= room) return text;
    while (text.length > 2 && widthOf(text + "…") > room) text = text.slice(0, -1);
    return text + "…";
  }

  class Plot {
    constructor(place, chart) {
      this.place = place; this.chart = chart;
      this.styleOf = stylesOf(chart);
      this.hidden = new Set(memory.get("hidden " + place.id, []));
      this.view = Math.min(memory.get("view " + place.id, 0), chart.views.length - 1);
      this.svg = shape(place, "svg", { "aria-hidden": "true" });
      this.tip = make("div", { class: "tip", hidden: "" });
      this.said = make("div", { class: "visually-hidden", "aria-live": "polite" });
      this.legend = make("ul", { class: "legend" });
      place.append(this.tip, this.said);
      place.after(this.legend);
      const select = place.closest("figure").querySelector("select.view");
      if (select) {
        select.value = String(this.view);
        select.addEventListener("change", () => {
          this.view = Number(select.value);
          memory.set("view " + place.id, this.view);
          this.draw();
          this.fill();
        });
      }
      this.values = place.closest("figure").querySelector("details.values");
      this.values.addEventListener("toggle", () => this.fill());
      place.addEventListener("pointermove", (event) => this.hover(event));
      place.addEventListener("pointerdown", (event) => this.hover(event));
      place.addEventListener("pointerleave", () => this.point(null));
      place.addEventListener("keydown", (event) => this.keys(event));
      place.addEventListener("blur", () => this.point(null));
      this.draw();
      new ResizeObserver(() => {
        if (Math.abs(place.clientWidth - this.width) > 1) this.draw();
      }).observe(place);
    }

    get now() { return this.chart.views[this.view]; }
    get series() { return this.now.series.filter((s) => this.chart.kind === "intervals" || !this.hidden.has(s.name)); }

    draw() {
      this.width = this.place.clientWidth;
      if (!this.width) return;
      this.svg.replaceChildren();
      this.targets = [];
      this.current = -1;
      this.point(null);
      this[this.chart.kind === "dots" ? "lines" : this.chart.kind]();
      this.drawLegend();
    }

    size(height) {
      this.height = height;
      this.svg.setAttribute("viewBox", `0 0 ${this.width} ${height}`);
      this.svg.setAttribute("height", height);
    }

    frame(x, y, box) {
      const view = this.now;
      for (const t of y.ticks) {
        shape(this.svg, "line", { class: "grid", x1: box.left, x2: box.right, y1: y.at(t), y2: y.at(t) });
        shape(this.svg, "text", { x: box.left - 6, y: y.at(t) + 4, "text-anchor": "end" }, tick(t, view.y, y.ticks));
      }
      this.xAxis(x, box);
      shape(this.svg, "text", { x: 2, y: 13, class: "name" }, shorten(view.y.label, this.width - 8));
    }

    xAxis(x, box) {
      let free = -Infinity;
      for (const t of x.ticks) {
        const label = tick(t, this.now.x, x.ticks), room = widthOf(label) / 2;
        shape(this.svg, "line", { class: "grid", x1: x.at(t), x2: x.at(t), y1: box.top, y2: box.bottom });
        if (x.at(t) - room < free) continue;
        free = x.at(t) + room + 8;
        shape(this.svg, "text", { x: Math.min(x.at(t), this.width - room - 2), y: box.bottom + 17, "text-anchor": "middle" }, label);
      }
      shape(this.svg, "line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom });
      shape(this.svg, "text", { x: (box.left + box.right) / 2, y: box.bottom + 36, "text-anchor": "middle", class: "name" }, shorten(this.now.x.label, this.width - 8));
    }

    lines() {
      const view = this.now, joined = this.chart.kind === "lines";
      const all = this.series.flatMap((s) => s.points).filter((p) => p.x !== null && p.y !== null);
      this.size(Math.max(230, Math.min(360, this.width * 0.5)));
      if (!all.length) return this.nothing();
      const bottom = this.height - 44, top = 24;
      const y = scale(all.flatMap((p) => [p.y, p.low, p.high]), view.y, bottom, top, this.chart.zero);
      const left = Math.max(30, ...y.ticks.map((t) => widthOf(tick(t, view.y, y.ticks)))) + 12;
      const box = { left, right: this.width - 12, top, bottom };
      const x = scale(all.map((p) => p.x), view.x, box.left + 4, box.right - 4, false);
      this.frame(x, y, box);
      const direct = !joined && this.width >= 560 && this.series.every((s) => s.points.length === 1 && s.points[0].label);
      const front = all.filter((p) => p.front).sort((a, b) => a.x - b.x);
      if (front.length > 1) {
        shape(this.svg, "polyline", { points: front.map((p) => `${x.at(p.x)},${y.at(p.y)}`).join(" "), fill: "none", stroke: "var(--soft)", "stroke-dasharray": "5 4" });
      }
      for (const s of this.series) {
        const { colour, dash, mark: kind } = this.styleOf(s.name);
        const points = s.points.filter((p) => p.x !== null && p.y !== null);
        const banded = points.filter((p) => Number.isFinite(p.low) && Number.isFinite(p.high));
        if (joined && banded.length > 1) {
          const outline = [...banded.map((p) => [p.x, p.high]), ...banded.toReversed().map((p) => [p.x, p.low])];
          shape(this.svg, "polygon", { points: outline.map(([a, b]) => `${x.at(a)},${y.at(b)}`).join(" "), fill: colour, "fill-opacity": 0.13 });
        }
        if (joined) shape(this.svg, "polyline", { points: points.map((p) => `${x.at(p.x)},${y.at(p.y)}`).join(" "), fill: "none", stroke: colour, "stroke-width": 2, "stroke-dasharray": dash, "stroke-linejoin": "round" });
        const small = points.length > 40;
        for (const p of points) {
          mark(this.svg, kind, x.at(p.x), y.at(p.y), joined ? (small ? 1.6 : 3.2) : small ? 2.8 : 5, { fill: colour, stroke: "var(--card)", "stroke-width": small ? 0.4 : 1, "fill-opacity": joined ? 1 : 0.85 });
          const range = p.low !== undefined ? `\nlayers ${figure(p.low, view.y)} … ${figure(p.high, view.y)}` : "";
          const text = `${s.name}${p.label && p.label !== s.name ? "\n" + p.label : ""}\n${view.x.label}: ${figure(p.x, view.x)}\n${view.y.label}: ${figure(p.y, view.y)}${range}${p.note ? "\n" + p.note : ""}`;
          this.targets.push({ x: x.at(p.x), y: y.at(p.y), text, colour });
        }
      }
      if (direct) this.labels(x, y, box);
      this.direct = direct;
      this.targets.sort((a, b) => a.x - b.x || a.y - b.y);
    }

    labels(x, y, box) {
      const taken = [];
      for (const s of this.series) {
        const p = s.points[0], text = p.label, wide = widthOf(text);
        let px = x.at(p.x) + 9, py = y.at(p.y) + 4;
        if (px + wide > box.right) px = x.at(p.x) - 9 - wide;
        for (let turn = 1; turn < 9 && taken.some(([a, b, w]) => Math.abs(b - py) < 13 && px < a + w && a < px + wide); turn++) {
          py = y.at(p.y) + 4 + (turn % 2 ? 1 : -1) * Math.ceil(turn / 2) * 13;
        }
        taken.push([px, py, wide]);
        shape(this.svg, "text", { x: px, y: py, class: "name" }, text);
      }
    }

    intervals() {
      const view = this.now, points = view.series.flatMap((s) => s.points).filter((p) => p.x !== null);
      if (!points.length) { this.size(60); return this.nothing(); }
      const stacked = this.width < 560;
      const room = stacked ? 0 : Math.min(this.width * 0.38, Math.max(...points.map((p) => widthOf(p.label))) + 14);
      const step = stacked ? 42 : 27;
      this.size(points.length * step + 58);
      const box = { left: room + 8, right: this.width - 14, top: 6, bottom: points.length * step + 10 };
      const values = points.flatMap((p) => [p.x, p.low, p.high, ...(p.dots || [])]);
      if (this.chart.band) values.push(...this.chart.band);
      const x = scale(values, view.x, box.left, box.right, this.chart.zero);
      if (this.chart.band) {
        const [a, b] = this.chart.band;
        shape(this.svg, "rect", { class: "margin", x: x.at(a), width: x.at(b) - x.at(a), y: box.top, height: box.bottom - box.top });
      }
      this.xAxis(x, box);
      if (this.chart.zero) shape(this.svg, "line", { class: "zero", x1: x.at(0), x2: x.at(0), y1: box.top, y2: box.bottom });
      points.forEach((p, i) => {
        const cy = box.top + i * step + (stacked ? 29 : step / 2 + 1);
        const colour = p.mood ? `var(--${p.mood})` : "var(--accent)";
        shape(this.svg, "text", stacked ? { x: 2, y: cy - 13, class: "name" } : { x: room, y: cy + 4, "text-anchor": "end", class: "name" }, shorten(p.label, stacked ? this.width - 4 : room));
        if (p.low !== undefined && p.low !== null) {
          shape(this.svg, "line", { x1: x.at(p.low), x2: x.at(p.high), y1: cy, y2: cy, stroke: colour, "stroke-width": 2.5, "stroke-linecap": "round" });
        }
        for (const d of (p.dots || []).filter((d) => d !== null)) shape(this.svg, "circle", { cx: x.at(d), cy, r: 3, fill: "none", stroke: colour, "stroke-width": 1.3, opacity: 0.8 });
        mark(this.svg, p.mood === "good" ? 2 : p.mood === "bad" ? 4 : p.dots ? 3 : 0, x.at(p.x), cy, 5.5, { fill: colour, stroke: "var(--card)" });
        const range = p.low !== undefined && p.low !== null ? `\n${figure(p.low, view.x)} … ${figure(p.high, view.x)}` : "";
        const seeds = p.dots && p.dots.length ? "\nseeds: " + p.dots.map((d) => figure(d, view.x)).join(", ") : "";
        this.targets.push({ x: x.at(p.x), y: cy, text: `${p.label}\n${view.x.label}: ${figure(p.x, view.x)}${range}${seeds}${p.note ? "\n" + p.note : ""}`, wide: true });
      });
    }

    heat() {
      const view = this.now, [grid] = view.series;
      const values = grid.cells.flat().filter((v) => v !== null && v !== undefined);
      const low = Math.min(...values), high = Math.max(...values);
      const room = Math.min(this.width * 0.34, Math.max(...grid.rows.map((r) => widthOf(r))) + 12);
      const step = 24, left = room + 4, cell = (this.width - left - 4) / grid.columns.length;
      this.size(grid.rows.length * step + 74);
      if (!values.length) return this.nothing();
      grid.rows.forEach((name, i) => {
        shape(this.svg, "text", { x: room, y: i * step + 17, "text-anchor": "end", class: "name" }, shorten(name, room));
        grid.columns.forEach((column, j) => {
          const value = grid.cells[i][j];
          if (value === null || value === undefined) return;
          const strength = high > low ? (value - low) / (high - low) : 0.5;
          const at = { x: left + j * cell, y: i * step + 1, width: Math.max(cell - 1, 1), height: step - 2 };
          shape(this.svg, "rect", { ...at, rx: 2, fill: "var(--low)" });
          shape(this.svg, "rect", { ...at, rx: 2, fill: "var(--high)", "fill-opacity": strength });
          this.targets.push({ x: at.x + cell / 2, y: at.y + step / 2, text: `${name}, block ${column}\n${view.y.label}: ${figure(value, view.y)}`, box: at });
        });
      });
      const base = grid.rows.length * step;
      let free = -Infinity;
      grid.columns.forEach((column, j) => {
        const x = left + (j + 0.5) * cell;
        if (x - widthOf(column) / 2 < free) return;
        free = x + widthOf(column) / 2 + 6;
        shape(this.svg, "text", { x, y: base + 15, "text-anchor": "middle" }, column);
      });
      const wide = Math.min(160, this.width * 0.35), y = base + 46;
      for (let k = 0; k < 24; k++) {
        const at = { x: left + (k * wide) / 24, y, width: wide / 24 + 0.5, height: 10 };
        shape(this.svg, "rect", { ...at, fill: "var(--low)" });
        shape(this.svg, "rect", { ...at, fill: "var(--high)", "fill-opacity": k / 23 });
      }
      shape(this.svg, "text", { x: left, y: y - 6 }, figure(low, view.y));
      shape(this.svg, "text", { x: left + wide, y: y - 6, "text-anchor": "end" }, figure(high, view.y));
      shape(this.svg, "text", { x: left + wide + 12, y: y + 9, class: "name" }, shorten(view.y.label, this.width - left - wide - 14));
    }

    nothing() {
      shape(this.svg, "text", { x: this.width / 2, y: this.height / 2, "text-anchor": "middle" }, "Nothing chosen to show.");
    }

    drawLegend() {
      this.legend.replaceChildren();
      if (!["lines", "dots"].includes(this.chart.kind) || this.direct) return;
      for (const s of this.now.series) {
        const { colour, dash, mark: kind } = this.styleOf(s.name);
        const button = make("button", { type: "button", class: "button", "aria-pressed": String(!this.hidden.has(s.name)) });
        const sample = shape(button, "svg", { viewBox: "0 0 26 12", "aria-hidden": "true" });
        if (this.chart.kind === "lines") shape(sample, "line", { x1: 0, x2: 26, y1: 6, y2: 6, stroke: colour, "stroke-width": 2, "stroke-dasharray": dash });
        mark(sample, kind, 13, 6, 4, { fill: colour });
        button.append(make("span", {}, s.name));
        button.addEventListener("click", () => {
          if (!this.hidden.delete(s.name)) this.hidden.add(s.name);
          memory.set("hidden " + this.place.id, [...this.hidden]);
          this.draw();
        });
        const item = make("li");
        item.append(button);
        this.legend.append(item);
      }
    }

    hover(event) {
      const box = this.svg.getBoundingClientRect();
      const px = event.clientX - box.left, py = event.clientY - box.top;
      let best = null, least = Infinity;
      this.targets.forEach((t, i) => {
        let far = Math.hypot(t.x - px, t.y - py);
        if (t.box) far = px >= t.box.x && px <= t.box.x + t.box.width && py >= t.box.y && py <= t.box.y + t.box.height ? 0 : Infinity;
        if (t.wide) far = Math.abs(t.y - py) * 3;
        if (this.chart.kind === "lines") far = Math.hypot(t.x - px, 0.3 * (t.y - py)); // the nearest step, then the nearest line
        if (far < least) [least, best] = [far, i];
      });
      this.point(least <= (this.chart.kind === "lines" ? 150 : 45) ? best : null);
    }

    keys(event) {
      const moves = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
      if (event.key === "Escape") return this.point(null);
      if (!(event.key in moves) || !this.targets.length) return;
      event.preventDefault();
      const n = this.targets.length;
      this.point((this.current + moves[event.key] + n) % n);
      this.said.textContent = this.targets[this.current].text.replaceAll("\n", ", ");
    }

    point(index) {
      this.ring?.remove();
      if (index === null || index === undefined) { this.tip.hidden = true; return; }
      this.current = index;
      const t = this.targets[index];
      this.ring = t.box
        ? shape(this.svg, "rect", { ...t.box, fill: "none", stroke: "var(--ink)", "stroke-width": 2 })
        : shape(this.svg, "circle", { cx: t.x, cy: t.y, r: 8, fill: "none", stroke: "var(--ink)", "stroke-width": 1.5 });
      this.tip.textContent = t.text;
      this.tip.hidden = false;
      const wide = this.tip.offsetWidth, high = this.tip.offsetHeight;
      const left = t.x + 14 + wide > this.width ? t.x - 14 - wide : t.x + 14;
      this.tip.style.left = `${Math.max(0, Math.min(left, this.width - wide))}px`;
      this.tip.style.top = `${Math.max(-20, t.y - high - 8)}px`;
    }

    fill() {
      // The same values as a table: for screen readers, and for those who want the figures.
      if (!this.values.open) return;
      const view = this.now, table = make("table"), body = make("tbody");
      const line = (cells, kind) => {
        const row = make("tr");
        for (const cell of cells) row.append(make(kind, {}, cell));
        return row;
      };
      const head = make("thead");
      if (this.chart.kind === "heat") {
        const [grid] = view.series;
        head.append(line(["layer", ...grid.columns], "th"));
        grid.rows.forEach((name, i) => body.append(line([name, ...grid.cells[i].map((v) => figure(v, view.y))], "td")));
      } else if (this.chart.kind === "intervals") {
        head.append(line(["name", view.x.label, "from", "to", "note"], "th"));
        for (const p of view.series.flatMap((s) => s.points)) {
          body.append(line([p.label, figure(p.x, view.x), figure(p.low, view.x), figure(p.high, view.x), p.note || ""], "td"));
        }
      } else {
        head.append(line(["series", view.x.label, view.y.label, "from", "to", "note"], "th"));
        for (const s of view.series) {
          for (const p of s.points) body.append(line([s.name, figure(p.x, view.x), figure(p.y, view.y), figure(p.low, view.y), figure(p.high, view.y), [p.label === s.name ? "" : p.label, p.note].filter(Boolean).join(", ")], "td"));
        }
      }
      table.append(head, body);
      this.values.querySelector(".scroll").replaceChildren(table);
    }
  }

  for (const place of document.querySelectorAll(".plot")) new Plot(place, data.charts[place.id]);

  // ---------- one menu of the bar at a time; a choice or Escape closes it ----------
  const menus = document.querySelectorAll("nav.bar details");
  const close = (but) => menus.forEach((menu) => { if (menu !== but) menu.open = false; });
  document.addEventListener("click", (event) => {
    close(event.target.closest("nav.bar a") ? null : event.target.closest("nav.bar details"));
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") close(null); });

  // ---------- a link into a folded part unfolds it ----------
  function unfold() {
    const fold = document.getElementById(decodeURIComponent(location.hash.slice(1)))?.querySelector(":scope > details.fold");
    if (fold) fold.open = true;
  }
  addEventListener("hashchange", unfold);

  // ---------- what is open stays open when a live page loads anew ----------
  for (const details of document.querySelectorAll("details[id]")) {
    details.open = memory.get("open " + details.id, details.open);
    details.addEventListener("toggle", () => memory.set("open " + details.id, details.open));
  }
  unfold();
  if (data.live) {
    addEventListener("pagehide", () => memory.set("scroll", scrollY));
    history.scrollRestoration = "manual";
    scrollTo({ top: memory.get("scroll", 0), behavior: "instant" });
    setTimeout(() => location.reload(), data.live * 1000);
  }
  document.documentElement.dataset.ready = "yes";
})();
