"use strict";
// Values of a chart at the pointer, or by the arrow keys. Without it the page has everything in its tables.
const numbers = JSON.parse(document.getElementById("numbers").textContent);
const tip = document.getElementById("tip");
const at = (place) => place.split(".").reduce((found, part) => found[part], numbers);
const shown = (value, unit) => {
  if (value === null || value === undefined) return "–";
  if (unit === "share") return (100 * value).toFixed(1) + " %";
  if (unit === "degrees") return value.toFixed(1) + "°";
  const size = Math.abs(value);
  if (value === 0 || (size >= 1e-3 && size < 1e4)) return value.toFixed(size < 10 ? 3 : size < 100 ? 2 : 1);
  return value.toExponential(2);
};
const box = { left: 50, right: 350, width: 360 };
for (const chart of document.querySelectorAll("svg.chart")) {
  const frame = JSON.parse(chart.dataset.chart);
  const places = [...new Set(frame.lines.flatMap((line) => at(line.x)))].sort((a, b) => a - b);
  const cross = chart.querySelector(".cross");
  let index = -1;
  const hide = () => { tip.hidden = true; cross.classList.remove("on"); };
  const show = (wanted) => {
    index = Math.min(Math.max(wanted, 0), places.length - 1);
    const x = places[index];
    const across = box.left + (x - frame.left) / (frame.right - frame.left) * (box.right - box.left);
    cross.setAttribute("x1", across); cross.setAttribute("x2", across); cross.classList.add("on");
    const rows = frame.lines.map((line) => {
      const place = at(line.x).indexOf(x);
      if (place < 0) return "";
      let text = shown(at(line.y)[place], frame.unit);
      const low = line.low && at(line.low)[place], high = line.high && at(line.high)[place];
      if (typeof low === "number") text += " (" + shown(low, frame.unit) + " to " + shown(high, frame.unit) + ")";
      const row = document.createElement("div"), name = document.createElement("span"), value = document.createElement("span");
      name.textContent = line.label; value.textContent = text; row.append(name, value);
      return row;
    });
    const head = document.createElement("b");
    head.textContent = chart.querySelector("title").textContent + ", " + (frame.unit === "degrees" ? "bin " : "") + x;
    tip.replaceChildren(head, ...rows.filter(Boolean));
    tip.hidden = false;
    const where = chart.getBoundingClientRect();
    const left = where.left + across / box.width * where.width + 14;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = Math.max(8, Math.min(left, room)) + "px";
    const below = where.top - tip.offsetHeight - 6;
    tip.style.top = (below > 56 ? below : where.bottom + 6) + "px";
  };
  chart.addEventListener("pointermove", (event) => {
    const where = chart.getBoundingClientRect();
    const x = (event.clientX - where.left) / where.width * box.width;
    const value = frame.left + (x - box.left) / (box.right - box.left) * (frame.right - frame.left);
    let best = 0;
    places.forEach((place, n) => { if (Math.abs(place - value) < Math.abs(places[best] - value)) best = n; });
    show(best);
  });
  chart.addEventListener("pointerleave", hide);
  chart.addEventListener("blur", hide);
  chart.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: places.length - 1 };
    if (event.key === "Escape") hide();
    if (event.key in moves) { event.preventDefault(); show(moves[event.key]); }
  });
}
