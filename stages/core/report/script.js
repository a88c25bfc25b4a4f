"use strict";
// Everything here is a comfort: without it the whole page can be read.

// The weight table: sort by a header, search by words.
{
  const part = document.getElementById("weights");
  const body = part.querySelector("tbody");
  const rows = Array.from(body.rows);
  const heads = Array.from(part.querySelectorAll("thead th"));
  const collator = new Intl.Collator("en", { numeric: true });

  const key = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
  };
  const compare = (a, b) => (typeof a === "number" ? a - b : collator.compare(a, b));

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      // Sizes are asked for largest first, names from A.
      const first = rows.length && typeof key(rows[0], column) === "number" ? "descending" : "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const order = head.getAttribute("aria-sort") === first ? other : first;
      heads.forEach((each) => each.setAttribute("aria-sort", each === head ? order : "none"));
      const sign = order === "ascending" ? 1 : -1;
      rows.sort((a, b) => sign * compare(key(a, column), key(b, column)));
      body.append(...rows);
    });
  });

  const box = part.querySelector(".search");
  const input = box.querySelector("input");
  const count = box.querySelector("output");
  const search = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = words.length ? `${shown} of ${rows.length} rows` : `${rows.length} rows`;
  };
  input.addEventListener("input", search);
  box.hidden = false;
  search();
}

// The charts: read values off with the pointer, or with the arrow keys once a chart has the focus.
for (const plot of document.querySelectorAll(".chart .plot")) {
  const output = plot.closest("figure").querySelector("output");
  const [xLow, xHigh, yLow, yHigh] = ["xLow", "xHigh", "yLow", "yHigh"].map((name) => Number(plot.dataset[name]));
  const lines = new Map();
  for (const line of plot.querySelectorAll("polyline")) {
    const points = line.getAttribute("points").split(" ").map((point) => point.split(",").map(Number));
    lines.set(line.dataset.name, (lines.get(line.dataset.name) || []).concat(points));
  }
  // Every place where any line has a point; a chart over steps has them all in its first line.
  const stops = plot.dataset.doubling === undefined
    ? Array.from(lines.values())[0].map((point) => point[0])
    : Array.from(new Set(Array.from(lines.values()).flat().map((point) => point[0]))).sort((a, b) => a - b);
  const cursor = plot.querySelector("line").cloneNode();
  for (const [name, value] of [["class", "cursor"], ["y1", "0"], ["y2", "100%"]]) cursor.setAttribute(name, value);
  let place = -1;

  const nearest = (points, x) => points.reduce((best, p) => (Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best));
  const show = (index) => {
    place = Math.min(Math.max(index, 0), stops.length - 1);
    const x = stops[place];
    cursor.setAttribute("x1", `${x / 10}%`);
    cursor.setAttribute("x2", `${x / 10}%`);
    plot.append(cursor);
    const along = xLow + (x / 1000) * (xHigh - xLow);
    const number = Math.round(plot.dataset.doubling === undefined ? along : 2 ** along);
    const values = [];
    for (const [name, points] of lines) {
      const point = nearest(points, x);
      // Held-out measurements are far apart: one belongs only to its own step.
      if (Math.abs(point[0] - x) <= 2) {
        values.push(`${name} ${Number((yHigh - (point[1] / 1000) * (yHigh - yLow)).toPrecision(4))}`);
      }
    }
    const name = plot.dataset.xName;
    const where = name === "step" ? `step ${number.toLocaleString("en")}` : `${number.toLocaleString("en")} ${name}`;
    output.textContent = `${where}: ${values.join(", ")}`;
  };
  const hide = () => {
    cursor.remove();
    output.textContent = "";
    place = -1;
  };
  plot.addEventListener("pointermove", (event) => {
    const area = plot.getBoundingClientRect();
    const x = (1000 * (event.clientX - area.left)) / area.width;
    show(stops.reduce((best, stop, index) => (Math.abs(stop - x) < Math.abs(stops[best] - x) ? index : best), 0));
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.setAttribute("tabindex", "0");
  plot.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -Infinity, End: Infinity }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    show(place + move);
  });
}
