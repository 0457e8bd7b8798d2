// Line charts as SVG. A chart is made once and redrawn with new numbers, so that focus and open tables stay.

const NAMESPACE = "http://www.w3.org/2000/svg";
const HEIGHT = 208;
const MARGIN = { left: 58, right: 10, top: 10, bottom: 38 };
const FEW = 12; // so many points are marked, not only joined

// An element with attributes and children; a text becomes a text node, never markup.
export function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function shape(tag, attributes, ...children) {
  return filled(document.createElementNS(NAMESPACE, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// Four significant digits; very large and very small numbers as powers of ten.
export function number(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e-4 && size < 1e6) return String(Number(value.toPrecision(4))).replace("-", "−");
  const [mantissa, exponent] = value.toExponential(2).split("e");
  const raised = [...exponent.replace("+", "")].map((c) => "⁰¹²³⁴⁵⁶⁷⁸⁹"["0123456789".indexOf(c)] ?? "⁻").join("");
  const factor = String(Number(mantissa)).replace("-", "−");
  return factor === "1" ? `10${raised}` : `${factor}×10${raised}`;
}

function evenTicks(low, high, most) {
  const rough = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step);
  return found;
}

function powerTicks(low, high) {
  const decades = Math.log10(high / low);
  if (decades < 0.7) return evenTicks(low, high, 5).filter((tick) => tick > 0);
  const every = Math.ceil(decades / 5);
  const factors = decades < 2.2 ? [1, 2, 5] : [1];
  const found = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
    if (e % every === 0 || factors.length > 1) found.push(...factors.map((k) => k * 10 ** e));
  }
  return found.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
}

// The y axis: where a value lies between 0 (bottom) and 1 (top), and its ticks.
function vertical(values, wishesLog) {
  const log = wishesLog && values.every((v) => v > 0);
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (!log && low > 0) low = 0;
  if (low === high) [low, high] = log ? [low / 1.3, high * 1.3] : [low - (Math.abs(low) / 5 || 1), high + (Math.abs(high) / 5 || 1)];
  const [from, to] = log ? [Math.log(low), Math.log(high)] : [low, high];
  const spare = 0.05 * (to - from);
  const bottom = low === 0 ? 0 : from - spare;
  const place = (value) => ((log ? Math.log(value) : value) - bottom) / (to + spare - bottom);
  return { place, ticks: log ? powerTicks(low, high) : evenTicks(low, high, 4) };
}

export class Chart {
  constructor() {
    this.title = element("h4");
    this.legend = element("ul", { class: "legend" });
    this.svg = shape("svg", { role: "img" });
    this.caption = element("figcaption");
    this.head = element("tr");
    this.body = element("tbody");
    const table = element("table", { class: "list values" }, element("thead", {}, this.head), this.body);
    this.scroll = element("div", { class: "wide short", tabindex: "0", role: "region" }, table);
    this.summary = element("summary");
    this.numbers = element("details", {}, this.summary, this.scroll);
    this.figure = element("figure", { class: "chart" }, this.title, this.legend, this.svg, this.caption, this.numbers);
    this.numbers.addEventListener("toggle", () => this.fillTable());
    this.svg.addEventListener("pointermove", (event) => this.pointAt(event));
    this.svg.addEventListener("pointerleave", () => this.pointAt(null));
    new ResizeObserver(() => this.chart && this.draw()).observe(this.svg);
  }

  show(chart) {
    if (JSON.stringify(chart) === this.shown) return;
    this.shown = JSON.stringify(chart);
    this.chart = chart;
    this.title.textContent = chart.unit ? `${chart.title}, ${chart.unit}` : chart.title;
    this.summary.textContent = "Numbers";
    this.summary.setAttribute("aria-label", `Numbers: ${chart.title}`);
    this.scroll.setAttribute("aria-label", `Numbers: ${chart.title}`);
    const named = chart.lines.length > 1 ? chart.lines : [];
    this.legend.replaceChildren(
      ...named.map((l) => element("li", { class: `${l.role}${l.faint ? " faint" : ""}` }, element("i"), l.label)),
    );
    this.draw();
    this.fillTable();
  }

  // Lines that the table and the words below a chart are about: single steps only where there is nothing else.
  get main() {
    const strong = this.chart.lines.filter((line) => !line.faint);
    return strong.length ? strong : this.chart.lines;
  }

