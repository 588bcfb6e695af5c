// What the other scripts share, and the button for colours.
const page = {
  // An element with attributes and children; texts become text nodes, never markup.
  make(tag, attributes = {}, ...children) {
    const svg = ["svg", "g", "path", "line", "rect", "text", "circle"].includes(tag);
    const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  },

  // Calls `work` for each element when it first comes near the screen, so that long pages open fast.
  whenNear(elements, work) {
    const watch = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        watch.unobserve(entry.target);
        work(entry.target);
      }
    }, { rootMargin: "600px" });
    for (const element of elements) watch.observe(element);
  },

  // Numbers as the tables show them: three digits, powers of ten where they are shorter.
  number(value, digits = 3) {
    if (value === 0 || !Number.isFinite(value)) return String(value);
    const size = Math.floor(Math.log10(Math.abs(value)) + 1e-12);
    if (size >= -3 && size < 6) {
      return Number(value.toPrecision(digits)).toLocaleString("en", {
        minimumFractionDigits: Math.max(0, digits - 1 - size), maximumFractionDigits: Math.max(0, digits - 1 - size),
      }).replace("-", "−");
    }
    const [mantissa, power] = value.toExponential(digits - 1).split("e");
    const raised = String(Number(power)).replace(/./g, (c) => c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]);
    return `${Number(mantissa)}·10${raised}`.replace("-", "−");
  },
};

{
  const button = document.getElementById("theme");
  const root = document.documentElement;
  const order = ["automatic", "light", "dark"];
  const tell = () => { button.querySelector(".state").textContent = root.dataset.theme ?? "automatic"; };
  button.addEventListener("click", () => {
    const next = order[(order.indexOf(root.dataset.theme ?? "automatic") + 1) % order.length];
    if (next === "automatic") delete root.dataset.theme;
    else root.dataset.theme = next;
    try {
      if (next === "automatic") localStorage.removeItem("curvscope-theme");
      else localStorage.setItem("curvscope-theme", next);
    } catch { /* kept for this visit only */ }
    tell();
  });
  tell();
}
