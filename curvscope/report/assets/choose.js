// Check boxes in the side bar switch a name everywhere: its rows in tables, its marks in figures.
{
  const boxes = [...document.querySelectorAll(".choices input[type=checkbox]")];
  const known = new Map(boxes.map((box) => [box.value, box]));
  const parts = [...document.querySelectorAll("[data-series]")].filter((part) => known.has(part.dataset.series));
  const apply = () => {
    for (const part of parts) part.classList.toggle("off", !known.get(part.dataset.series).checked);
    for (const table of document.querySelectorAll("table")) table.dispatchEvent(new Event("rows"));
    const left = boxes.filter((box) => box.checked).length;
    document.getElementById("chosen").textContent = `${left} of ${boxes.length}`;
  };
  for (const box of boxes) box.addEventListener("change", apply);
  for (const button of document.querySelectorAll("[data-choose]")) {
    button.addEventListener("click", () => {
      const kind = button.dataset.choose;
      for (const box of boxes) box.checked = kind === "all" || (kind === "default" && "default" in box.dataset);
      apply();
    });
  }
  if (boxes.length) {
    if (matchMedia("(min-width: 64rem)").matches) document.querySelector(".choices").open = true;
    addEventListener("pageshow", apply); // a browser that goes back remembers the boxes
    apply();
  }
}