  draw() {
    const { lines, unit, x, best } = this.chart;
    const width = Math.max(this.svg.clientWidth, 200);
    const points = lines.flatMap((line) => line.points);
    const xs = points.map((p) => p[0]);
    let [first, last] = [Math.min(...xs), Math.max(...xs)];
    if (first === last) [first, last] = [first - 0.5, last + 0.5];
    const right = width - MARGIN.right;
    const bottom = HEIGHT - MARGIN.bottom;
    const across = (value) => MARGIN.left + ((value - first) / (last - first)) * (right - MARGIN.left);
    const axis = vertical(points.map((p) => p[1]), this.chart.log);
    const up = (value) => bottom - axis.place(value) * (bottom - MARGIN.top);
    const drawn = [];
    for (const tick of axis.ticks) {
      drawn.push(shape("line", { class: "grid", x1: MARGIN.left, x2: right, y1: up(tick), y2: up(tick) }));
      drawn.push(shape("text", { x: MARGIN.left - 8, y: up(tick) + 4, "text-anchor": "end" }, number(tick)));
    }
    drawn.push(shape("line", { class: "axis", x1: MARGIN.left, x2: right, y1: bottom, y2: bottom }));
    for (const tick of evenTicks(first, last, width < 300 ? 4 : 6)) {
      drawn.push(shape("text", { x: across(tick), y: bottom + 16, "text-anchor": "middle" }, number(tick)));
    }
    drawn.push(shape("text", { x: (MARGIN.left + right) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, x));
    if (best !== null) {
      drawn.push(shape("line", { class: "best", x1: across(best), x2: across(best), y1: MARGIN.top, y2: bottom }));
    }
    for (const line of lines) {
      const places = line.points.map((p) => [across(p[0]).toFixed(1), up(p[1]).toFixed(1)]);
      const path = `M${places.map((p) => p.join(" ")).join("L")}`;
      drawn.push(shape("path", { class: `line ${line.role}${line.faint ? " faint" : ""}`, d: path }));
      if (places.length <= FEW && !line.faint) {
        drawn.push(...places.map(([cx, cy]) => shape("circle", { class: `dot ${line.role}`, cx, cy, r: 2.4 })));
      }
    }
    this.pointer = shape("line", { class: "at", y1: MARGIN.top, y2: bottom, visibility: "hidden" });
    this.place = { across, inverse: (px) => first + ((px - MARGIN.left) / (right - MARGIN.left)) * (last - first) };
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.svg.replaceChildren(...drawn, this.pointer);
    this.lastWords = this.wordsAt(Math.max(...this.main.flatMap((line) => line.points.map((p) => p[0]))));
    this.caption.textContent = this.lastWords;
    this.svg.setAttribute("aria-label", `${this.title.textContent}, over ${x}s: ${this.lastWords}`);
  }

  // "epoch 12: train 0.31, validation 0.4": of each line its point nearest to a place on the x axis.
  wordsAt(where) {
    const nearest = this.main.map((line) => [
      line,
      line.points.reduce((a, b) => (Math.abs(b[0] - where) < Math.abs(a[0] - where) ? b : a)),
    ]);
    const values = nearest.map(([line, p]) => (nearest.length > 1 ? `${line.label} ${number(p[1])}` : number(p[1])));
    const at = nearest[0][1][0];
    const shown = this.chart.x === "step" ? Math.round(at) : Number(at.toFixed(2));
    return `${this.chart.x} ${shown}: ${values.join(", ")}${this.chart.unit ? ` ${this.chart.unit}` : ""}`;
  }

  pointAt(event) {
    if (!event) {
      this.pointer.setAttribute("visibility", "hidden");
      this.caption.textContent = this.lastWords;
      return;
    }
    const where = this.place.inverse(event.clientX - this.svg.getBoundingClientRect().left);
    const nearest = this.main[0].points.reduce((a, b) => (Math.abs(b[0] - where) < Math.abs(a[0] - where) ? b : a))[0];
    for (const end of ["x1", "x2"]) this.pointer.setAttribute(end, this.place.across(nearest));
    this.pointer.setAttribute("visibility", "visible");
    this.caption.textContent = this.wordsAt(nearest);
  }

  // The chart's numbers, newest first; only while somebody looks.
  fillTable() {
    if (!this.numbers.open) return;
    const lines = this.main;
    const heads = [this.chart.x, ...lines.map((line) => (lines.length > 1 ? line.label : this.title.textContent))];
    this.head.replaceChildren(...heads.map((text) => element("th", { scope: "col", class: "num" }, text)));
    const rows = new Map();
    lines.forEach((line, i) => {
      for (const [x, y] of line.points) rows.set(x, (rows.get(x) ?? lines.map(() => "—")).with(i, number(y)));
    });
    this.body.replaceChildren(
      ...[...rows.entries()].sort((a, b) => b[0] - a[0]).map(([x, values]) =>
        element("tr", {}, element("th", { scope: "row", class: "num" }, String(Number(x.toFixed(2)))),
          ...values.map((text) => element("td", { class: "num" }, text)))),
    );
  }
}
