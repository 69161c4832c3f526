"use strict";

// Values on hover, touch and arrow keys: each axes of a figure is a grid of equal cells.
const value = document.getElementById("value");

for (const figure of document.querySelectorAll("figure")) {
  const grids = JSON.parse(figure.querySelector("script").textContent);
  const chart = figure.querySelector(".chart");
  const mark = document.createElement("div");
  mark.className = "mark";
  mark.hidden = true;
  chart.append(mark);
  let at = null; // grid, row, column

  function hide() {
    mark.hidden = value.hidden = true;
    at = null;
  }

  function show(grid, row, column) {
    at = [grid, row, column];
    const { box, rows, columns, values } = grids[grid];
    const height = box[3] / rows.length, width = box[2] / columns.length;
    mark.style.left = `${100 * (box[0] + column * width)}%`;
    mark.style.top = `${100 * (box[1] + row * height)}%`;
    mark.style.width = `${100 * width}%`;
    mark.style.height = `${100 * height}%`;
    // Isolated, so that a name in a script from right to left leaves the rest in its order.
    const names = [rows[row], columns[column]].filter(Boolean).map((name) => `\u2068${name}\u2069`);
    value.textContent = `${names.join(", ")}: ${values[row * columns.length + column]}`;
    mark.hidden = value.hidden = false;
    const cell = mark.getBoundingClientRect(), own = value.getBoundingClientRect();
    const right = document.documentElement.clientWidth - own.width - 4;
    value.style.left = `${Math.max(4, Math.min(cell.left, right))}px`;
    const above = cell.top - own.height - 4;
    value.style.top = `${above >= 4 ? above : cell.bottom + 4}px`;
  }

  function point(event) {
    const area = chart.getBoundingClientRect();
    const x = (event.clientX - area.left) / area.width, y = (event.clientY - area.top) / area.height;
    for (const [grid, { box, rows, columns }] of grids.entries()) {
      const column = Math.floor(((x - box[0]) / box[2]) * columns.length);
      const row = Math.floor(((y - box[1]) / box[3]) * rows.length);
      if (column >= 0 && column < columns.length && row >= 0 && row < rows.length)
        return show(grid, row, column);
    }
    hide();
  }

  function move(event) {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.key === "Escape") return hide();
    if (!(event.key in steps) || !grids.length) return;
    event.preventDefault();
    if (!at) return show(0, 0, 0);
    let [grid, row, column] = at;
    row += steps[event.key][0];
    column += steps[event.key][1];
    if (row < 0 && grid > 0) row = grids[--grid].rows.length - 1;
    else if (row >= grids[grid].rows.length && grid + 1 < grids.length) [grid, row] = [grid + 1, 0];
    const { rows, columns } = grids[grid];
    if (row in rows && column in columns) show(grid, row, column);
  }

  chart.addEventListener("pointermove", point);
  chart.addEventListener("pointerdown", point);
  // A finger leaves when it is lifted, which is when its value is read.
  chart.addEventListener("pointerleave", (event) => event.pointerType === "touch" || hide());
  chart.addEventListener("keydown", move);
  chart.addEventListener("blur", hide);
}

// Tables sort by a column; a second time, the other way round.
function sort(head, column) {
  const body = head.closest("table").tBodies[0];
  const descending = head.getAttribute("aria-sort") === "ascending";
  const text = (row) => row.cells[column].textContent.trim();
  const number = (row) =>
    text(row) ? Number(text(row).replace("∞", "Infinity").replaceAll("\u2212", "-")) : -Infinity;
  const numeric = head.classList.contains("number");
  const order = numeric
    ? (a, b) => (number(a) === number(b) ? 0 : number(a) - number(b))
    : (a, b) => text(a).localeCompare(text(b));
  const rows = [...body.rows].sort(descending ? (a, b) => order(b, a) : order);
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  body.append(...rows);
}

for (const head of document.querySelectorAll("thead th")) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...head.childNodes);
  button.addEventListener("click", () => sort(head, head.cellIndex));
  head.append(button);
}

// Light or dark, as the system is set until it is chosen here.
const theme = document.createElement("button");
const dark = matchMedia("(prefers-color-scheme: dark)");
theme.id = "theme";
theme.type = "button";
theme.textContent = "Light / dark";
theme.addEventListener("click", () => {
  const root = document.documentElement;
  const now = root.dataset.theme ?? (dark.matches ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
});
document.querySelector("header").append(theme);
