"use strict";
// Everything shown is set as text, never as markup: names come from other people's files.
(() => {
  const root = document.documentElement;

  // ---------- what is chosen is remembered, for a reload and for a live page; not in a private window ----------
  const key = "dual-lora-report:" + location.pathname;
  const read = (store, name) => { try { return JSON.parse(store().getItem(name)); } catch { return null; } };
  const write = (store, name, value) => { try { store().setItem(name, JSON.stringify(value)); } catch { /* as above */ } };
  const page = () => sessionStorage, site = () => localStorage, held = read(page, key) ?? {};
  const recall = (name, other) => (name in held ? held[name] : other);
  const keep = (name, value) => { held[name] = value; write(page, key, held); };

  function make(tag, attributes = {}, ...content) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...content);
    return node;
  }

  // ---------- theme ----------
  const themes = { auto: "◐ auto", light: "☀ light", dark: "☾ dark" }, order = Object.keys(themes);
  const themeButton = document.getElementById("theme");
  function setTheme(name) {
    root.dataset.theme = name in themes ? name : "auto";
    themeButton.textContent = themes[root.dataset.theme];
    themeButton.setAttribute("aria-label", "Colours: " + root.dataset.theme + ". Press to change.");
  }
  setTheme(read(site, "dual-lora-theme"));
  themeButton.addEventListener("click", () => {
    setTheme(order[(order.indexOf(root.dataset.theme) + 1) % order.length]);
    write(site, "dual-lora-theme", root.dataset.theme);
  });

  // ---------- tables: sort, filter, save ----------
  function sort(table, column, falling) {
    const body = table.tBodies[0], heads = table.tHead.rows[0].cells, way = falling ? -1 : 1;
    const number = heads[column].classList.contains("n");
    const value = (row) => {
      const text = row.cells[column].dataset.v ?? row.cells[column].textContent;
      return number ? parseFloat(text.replace("inf", "Infinity")) : text;
    };
    const compare = number
      ? (a, b) => isNaN(a) - isNaN(b) || way * Math.sign(a - b) // what is not there goes last either way
      : (a, b) => way * a.localeCompare(b, "en", { numeric: true });
    const rows = [...body.rows].map((row) => [value(row), row]).sort(([a], [b]) => compare(a, b));
    body.append(...rows.map(([, row]) => row));
    for (const head of heads) head.removeAttribute("aria-sort");
    heads[column].setAttribute("aria-sort", falling ? "descending" : "ascending");
  }

  const types = { csv: "text/csv", md: "text/markdown", tex: "text/x-tex" };
  function save(table, kind, text) {
    const link = make("a", { download: table.id + "." + kind });
    link.href = URL.createObjectURL(new Blob([text], { type: types[kind] + ";charset=utf-8" }));
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    window.lastExport = text;
  }

  function useTable(table, written) {
    const rows = [...table.tBodies[0].rows]; // in the order of their lines in what is saved
    [...table.tHead.rows[0].cells].forEach((head, column, heads) => head.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const falling = now ? now === "ascending" : head.classList.contains("n");
      sort(table, column, falling);
      keep("sort " + table.id, [column, falling]);
    }));
    const [column, falling] = recall("sort " + table.id, [-1, false]);
    if (table.tHead.rows[0].cells[column]) sort(table, column, falling);
    const card = table.closest(".card"), filter = card.querySelector("input[type=search]");
    filter?.addEventListener("input", () => {
      for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(filter.value.toLowerCase());
      card.querySelector(".status").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
    });
    for (const button of card.querySelectorAll("[data-export]")) {
      button.addEventListener("click", () => {
        const [before, lines, after] = written[button.dataset.export];
        const shown = [...table.tBodies[0].rows].filter((row) => !row.hidden).map((row) => lines[rows.indexOf(row)]);
        save(table, button.dataset.export, before + shown.join("") + after);
      });
    }
  }

  // ---------- charts ----------
  const font = getComputedStyle(document.body).fontFamily;
  const axis = { labelColor: "var(--soft)", titleColor: "var(--ink)", gridColor: "var(--grid)", domainColor: "var(--soft)",
    tickColor: "var(--grid)", labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", titlePadding: 8, tickCount: 6,
    labelOverlap: "greedy" };
  const names = { title: null, domain: false, ticks: false, labelColor: "var(--ink)" };
  const config = { background: null, font, view: { stroke: null }, aria: false, scale: { bandPaddingInner: 0.06 } };

  class Plot {
    constructor(place, views) {
      Object.assign(this, { place, views, hidden: new Set(recall("hidden " + place.id, [])), width: 0 });
      this.chosen = Math.min(recall("view " + place.id, 0), views.length - 1);
      const figure = place.closest("figure"), select = figure.querySelector("select.view");
      const parts = ["canvas", "ring", "tip", "said", "legend", "values"];
      for (const part of parts) this[part] = figure.querySelector("." + part);
      if (select) select.value = String(this.chosen);
      select?.addEventListener("change", () => {
        this.chosen = Number(select.value);
        keep("view " + place.id, this.chosen);
        this.draw();
        this.fill();
      });
      this.values.addEventListener("toggle", () => this.fill());
      for (const name of ["pointermove", "pointerdown"]) place.addEventListener(name, (event) => this.hover(event));
      for (const name of ["pointerleave", "blur"]) place.addEventListener(name, () => this.point(-1));
      place.addEventListener("keydown", (event) => this.walk(event));
      place.style.minHeight = this.height + 50 + "px"; // so that what a link leads to stays in its place
      new IntersectionObserver((seen) => seen.at(-1).isIntersecting && this.fit(), { rootMargin: "600px" }).observe(place);
      new ResizeObserver(() => this.width && this.fit()).observe(place);
    }

    get view() { return this.views[this.chosen]; }
    get stacked() { return this.view.form === "intervals" && this.place.clientWidth < 560; } // names above their rows
    get height() {
      const { height } = this.view.spec;
      return height ? height * (this.stacked ? 42 / 27 : 1) : Math.max(200, Math.min(320, this.place.clientWidth * 0.45));
    }
    get spots() { return [...this.canvas.querySelectorAll(".spot_marks > *")]; }

    fit() { if (this.place.clientWidth && Math.abs(this.place.clientWidth - this.width) > 1) this.draw(); }

    draw() {
      this.width = this.place.clientWidth;
      const values = this.view.spec.data.values.filter((row) => !this.hidden.has(row.series));
      const size = { height: this.height, width: this.width, autosize: { type: "fit-x", contains: "padding" } };
      const shown = { ...this.view.spec, ...size, data: { values } };
      const above = this.stacked && { labelAlign: "left", labelPadding: 0, labelOffset: -15 };
      const fitted = { ...config, axis: { ...axis, titleLimit: this.width - 70 }, axisYDiscrete: { ...names, ...above } };
      const runtime = vega.parse(vegaLite.compile(shown, { config: fitted }).spec, null, { ast: true });
      this.drawn?.finalize();
      this.drawn = new vega.View(runtime, { renderer: "svg", container: this.canvas, expr: window.vegaInterpreter }).run();
      this.point(-1);
      this.legend.replaceChildren(...(this.view.legend ?? []).map((series) => this.button(series)));
    }

    button({ name, colour, sign }) {
      const mark = make("span", { "aria-hidden": "true" }, sign + " "), pressed = String(!this.hidden.has(name));
      mark.style.color = colour;
      const button = make("button", { type: "button", class: "button", "aria-pressed": pressed }, mark, name);
      button.addEventListener("click", () => {
        if (!this.hidden.delete(name)) this.hidden.add(name);
        keep("hidden " + this.place.id, [...this.hidden]);
        this.draw();
      });
      return make("li", {}, button);
    }

    hover(event) {
      // The nearest point: along a line's steps first, by rows for intervals.
      const [a, b] = this.view.form === "intervals" ? [0.2, 3] : this.view.legend ? [1, 0.5] : [1, 1];
      const all = this.spots.map((spot) => {
        const box = spot.getBoundingClientRect();
        return Math.hypot(a * (box.x + box.width / 2 - event.clientX), b * (box.y + box.height / 2 - event.clientY));
      });
      const least = Math.min(...all);
      this.point(least < 120 ? all.indexOf(least) : -1);
    }

    walk(event) {
      const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key], count = this.spots.length;
      if (event.key === "Escape") this.point(-1);
      if (!move || !count) return;
      event.preventDefault();
      this.point((Math.max(this.current, move < 0 ? 0 : -1) + move + count) % count);
      this.said.textContent = this.tip.textContent.replaceAll("\n", ", ");
    }

    point(at) {
      this.current = at;
      this.ring.hidden = this.tip.hidden = at < 0;
      if (at < 0) return;
      const mark = this.spots[at], spot = mark.getBoundingClientRect(), box = this.place.getBoundingClientRect();
      const { head, rows } = this.view, row = rows[mark.__data__.datum.i], x = spot.x - box.x, y = spot.y - box.y;
      this.tip.textContent = head.map((name, i) => name + ": " + row[i]).filter((_, i) => !["", "–"].includes(row[i])).join("\n");
      const place = (node, left, top, more = {}) => Object.assign(node.style, { left: left + "px", top: top + "px", ...more });
      place(this.ring, x - 3, y - 3, { width: spot.width + 6 + "px", height: spot.height + 6 + "px" });
      const wide = this.tip.offsetWidth, left = x + 14 + spot.width + wide > box.width ? x - 10 - wide : x + spot.width + 10;
      place(this.tip, Math.max(0, left), Math.max(-20, y - this.tip.offsetHeight - 4));
    }

    fill() {
      // The same values as a table: for screen readers, and for those who want the figures.
      if (!this.values.open) return;
      const line = (cells, kind) => make("tr", {}, ...cells.map((cell) => make(kind, {}, cell)));
      const head = make("thead", {}, line(this.view.head, "th")), rows = this.view.rows.map((row) => line(row, "td"));
      this.values.querySelector(".scroll").replaceChildren(make("table", {}, head, make("tbody", {}, ...rows)));
    }
  }

  // ---------- the bar: one menu at a time; a choice or Escape closes it ----------
  const menus = document.querySelectorAll("nav.bar details");
  const close = (but) => menus.forEach((menu) => { if (menu !== but) menu.open = false; });
  document.addEventListener("click", (event) => close(event.target.closest("nav.bar a") ? null : event.target.closest("nav.bar details")));
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") close(null); });

  // ---------- a link into a folded part unfolds it; what is open stays open ----------
  function unfold() {
    const target = document.querySelector(":target"), fold = target?.querySelector(":scope > details.fold");
    if (fold) fold.open = true;
    target?.scrollIntoView();
  }
  addEventListener("hashchange", unfold);
  for (const details of document.querySelectorAll("details[id]")) {
    details.open = recall("open " + details.id, details.open);
    details.addEventListener("toggle", () => keep("open " + details.id, details.open));
  }

  // ---------- library and data are unpacked; then the page is ready ----------
  async function unpacked(id) {
    const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }
  (async () => {
    const { charts, tables } = JSON.parse(await unpacked("data"));
    for (const table of document.querySelectorAll("table[id]")) useTable(table, tables[table.id]);
    if (Object.keys(charts).length) document.head.append(make("script", {}, await unpacked("library")));
    const plots = [...document.querySelectorAll(".plot")].map((place) => new Plot(place, charts[place.id]));
    addEventListener("beforeprint", () => plots.forEach((plot) => plot.fit()));
    unfold();
    const live = Number(document.getElementById("data").dataset.live);
    if (live) {
      addEventListener("pagehide", () => keep("scroll", scrollY));
      history.scrollRestoration = "manual";
      scrollTo({ top: recall("scroll", 0), behavior: "instant" });
      setTimeout(() => location.reload(), live * 1000);
    }
    root.dataset.ready = "yes";
  })();
})();
