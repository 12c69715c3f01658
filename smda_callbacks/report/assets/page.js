"use strict";
(() => {
  const { dark, figures, rankings } = JSON.parse(document.getElementById("figures").textContent);
  const root = document.documentElement;
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const config = { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
  let printing = false;
  let chosen = remembered();

  function remembered() {
    try { return localStorage.getItem("smda-theme"); } catch { return null; } // a page opened as a file may have none
  }

  function remember(theme) {
    try { localStorage.setItem("smda-theme", theme); } catch { /* then it is forgotten */ }
  }

  const theme = () => (printing ? "light" : chosen || (prefersDark.matches ? "dark" : "light"));

  // A figure's colours are those of the light theme; each has one twin for the dark one.
  function specification(key, width) {
    const twin = (_, value) => (theme() === "dark" && typeof value === "string" && Object.hasOwn(dark, value) ? dark[value] : value);
    const { data, layout } = JSON.parse(JSON.stringify(figures[key]), twin);
    layout.uirevision = key; // zoom and hidden lines survive a redraw
    if (printing) layout.width = 680;
    if (width < 640) {
      const room = 30 + 20 * data.filter((trace) => trace.showlegend !== false).length;
      layout.legend = { ...layout.legend, orientation: "v", x: 0, xanchor: "left", y: 0, yanchor: "bottom", yref: "container" };
      if (layout.showlegend !== false) {
        layout.margin = { ...layout.margin, b: room };
        layout.height += room;
      }
    }
    return [data, layout];
  }

  function draw(box) {
    const width = box.clientWidth;
    if (!width) return; // hidden: drawn when it is shown
    const [data, layout] = specification(box.dataset.figure, printing ? 680 : width);
    box.style.minHeight = `${layout.height}px`;
    box.dataset.drawn = box.dataset.figure;
    Plotly.react(box, data, layout, config);
  }

  const boxes = [...document.querySelectorAll(".figure")];
  function redraw(all) {
    root.dataset.theme = theme();
    for (const box of boxes) if (all || box.dataset.drawn) draw(box);
  }

  document.getElementById("theme").addEventListener("click", () => {
    chosen = theme() === "dark" ? "light" : "dark";
    remember(chosen);
    redraw(false);
  });
  prefersDark.addEventListener("change", () => redraw(false));
  addEventListener("beforeprint", () => { printing = true; redraw(true); });
  addEventListener("afterprint", () => { printing = false; redraw(true); });

  for (const chooser of document.querySelectorAll(".chooser")) {
    const box = chooser.querySelector(".figure");
    const choose = () => {
      const values = [...chooser.querySelectorAll("select")].map((select) => select.value);
      box.dataset.figure = [chooser.dataset.prefix, ...values].join("-");
      if (box.dataset.drawn) draw(box);
    };
    chooser.addEventListener("change", choose);
    choose(); // a browser may bring back an earlier choice
  }

  // Tables of pairs: every pair is a row already; here they are chosen, filled, ordered and searched.
  for (const box of document.querySelectorAll(".ranking")) {
    const select = box.querySelector("select");
    const search = box.querySelector("input");
    const body = box.querySelector("tbody");
    const heads = [...box.querySelectorAll("thead th")];
    const rows = new Map([...body.rows].map((row) => [row.dataset.row, row]));
    let shown = [...body.rows].filter((row) => !row.hidden);

    const find = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let found = 0;
      for (const row of shown) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        found += !row.hidden;
      }
      box.querySelector("[data-part=matches]").textContent = words.length ? `${found} of ${shown.length} listed` : "";
    };

    const choose = () => {
      const ranking = rankings[box.dataset.ranking][select.value];
      for (const row of rows.values()) row.hidden = true;
      shown = ranking.rows.map((key, rank) => {
        const row = rows.get(String(key));
        const texts = [rank + 1, ...ranking.cells.map((column) => column[rank])];
        row.querySelectorAll("[data-cell]").forEach((cell, place) => { cell.textContent = texts[place]; });
        row.classList.toggle("weak", Boolean(ranking.weak[rank]));
        return row;
      });
      body.append(...shown);
      for (const head of heads) head.removeAttribute("aria-sort");
      box.querySelector("th[data-changing] button").textContent = ranking.title;
      box.querySelector("[data-part=rest]").textContent = ranking.rest;
      find();
    };

    const amount = (text) => {
      const plain = text.replace("\u2212", "-").replace("e\u2212", "e-").replace(/[+,%\u00a0]/g, "").replace("∞", "Infinity");
      return /^-?(\d|Infinity)/.test(plain) ? Number.parseFloat(plain) : Number.NaN;
    };
    const order = (place, falling) => {
      const numeric = heads[place].classList.contains("number");
      const keyed = shown.map((row) => [numeric ? amount(row.cells[place].textContent) : row.cells[place].textContent, row]);
      const compare = (a, b) => {
        if (!numeric) return a.localeCompare(b, undefined, { numeric: true });
        if (Number.isNaN(a) || Number.isNaN(b)) return (Number.isNaN(a) - Number.isNaN(b)) * (falling ? -1 : 1); // last
        return a === b ? 0 : a - b;
      };
      keyed.sort(([a], [b]) => (falling ? compare(b, a) : compare(a, b)));
      shown = keyed.map(([, row]) => row);
      body.append(...shown);
    };

    heads.forEach((head, place) => head.querySelector("button").addEventListener("click", () => {
      const first = head.classList.contains("number") && place ? "descending" : "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const now = head.getAttribute("aria-sort") === first ? other : first;
      for (const each of heads) each.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", now);
      order(place, now === "descending");
    }));
    select.addEventListener("change", choose);
    search.addEventListener("input", find);
    choose(); // a browser may bring back an earlier choice
  }

  const behaviour = document.getElementById("chosen-behaviour");
  if (behaviour) {
    const show = () => {
      for (const part of document.querySelectorAll(".behaviour")) part.hidden = part.dataset.behaviour !== behaviour.value;
      for (const box of boxes) if (box.dataset.drawn) draw(box);
      drawNext();
    };
    behaviour.addEventListener("change", show);
    show(); // a browser may bring back an earlier choice
  }

  // One figure at a time, from the top, so that the page can be read and scrolled meanwhile.
  function drawNext() {
    const box = boxes.find((each) => !each.dataset.drawn && each.clientWidth);
    if (!box) return;
    setTimeout(drawNext); // before drawing: a figure that fails does not hold up the next
    draw(box);
  }

  root.dataset.theme = theme();
  drawNext();
})();
