// One step of a training: the slider turns the table to it and marks it in figures over steps.
{
  const source = document.getElementById("steps-data");
  if (source) {
    const { steps, rows, values } = JSON.parse(source.textContent);
    const slider = document.getElementById("step");
    const table = document.querySelector("#steps table");
    const output = document.getElementById("step-output");
    const shown = []; // axes of the figures that have come near the screen

    const line = (axes) => {
      axes.element.querySelector(".at-step")?.remove();
      const [x0, y0, x1, y1] = axes.box, x = axes.place(0, steps[Number(slider.value)]);
      if (axes.names[0] !== "step" || x < x0 || x > x1) return;
      axes.element.append(page.make("line", { class: "at-step", x1: x, x2: x, y1: y0, y2: y1 }));
    };

    const show = () => {
      const now = values[Number(slider.value)];
      for (const row of table.tBodies[0].rows) {
        const found = now[rows.indexOf(row.cells[0].firstChild.textContent.trim())];
        found.forEach(([main, small], k) => {
          const cell = row.cells[k + 1];
          cell.replaceChildren(main === null ? "–" : page.number(main, 3));
          if (small !== null) cell.append(page.make("small", {}, page.number(small, 2)));
          if (main === null) delete cell.dataset.sort;
          else cell.dataset.sort = main;
        });
      }
      const text = `${steps[Number(slider.value)].toLocaleString("en")}`;
      output.textContent = text;
      slider.setAttribute("aria-valuetext", `step ${text}`);
      shown.forEach(line);
    };

    page.onFigure.push((plot, svg, planes) => {
      shown.push(...planes);
      planes.forEach(line);
    });
    page.onZoom.push(line);
    slider.addEventListener("input", show);
    for (const button of document.querySelectorAll("[data-turn]")) {
      button.addEventListener("click", () => {
        slider.value = Number(slider.value) + Number(button.dataset.turn);
        show();
      });
    }
    addEventListener("pageshow", show); // a browser that goes back remembers the slider
    show();
  }
}
