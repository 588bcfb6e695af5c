"use strict";
// Tables sort by a click on a column's title: numbers by their exact value, the rest as text.
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const body = table.tBodies[0];
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of table.querySelectorAll("thead th")) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => {
        const cell = row.cells[column];
        if (head.classList.contains("num")) {
          return cell.dataset.sort === undefined ? NaN : Number(cell.dataset.sort);
        }
        return cell.dataset.sort ?? cell.textContent;
      };
      const rows = [...body.rows].map((row) => [key(row), row]);
      rows.sort(([a], [b]) => {
        if (typeof a === "number") {
          if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
          return up ? a - b : b - a;
        }
        return up ? a.localeCompare(b) : b.localeCompare(a);
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
}
// On a phone the contents start closed.
if (matchMedia("(max-width: 40rem)").matches) {
  document.querySelector("nav details")?.removeAttribute("open");
}
