"use strict";
// Everything shown is set as text, never as markup: names come from other people's files.
(() => {
  const root = document.documentElement;

  // ---------- what is chosen is remembered, for a reload and for a live page ----------
  const key = "dual-lora-report:" + location.pathname;
  const stored = (store, name, other) => { try { return store.getItem(name) ?? other; } catch { return other; } }; // private window
  const held = JSON.parse(stored(sessionStorage, key, "{}"));
  const recall = (name, other) => (name in held ? held[name] : other);
  function keep(name, value, store = sessionStorage) {
    held[name] = value;
    try { store.setItem(store === sessionStorage ? key : name, store === sessionStorage ? JSON.stringify(held) : value); } catch { /* the same */ }
  }

  function make(tag, attributes = {}, text = "") {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.textContent = text;
    return node;
  }

  // ---------- theme ----------
  const themes = { auto: "◐ auto", light: "☀ light", dark: "☾ dark" }, themeButton = document.getElementById("theme");
  function setTheme(name) {
    root.dataset.theme = name in themes ? name : "auto";
    themeButton.textContent = themes[root.dataset.theme];
    themeButton.setAttribute("aria-label", "Colours: " + root.dataset.theme + ". Press to change.");
  }
  setTheme(stored(localStorage, "dual-lora-theme", "auto"));
  themeButton.addEventListener("click", () => {
    const names = Object.keys(themes);
    setTheme(names[(names.indexOf(root.dataset.theme) + 1) % names.length]);
    keep("dual-lora-theme", root.dataset.theme, localStorage);
  });

  // ---------- tables: sort, filter, save ----------
  const raw = (cell) => cell.dataset.v ?? cell.textContent;
  function sort(table, column, falling) {
    const body = table.tBodies[0], heads = table.tHead.rows[0].cells;
    const number = heads[column].classList.contains("n");
    const order = new Map([...body.rows].map((row) => {
      const value = raw(row.cells[column]);
      return [row, number && value !== "" ? Number(value.replaceAll(",", "")) : number ? NaN : value];
    }));
    const compare = (a, b) => {
      if (!number) return (falling ? -1 : 1) * a.localeCompare(b, "en", { numeric: true });
      if (isNaN(a) || isNaN(b)) return isNaN(a) - isNaN(b); // what is not there goes last either way
      return a === b ? 0 : (falling ? b > a : a > b) ? 1 : -1;
    };
    body.append(...[...body.rows].sort((a, b) => compare(order.get(a), order.get(b))));
    for (const head of heads) head.removeAttribute("aria-sort");
    heads[column].setAttribute("aria-sort", falling ? "descending" : "ascending");
  }

  function save(table, kind, form) {
    const safe = (text) => form.rules.reduce((t, [pattern, other, before]) =>
      t.replace(new RegExp(pattern, "g"), (found) => (Object.hasOwn(other, found) ? other[found] : before + found)), text);
    const line = (cells) => form.line[0] + cells.join(form.line[1]) + form.line[2];
    const heads = [...table.tHead.rows[0].cells];
    const cell = (c) => (form.exact && c.classList.contains("n") ? raw(c) : safe(c.textContent));
    const parts = {
      HEAD: line(heads.map((head) => safe(head.textContent))),
      MARKS: heads.map((head) => form.marks[Number(head.classList.contains("n"))]).join(""),
      ROWS: [...table.tBodies[0].rows].filter((row) => !row.hidden).map((row) => line([...row.cells].map(cell))).join(""),
    };
    const text = form.layout.map((part) => parts[part] ?? part).join("");
    const link = make("a", { download: table.id + "." + kind });
    link.href = URL.createObjectURL(new Blob([text], { type: form.type + ";charset=utf-8" }));
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    window.lastExport = text;
  }

  function useTable(table, forms) {
    [...table.tHead.rows[0].cells].forEach((head, column, heads) => head.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const falling = now ? now === "ascending" : head.classList.contains("n");
      sort(table, column, falling);
      keep("sort " + table.id, [column, falling]);
    }));
    const [column, falling] = recall("sort " + table.id, [-1, false]);
    if (table.tHead.rows[0].cells[column]) sort(table, column, falling);
    const card = table.closest(".card"), filter = card.querySelector("input[type=search]"), rows = [...table.tBodies[0].rows];
    filter?.addEventListener("input", () => {
      for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(filter.value.toLowerCase());
      card.querySelector(".status").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
    });
    for (const button of card.querySelectorAll("[data-export]")) {
      button.addEventListener("click", () => save(table, button.dataset.export, forms[button.dataset.export]));
    }
  }

  // ---------- charts ----------
  const font = getComputedStyle(document.body).fontFamily;
  const axis = { labelColor: "var(--soft)", titleColor: "var(--ink)", gridColor: "var(--grid)", domainColor: "var(--soft)", tickColor: "var(--grid)",
    labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", titlePadding: 8, tickCount: 6, labelOverlap: "greedy" };
  const config = { background: null, font, view: { stroke: null }, aria: false, axis, scale: { bandPaddingInner: 0.06 },
    legend: { labelColor: "var(--soft)", titleColor: "var(--ink)", labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" } };

  class Plot {
    constructor(place, views) {
      Object.assign(this, { place, views, hidden: new Set(recall("hidden " + place.id, [])), width: 0 });
      this.chosen = Math.min(recall("view " + place.id, 0), views.length - 1);
      this.canvas = make("div", { "aria-hidden": "true" });
      this.ring = make("div", { class: "ring", hidden: "" });
      this.tip = make("div", { class: "tip", hidden: "" });
      this.said = make("div", { class: "visually-hidden", "aria-live": "polite" });
      this.legend = make("ul", { class: "legend" });
      place.append(this.canvas, this.ring, this.tip, this.said);
      place.after(this.legend);
      const figure = place.closest("figure"), select = figure.querySelector("select.view");
      if (select) select.value = String(this.chosen);
      select?.addEventListener("change", () => {
        this.chosen = Number(select.value);
        keep("view " + place.id, this.chosen);
        this.draw();
        this.fill();
      });
      this.values = figure.querySelector("details.values");
      this.values.addEventListener("toggle", () => this.fill());
      for (const name of ["pointermove", "pointerdown"]) place.addEventListener(name, (event) => this.hover(event));
      for (const name of ["pointerleave", "blur"]) place.addEventListener(name, () => this.point(-1));
      place.addEventListener("keydown", (event) => this.walk(event));
      new IntersectionObserver((seen) => seen.at(-1).isIntersecting && this.fit(), { rootMargin: "600px" }).observe(place);
      new ResizeObserver(() => this.width && this.fit()).observe(place);
    }

    get view() { return this.views[this.chosen]; }

    fit() { if (this.place.clientWidth && Math.abs(this.place.clientWidth - this.width) > 1) this.draw(); }

    draw() {
      this.width = this.place.clientWidth;
      const { spec, narrow, legend } = this.view;
      const shown = structuredClone(narrow && this.width < 560 ? narrow : spec);
      shown.data.values = shown.data.values.filter((row) => !this.hidden.has(row.series));
      const sized = { height: Math.max(200, Math.min(320, this.width * 0.45)), ...shown, width: this.width, autosize: { type: "fit-x", contains: "padding" } };
      this.drawn?.finalize();
      this.drawn = new vega.View(vega.parse(vegaLite.compile(sized, { config }).spec, null, { ast: true }),
        { renderer: "svg", container: this.canvas, expr: window.vegaInterpreter, hover: false }).run();
      this.spots = [...this.canvas.querySelectorAll(".spot_marks > *")];
      this.point(-1);
      this.legend.replaceChildren(...(legend ?? []).map((series) => this.button(series)));
    }

    button({ name, colour, sign }) {
      const item = make("li"), button = make("button", { type: "button", class: "button", "aria-pressed": String(!this.hidden.has(name)) });
      const mark = make("span", { "aria-hidden": "true" }, sign + " ");
      mark.style.color = colour;
      button.append(mark, name);
      button.addEventListener("click", () => {
        if (!this.hidden.delete(name)) this.hidden.add(name);
        keep("hidden " + this.place.id, [...this.hidden]);
        this.draw();
      });
      item.append(button);
      return item;
    }

    hover(event) {
      // The nearest point: along a line's steps first, by rows for intervals, the cell that is pointed at.
      const [a, b] = this.view.narrow ? [0.2, 3] : this.view.legend ? [1, 0.5] : [1, 1];
      const far = (spot) => { const box = spot.getBoundingClientRect(); return Math.hypot(a * (box.x + box.width / 2 - event.clientX), b * (box.y + box.height / 2 - event.clientY)); };
      const all = this.spots.map(far), least = Math.min(...all);
      this.point(least < 120 ? all.indexOf(least) : -1);
    }

    walk(event) {
      const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") this.point(-1);
      if (!move || !this.spots.length) return;
      event.preventDefault();
      this.point((Math.max(this.current, move < 0 ? 0 : -1) + move + this.spots.length) % this.spots.length);
      this.said.textContent = this.tip.textContent.replaceAll("\n", ", ");
    }

    point(at) {
      this.current = at;
      this.ring.hidden = this.tip.hidden = at < 0;
      if (at < 0) return;
      const spot = this.spots[at].getBoundingClientRect(), box = this.place.getBoundingClientRect(), x = spot.x - box.x, y = spot.y - box.y;
      const { head, rows } = this.view, row = rows[this.spots[at].__data__.datum.i];
      this.tip.textContent = head.map((name, i) => (["", "–"].includes(row[i]) ? "" : `${name}: ${row[i]}`)).filter(Boolean).join("\n");
      Object.assign(this.ring.style, { left: x - 3 + "px", top: y - 3 + "px", width: spot.width + 6 + "px", height: spot.height + 6 + "px" });
      const left = x + 14 + spot.width + this.tip.offsetWidth > box.width ? x - 10 - this.tip.offsetWidth : x + spot.width + 10;
      Object.assign(this.tip.style, { left: Math.max(0, left) + "px", top: Math.max(-20, y - this.tip.offsetHeight - 4) + "px" });
    }

    fill() {
      // The same values as a table: for screen readers, and for those who want the figures.
      if (!this.values.open) return;
      const line = (cells, kind) => { const row = make("tr"); row.append(...cells.map((cell) => make(kind, {}, cell))); return row; };
      const table = make("table"), head = make("thead"), body = make("tbody");
      head.append(line(this.view.head, "th"));
      body.append(...this.view.rows.map((row) => line(row, "td")));
      table.append(head, body);
      this.values.querySelector(".scroll").replaceChildren(table);
    }
  }

  // ---------- the bar: one menu at a time; a choice or Escape closes it ----------
  const menus = document.querySelectorAll("nav.bar details");
  const close = (but) => menus.forEach((menu) => { if (menu !== but) menu.open = false; });
  document.addEventListener("click", (event) => close(event.target.closest("nav.bar a") ? null : event.target.closest("nav.bar details")));
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") close(null); });

  // ---------- a link into a folded part unfolds it; what is open stays open ----------
  function unfold() {
    const fold = document.getElementById(decodeURIComponent(location.hash.slice(1)))?.querySelector(":scope > details.fold");
    if (fold) fold.open = true;
  }
  addEventListener("hashchange", unfold);
  for (const details of document.querySelectorAll("details[id]")) {
    details.open = recall("open " + details.id, details.open);
    details.addEventListener("toggle", () => keep("open " + details.id, details.open));
  }
  unfold();

  // ---------- library and data are unpacked; then the page is ready ----------
  async function unpacked(id) {
    const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }
  (async () => {
    const { charts, forms } = JSON.parse(await unpacked("data"));
    for (const table of document.querySelectorAll("table[id]")) useTable(table, forms);
    if (Object.keys(charts).length) document.head.append(make("script", {}, await unpacked("library")));
    const plots = [...document.querySelectorAll(".plot")].map((place) => new Plot(place, charts[place.id]));
    addEventListener("beforeprint", () => plots.forEach((plot) => plot.fit()));
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
