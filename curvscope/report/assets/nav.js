// The side bar: closed on narrow screens, says where the reader is, and finds a layer by its name.
{
  const nav = document.querySelector("nav");
  const links = [...nav.querySelectorAll('a[href^="#"]')];
  const narrow = matchMedia("(max-width: 63.99rem)");
  const details = nav.querySelector("details");
  const fit = () => { details.open = !narrow.matches; };
  narrow.addEventListener("change", fit);
  fit();
  nav.addEventListener("click", (event) => {
    if (event.target.closest("a") && narrow.matches) details.open = false;
  });

  // The link in the bar at the top, for those who are far down on a phone.
  document.querySelector(".up")?.addEventListener("click", () => {
    details.open = true;
    nav.querySelector("summary").focus({ preventScroll: true });
  });

  const targets = links.map((link) => document.getElementById(link.hash.slice(1)));
  let current = null;
  const locate = () => {
    let found = 0;
    targets.forEach((target, k) => {
      if (target && target.getBoundingClientRect().top < innerHeight * 0.3) found = k;
    });
    if (innerHeight + scrollY >= document.documentElement.scrollHeight - 2) found = links.length - 1;
    const next = links[found];
    if (next === current) return;
    current?.removeAttribute("aria-current");
    next.setAttribute("aria-current", "location");
    const side = nav.closest(".side");
    if (!narrow.matches && side) {
      const box = next.getBoundingClientRect(), frame = side.getBoundingClientRect();
      if (box.top < frame.top + 20 || box.bottom > frame.bottom - 20) {
        side.scrollBy({ top: box.top - frame.top - frame.height / 2 });
      }
    }
    current = next;
  };
  let waiting = false;
  addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; locate(); });
  }, { passive: true });
  locate();

  for (const list of nav.querySelectorAll("ul ul")) {
    const items = [...list.children];
    if (items.length < 8) continue;
    const field = page.make("input", { type: "search", placeholder: "find one of them", "aria-label": "Find an entry by its name" });
    field.addEventListener("input", () => {
      const words = field.value.toLowerCase().split(/\s+/);
      for (const item of items) {
        item.hidden = !words.every((word) => item.textContent.toLowerCase().includes(word));
      }
    });
    list.before(field);
  }
}
