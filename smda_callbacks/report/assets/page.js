"use strict";
(() => {
  const { dark, figures } = JSON.parse(document.getElementById("figures").textContent);
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
    const value = (part) => chooser.querySelector(`select[data-part=${part}]`).value;
    const choose = () => {
      box.dataset.figure = `${chooser.dataset.prefix}-${value("category")}-${value("view")}`;
      if (box.dataset.drawn) draw(box);
    };
    chooser.addEventListener("change", choose);
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
