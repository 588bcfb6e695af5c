// Tables sort by their columns' titles (numbers by their exact value, the rest as text) and can be
// filtered: words that a row must hold, and conditions on columns such as "error < 0.5".
{
  const FEW = 6; // rows that need no filter

  const sortable = (table) => {
    const body = table.tBodies[0];
    const heads = [...table.querySelectorAll("thead th")];
    heads.forEach((head, column) => {
      const button = page.make("button", { type: "button" }, ...head.childNodes);
      head.append(button);
      head.setAttribute("aria-sort", "none");
      const numeric = head.classList.contains("num");
      const key = (row) => {
        const cell = row.cells[column];
        if (numeric) return cell?.dataset.sort === undefined ? NaN : Number(cell.dataset.sort);
        return cell?.dataset.sort ?? cell?.firstChild?.textContent ?? "";
      };
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        for (const other of heads) other.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const rows = [...body.rows].map((row) => [key(row), row]);
        rows.sort(([a], [b]) => {
          if (!numeric) return up ? a.localeCompare(b, "en", { numeric: true }) : b.localeCompare(a, "en", { numeric: true });
          if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
          return up ? a - b : b - a;
        });
        body.append(...rows.map(([, row]) => row));
      });
    });
  };

  // "error < 0.5" -> a test of a row, or null if no column is called so.
  const condition = (text, titles) => {
    const match = /^(.*?)\s*(<=|>=|<|>|=)\s*([-+.\deE]+)$/.exec(text);
    if (!match || Number.isNaN(Number(match[3]))) return null;
    const wanted = match[1].trim().toLowerCase();
    let column = titles.indexOf(wanted);
    if (column < 0) column = titles.findIndex((title) => wanted && title.startsWith(wanted));
    if (column < 0) return null;
    const bound = Number(match[3]);
    const holds = {
      "<": (x) => x < bound, ">": (x) => x > bound, "<=": (x) => x <= bound,
      ">=": (x) => x >= bound, "=": (x) => x === bound,
    }[match[2]];
    return (row) => {
      const value = row.cells[column]?.dataset.sort;
      return value !== undefined && holds(Number(value));
    };
  };

  const filterable = (table) => {
    const body = table.tBodies[0];
    if (body.rows.length <= FEW) return;
    const titles = [...table.querySelectorAll("thead th")].map((head) => head.textContent.trim().toLowerCase());
    const number = [...table.querySelectorAll("thead th")].find((head) => head.classList.contains("num"));
    const example = number ? `words, or ${number.textContent.trim()} < 0.5` : "words";
    const field = page.make("input", { type: "search", placeholder: `filter: ${example}`, "aria-label": `Filter the table: ${table.caption.textContent}` });
    const count = page.make("output", {});
    const apply = () => {
      const tests = field.value.split(/[,;]/).map((part) => part.trim()).filter(Boolean).map((part) =>
        condition(part, titles) ?? ((row) => part.toLowerCase().split(/\s+/).every((word) => row.textContent.toLowerCase().includes(word))));
      let left = 0;
      for (const row of body.rows) {
        const stays = tests.every((test) => test(row));
        row.classList.toggle("filtered", !stays);
        left += stays && !row.classList.contains("off");
      }
      const all = body.rows.length;
      count.textContent = left < all ? `${left} of ${all} rows` : "";
    };
    field.addEventListener("input", apply);
    table.addEventListener("rows", apply); // the check boxes have switched rows
    table.closest(".table").prepend(page.make("div", { class: "tools" }, field, count));
  };

  for (const table of document.querySelectorAll("table[data-sortable]")) {
    filterable(table);
    sortable(table);
  }
}
