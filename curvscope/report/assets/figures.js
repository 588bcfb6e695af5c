// Figures answer: pointing at a mark, or walking over the marks with the arrow keys, shows what it
// stands for; in figures of lines, the values of all lines at that place. Without scripts the same
// sentences are the marks' titles.
page.onFigure = []; // called with every figure that comes near the screen, and its axes with lines
page.onZoom = []; // called with axes that show another part
{
  const tip = document.getElementById("tip");
  const tips = new WeakMap();
  const visible = (mark) => !mark.closest(".off");

  const show = (content, x, y) => {
    tip.replaceChildren(...content);
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = x + 16 + box.width > innerWidth ? x - 16 - box.width : x + 16;
    tip.style.left = `${Math.max(4, Math.min(left, innerWidth - box.width - 4))}px`;
    tip.style.top = `${Math.max(4, Math.min(y + 14, innerHeight - box.height - 4))}px`;
  };

  const hide = (plot) => {
    tip.hidden = true;
    plot?.querySelector(".mark.active")?.classList.remove("active");
    plot?.querySelectorAll(".cross").forEach((line) => line.remove());
  };

  // Axes: from data to places in the SVG and back, at the present zoom.
  const plane = (element) => {
    const { names, box, x, y } = JSON.parse(element.dataset.plane);
    const scale = (kind) => kind === "log" ? [Math.log10, (v) => 10 ** v] : [(v) => v, (v) => v];
    const made = { element, names, box, kinds: [x[0], y[0]], f: [scale(x[0]), scale(y[0])] };
    made.full = [x, y].map(([, a, b], k) => [made.f[k][0](a), made.f[k][0](b)]);
    made.view = made.full.map((ends) => [...ends]);
    const ends = [[box[0], box[2]], [box[3], box[1]]]; // y grows upwards
    made.place = (axis, value) => {
      const [low, high] = made.view[axis], [from, to] = ends[axis];
      return from + (made.f[axis][0](value) - low) / (high - low) * (to - from);
    };
    made.value = (axis, spot) => {
      const [low, high] = made.view[axis], [from, to] = ends[axis];
      return made.f[axis][1](low + (spot - from) / (to - from) * (high - low));
    };
    made.inside = ([px, py]) => px >= box[0] && px <= box[2] && py >= box[1] && py <= box[3];
    made.lines = [...element.querySelectorAll(".mark[data-points]")].map((mark) => ({
      mark, points: mark.dataset.points.split(",").map((pair) => pair.split(" ").map(Number)),
    }));
    return made;
  };

  const spot = (svg, event) => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    return [point.x, point.y];
  };
  page.spot = spot;

  // All lines at the place of `wanted`: a list of what to show, with each line's own stroke.
  const read = (svg, found, wanted) => {
    const axis = found.f[0][0];
    const near = (points) => points.reduce((a, b) => Math.abs(axis(b[0]) - axis(wanted)) < Math.abs(axis(a[0]) - axis(wanted)) ? b : a);
    const lines = found.lines.filter(({ mark, points }) => visible(mark) && points.length);
    if (!lines.length) return null;
    const anchor = near(lines.flatMap(({ points }) => points))[0];
    const rows = [];
    const values = lines.map(({ mark, points }) => [mark, ...near(points)]).sort((a, b) => b[2] - a[2]);
    for (const [mark, x, y] of values) {
      // A line that ends before this place has nothing to say here.
      if (Math.abs(axis(x) - axis(anchor)) > 0.02 * Math.abs(found.full[0][1] - found.full[0][0])) continue;
      const stroke = mark.querySelector("path");
      const style = stroke ? getComputedStyle(stroke) : null;
      const key = page.make("svg", { viewBox: "0 0 22 8", width: 22, height: 8, "aria-hidden": "true" },
        page.make("line", { x1: 0, x2: 22, y1: 4, y2: 4, style: style ? `stroke:${style.stroke};stroke-width:2;stroke-dasharray:${style.strokeDasharray}` : "" }));
      rows.push(page.make("div", {}, key, ` ${tips.get(mark)}: ${page.number(y)}`));
    }
    svg.querySelectorAll(".cross").forEach((line) => line.remove());
    const place = found.place(0, anchor);
    if (place >= found.box[0] - 0.5 && place <= found.box[2] + 0.5) {
      found.element.append(page.make("line", { class: "cross", x1: place, x2: place, y1: found.box[1], y2: found.box[3] }));
    }
    const title = page.make("strong", {}, `${found.names[0]} ${Number.isInteger(anchor) ? anchor.toLocaleString("en") : page.number(anchor)}`);
    return { content: [title, ...rows], anchor, place };
  };

  const prepare = (plot) => {
    const svg = plot.querySelector("svg.figure");
    if (!svg) return;
    const marks = [];
    for (const mark of svg.querySelectorAll(".mark")) {
      const title = mark.querySelector(":scope > title");
      if (!title) continue;
      tips.set(mark, title.textContent);
      title.remove(); // the browser's own would come late and on top
      if (!mark.dataset.points) marks.push(mark);
    }
    const planes = [...svg.querySelectorAll(".plane")].map(plane);
    if (!marks.length && !planes.length) return;
    svg.querySelector(":scope > title")?.remove(); // stays as aria-label
    plot.closest(".scroll").removeAttribute("tabindex");
    plot.tabIndex = 0;
    plot.setAttribute("role", "group");
    plot.setAttribute("aria-label", "Figure. Arrow keys read its values.");

    const point = (event) => {
      if (plot.classList.contains("dragging")) return;
      const here = spot(svg, event);
      const over = planes.find((one) => one.inside(here));
      if (over) {
        const found = read(svg, over, over.value(0, here[0]));
        if (found) show(found.content, event.clientX, event.clientY);
        else hide(plot);
        return;
      }
      let mark = event.target.closest?.(".mark");
      if (!mark || !tips.has(mark) || mark.dataset.points) mark = closest(event);
      hide(plot);
      if (mark && visible(mark)) activate(mark, event.clientX, event.clientY);
    };
    // Small marks are hit by coming near them.
    const closest = (event) => {
      let best = null, least = 9;
      for (const mark of marks) {
        if (!visible(mark)) continue;
        const box = mark.getBoundingClientRect();
        const distance = Math.hypot(
          Math.max(box.left - event.clientX, 0, event.clientX - box.right),
          Math.max(box.top - event.clientY, 0, event.clientY - box.bottom));
        if (distance < least) [best, least] = [mark, distance];
      }
      return best;
    };
    const activate = (mark, x, y) => {
      mark.classList.add("active");
      show([tips.get(mark)], x, y);
    };
    plot.addEventListener("pointermove", point);
    plot.addEventListener("pointerdown", point);
    plot.addEventListener("pointerleave", () => hide(plot));
    plot.addEventListener("blur", () => hide(plot));

    for (const work of page.onFigure) work(plot, svg, planes);

    let at = -1, where = null;
    plot.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !tip.hidden) {
        hide(plot);
        event.preventDefault();
        return;
      }
      if (event.shiftKey || event.ctrlKey || event.altKey || event.metaKey) return;
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      hide(plot);
      if (planes.length && !marks.length) {
        const places = [...new Set(planes[0].lines.filter(({ mark }) => visible(mark)).flatMap(({ points }) => points.map(([x]) => x)))].sort((a, b) => a - b);
        if (!places.length) return;
        const k = where === null ? (step > 0 ? -1 : 1) : places.findIndex((x) => x >= where);
        where = places[Math.max(0, Math.min(places.length - 1, k + step))];
        const found = read(svg, planes[0], where);
        const corner = new DOMPoint(found.place, planes[0].box[1]).matrixTransform(svg.getScreenCTM());
        show(found.content, corner.x, corner.y);
        return;
      }
      const seen = marks.filter(visible);
      if (!seen.length) return;
      at = Math.max(0, Math.min(seen.length - 1, at + step));
      const box = seen[at].getBoundingClientRect();
      activate(seen[at], Math.min(box.right, innerWidth / 2), box.bottom);
    });
  };

  page.whenNear(document.querySelectorAll(".plot"), prepare);
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
  page.hide = hide;
}
