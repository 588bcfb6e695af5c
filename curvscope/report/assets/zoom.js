// A closer look: every figure can fill the screen, and figures of lines zoom into a part that is
// marked with the mouse, or with the buttons and the keys + - 0 and Shift with an arrow.
{
  const dialog = page.make("dialog", { class: "large", "aria-label": "The figure, enlarged" });
  const leave = page.make("button", { type: "button", class: "leave" }, "Close");
  leave.addEventListener("click", () => dialog.close());
  dialog.append(leave);
  document.body.append(dialog);

  const enlarge = (plot, tools) => {
    const place = document.createComment("");
    const tip = document.getElementById("tip");
    plot.before(place);
    dialog.append(plot, tools, tip);
    dialog.showModal();
    dialog.addEventListener("close", () => {
      page.hide(plot);
      place.replaceWith(plot);
      plot.closest(".scroll").after(tools);
      document.body.append(tip);
      tools.querySelector("button").focus({ preventScroll: true });
    }, { once: true });
  };

  // Numbers of a path or of marks, moved from the whole view to the present one.
  const remap = (axes) => {
    const [x0, y0, x1, y1] = axes.box;
    const ends = [[x0, x1], [y1, y0]];
    const move = (axis, spot) => {
      const [from, to] = ends[axis], [low, high] = axes.full[axis], [a, b] = axes.view[axis];
      const value = low + (spot - from) / (to - from) * (high - low);
      return from + (value - a) / (b - a) * (to - from);
    };
    for (const { mark } of axes.lines) {
      for (const path of mark.querySelectorAll("path")) {
        if (path.closest("defs")) continue;
        path.dataset.d ??= path.getAttribute("d");
        let axis = 1;
        path.setAttribute("d", path.dataset.d.replace(/-?\d*\.?\d+(?:e[-+]?\d+)?/g, (text) => {
          axis = 1 - axis;
          return move(axis, Number(text)).toFixed(2);
        }));
      }
      for (const use of mark.querySelectorAll("use")) {
        use.dataset.x ??= use.getAttribute("x");
        use.dataset.y ??= use.getAttribute("y");
        use.setAttribute("x", move(0, Number(use.dataset.x)));
        use.setAttribute("y", move(1, Number(use.dataset.y)));
      }
    }
  };

  // Round numbers between the ends of an axis, as values.
  const rounds = (axes, axis) => {
    const [low, high] = axes.view[axis], found = [];
    if (axes.kinds[axis] === "log" && high - low > 1) {
      const step = Math.max(1, Math.ceil((high - low) / 8));
      const inner = high - low < 2.5 ? [1, 2, 5] : [1];
      for (let power = Math.floor(low); power <= high; power += step) {
        for (const k of inner) if (Math.log10(k) + power >= low && Math.log10(k) + power <= high) found.push(k * 10 ** power);
      }
      return found;
    }
    const back = axes.f[axis][1], from = back(low), to = back(high);
    const raw = (to - from) / 5, size = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].find((k) => k * size >= raw) * size;
    for (let value = Math.ceil(from / step) * step; value <= to; value += step) found.push(Number(value.toPrecision(10)));
    return found;
  };

  const label = (value) => {
    const text = page.number(value).replace(/^1·10/, "10");
    return /·|10[⁻⁰-⁹]/.test(text) ? text : text.replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
  };

  const draw = (axes) => {
    remap(axes);
    axes.element.querySelector(".ticks")?.remove();
    const whole = axes.view.every((ends, k) => ends.every((v, j) => Math.abs(v - axes.full[k][j]) < 1e-9));
    for (const tick of axes.element.querySelectorAll(".tick")) tick.style.display = whole ? "" : "none";
    if (whole) return;
    const [x0, y0, x1, y1] = axes.box;
    const ticks = page.make("g", { class: "ticks" });
    for (const value of rounds(axes, 0)) {
      const x = axes.place(0, value);
      ticks.append(page.make("line", { x1: x, x2: x, y1: y0, y2: y1 }),
        page.make("text", { x, y: y1 + 12, "text-anchor": "middle" }, label(value)));
    }
    for (const value of rounds(axes, 1)) {
      const y = axes.place(1, value);
      ticks.append(page.make("line", { x1: x0, x2: x1, y1: y, y2: y }),
        page.make("text", { x: x0 - 4, y: y + 2.5, "text-anchor": "end" }, label(value)));
    }
    axes.element.querySelector(".mark").before(ticks);
  };

  const show = (axes, view) => {
    axes.view = view.map(([a, b], k) => {
      const [low, high] = axes.full[k];
      const size = Math.max((high - low) * 1e-3, Math.min(b - a, high - low));
      const from = Math.min(Math.max(a, low), high - size); // the view stays within the whole
      return [from, from + size];
    });
    draw(axes);
    page.onZoom.forEach((work) => work(axes));
  };
  const scaled = (axes, factor) => show(axes, axes.view.map(([a, b]) => {
    const middle = (a + b) / 2, half = (b - a) / 2 * factor;
    return [middle - half, middle + half];
  }));
  const shifted = (axes, axis, share) => show(axes, axes.view.map(([a, b], k) =>
    k === axis ? [a + share * (b - a), b + share * (b - a)] : [a, b]));

  // One set of buttons for all axes of a figure.
  const zoomButtons = (planes, tools) => {
    const button = (name, label, work) => {
      const made = page.make("button", { type: "button", "aria-label": label, title: label }, name);
      made.addEventListener("click", () => planes.forEach(work));
      tools.append(made);
    };
    button("+", "Zoom in", (axes) => scaled(axes, 0.6));
    button("−", "Zoom out", (axes) => scaled(axes, 1 / 0.6));
    button("reset", "Show the whole figure again", (axes) => show(axes, axes.full));
    tools.append(page.make("span", { class: "hint" }, "or mark a part with the mouse"));
  };

  const zoomable = (plot, svg, axes) => {
    let start = null, frame = null;
    plot.addEventListener("pointerdown", (event) => {
      const here = page.spot(svg, event);
      if (event.pointerType !== "mouse" || event.button || !axes.inside(here)) return;
      start = here;
      plot.setPointerCapture(event.pointerId);
      event.preventDefault();
      plot.focus({ preventScroll: true });
    });
    plot.addEventListener("pointermove", (event) => {
      if (!start) return;
      const [x0, y0, x1, y1] = axes.box, [px, py] = page.spot(svg, event);
      const x = Math.min(Math.max(px, x0), x1), y = Math.min(Math.max(py, y0), y1);
      if (!frame && Math.hypot(x - start[0], y - start[1]) > 4) {
        frame = page.make("rect", { class: "frame" });
        svg.append(frame);
        plot.classList.add("dragging");
        page.hide(plot);
      }
      if (!frame) return;
      const flat = Math.abs(y - start[1]) < 6; // along one axis only
      frame.setAttribute("x", Math.min(x, start[0]));
      frame.setAttribute("width", Math.abs(x - start[0]));
      frame.setAttribute("y", flat ? y0 : Math.min(y, start[1]));
      frame.setAttribute("height", flat ? y1 - y0 : Math.abs(y - start[1]));
    });
    const end = () => {
      if (frame) {
        const [x, y, w, h] = ["x", "y", "width", "height"].map((name) => Number(frame.getAttribute(name)));
        const value = (axis, spot) => axes.f[axis][0](axes.value(axis, spot));
        if (w > 4) show(axes, [[value(0, x), value(0, x + w)], [value(1, y + h), value(1, y)]]);
      }
      frame?.remove();
      plot.classList.remove("dragging");
      start = frame = null;
    };
    plot.addEventListener("pointerup", end);
    plot.addEventListener("pointercancel", end);
    plot.addEventListener("dblclick", () => show(axes, axes.full));
    plot.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.altKey || event.metaKey) return;
      const arrow = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowDown: [1, -1], ArrowUp: [1, 1] }[event.key];
      if (event.key === "+" || event.key === "=") scaled(axes, 0.6);
      else if (event.key === "-") scaled(axes, 1 / 0.6);
      else if (event.key === "0") show(axes, axes.full);
      else if (event.shiftKey && arrow) shifted(axes, arrow[0], 0.2 * arrow[1]);
      else return;
      event.preventDefault();
    });
  };

  for (const plot of document.querySelectorAll(".plot")) {
    const svg = plot.querySelector("svg.figure");
    if (!svg) continue;
    const tools = page.make("div", { class: "figure-tools" });
    const button = page.make("button", { type: "button", "aria-haspopup": "dialog" }, "enlarge");
    button.addEventListener("click", () => { if (!dialog.open) enlarge(plot, tools); });
    tools.append(button);
    plot.closest(".scroll").after(tools);
  }
  page.onFigure.push((plot, svg, planes) => {
    if (planes.length) zoomButtons(planes, plot.closest(".scroll").nextElementSibling);
    for (const axes of planes) zoomable(plot, svg, axes);
  });
}
