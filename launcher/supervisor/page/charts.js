// ---- Curves ----------------------------------------------------------------------------------

const NAMES = ["step", "loss", "ce", "ce_least", "ce_most", "grad_norm", "grad_norm_least",
  "grad_norm_most", "lr", "tokens_per_second", "dropped_rows", "val_loss", "val_bpb"];
const curves = {epoch: null, from: 0, data: Object.fromEntries(NAMES.map((name) => [name, []]))};
let cursor = null;  // step that is pointed at
let range = 0;      // newest steps that are shown; 0: all

// Mean over a fortieth of the points around each.
function smoothed(values) {
  const reach = Math.floor(values.length / 80);
  const sums = [0], counts = [0];
  for (const value of values) {
    sums.push(sums.at(-1) + (isNumber(value) ? value : 0));
    counts.push(counts.at(-1) + isNumber(value));
  }
  return values.map((_, i) => {
    const begin = Math.max(0, i - reach), end = Math.min(values.length, i + reach + 1);
    const number = counts[end] - counts[begin];
    return number > 0 ? (sums[end] - sums[begin]) / number : null;
  });
}

function ticks(low, high, log, most) {
  if (log) {
    const all = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); ++e)
      for (const m of [1, 2, 5]) all.push(m * 10 ** e);
    const inside = all.filter((x) => x >= low * 0.999 && x <= high * 1.001);
    const decades = inside.filter((x) => Math.abs(Math.log10(x) % 1) < 1e-9);
    return decades.length >= 3 ? decades : inside;
  }
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const unit = [1, 2, 5, 10].find((m) => m * power >= rough) * power;
  const all = [];
  for (let x = Math.ceil(low / unit - 1e-9) * unit; x <= high + unit * 1e-9; x += unit)
    all.push(Math.abs(x) < unit / 1e6 ? 0 : x);
  return all;
}

class Chart {
  // lines: {key, label, kind "a" | "b", dots: marks, smooth: pale line and its mean}
  constructor(parent, {title, lines, format, log, zero, hint}) {
    Object.assign(this, {title, lines, format, zero, log: false});
    this.output = make("output");
    this.svg = draw("svg", {tabindex: 0, role: "img"});
    const caption = make("figcaption", {title: hint ?? ""}, make("b", {textContent: title}),
                         this.output);
    if (log) {
      const button = make("button", {type: "button", textContent: "log"});
      button.setAttribute("aria-label", `${title}: logarithmic scale`);
      button.setAttribute("aria-pressed", "false");
      button.onclick = () => {
        this.log = !this.log;
        button.setAttribute("aria-pressed", String(this.log));
        this.draw();
      };
      caption.append(button);
    }
    parent.append(make("figure", {}, caption, this.svg));
    this.svg.onpointermove = (event) => point(this.step_at(event.offsetX));
    this.svg.onpointerleave = () => point(null);
    this.svg.onblur = () => point(null);
    this.svg.onkeydown = (event) => this.key(event);
  }

  key(event) {
    const steps = curves.data.step, by = {ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20};
    if (event.key === "Escape") return point(null);
    if (!(event.key in by) || steps.length === 0) return;
    const at = cursor === null ? steps.length - 1 : steps.indexOf(cursor);
    point(steps[Math.max(0, Math.min(steps.length - 1, at + by[event.key]))]);
    event.preventDefault();
  }

  step_at(x) {
    const wanted = this.first + (x - this.left) / this.wide * (this.last - this.first);
    const steps = curves.data.step;
    let low = 0, high = steps.length - 1;
    if (high < 0) return null;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] < wanted) low = middle + 1; else high = middle;
    }
    return low > 0 && wanted - steps[low - 1] < steps[low] - wanted ? steps[low - 1] : steps[low];
  }

  values() {
    const all = [];
    for (const {key} of this.lines)
      for (const name of [key, `${key}_least`, `${key}_most`])
        for (const value of curves.data[name] ?? [])
          if (isNumber(value) && (!this.log || value > 0)) all.push(value);
    return all;
  }

  draw() {
    const {step, ...data} = curves.data;
    const width = this.svg.clientWidth || 300, height = this.svg.clientHeight || 190;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.replaceChildren();
    const values = this.values();
    if (values.length === 0) {
      this.svg.append(draw("text", {x: width / 2, y: height / 2, "text-anchor": "middle"},
                           "nothing yet"));
      return this.say();
    }
    let low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
    if (this.zero) low = Math.min(0, low);
    const pad = this.log ? 0 : (high - low || Math.abs(high) || 1) * 0.04;
    if (!this.zero || low < 0) low -= pad;
    high += pad;
    if (this.log) [low, high] = [low * 0.95, high * 1.05];
    this.left = 46, this.wide = width - this.left - 10;
    this.first = step[0], this.last = Math.max(step[step.length - 1], this.first + 1);
    const tall = height - 26, scale = this.log ? Math.log : (y) => y;
    const x = (s) => this.left + (s - this.first) / (this.last - this.first) * this.wide;
    const y = (v) => 6 + (scale(high) - scale(v)) / (scale(high) - scale(low)) * tall;
    this.x = x, this.y = y, this.bottom = 6 + tall;
    this.axes(low, high, height);
    const fits = (v) => isNumber(v) && (!this.log || v > 0);
    for (const line of this.lines) {
      const own = data[line.key];
      if (line.dots) this.dots(line, step, own, fits);
      else this.line(line, step, own, fits);
    }
    this.mark = draw("g", {});
    this.svg.append(this.mark);
    this.say();
  }

  axes(low, high, height) {
    for (const value of ticks(low, high, this.log, 4)) {
      this.svg.append(draw("line", {class: "grid", x1: this.left, x2: this.left + this.wide,
                                    y1: this.y(value), y2: this.y(value)}));
      this.svg.append(draw("text", {x: this.left - 5, y: this.y(value) + 4, "text-anchor": "end"},
                           this.format(value)));
    }
    for (const value of ticks(this.first + 1, this.last + 1, false, Math.max(2, this.wide / 60)))
      if (Number.isInteger(value))
        this.svg.append(draw("text", {x: this.x(value - 1), y: height - 4, "text-anchor": "middle"},
                             short(value)));
  }

  line(line, step, values, fits) {
    const path = (list) => {
      let text = "", down = false;
      list.forEach((value, i) => {
        if (fits(value))
          text += `${down ? "L" : "M"}${this.x(step[i]).toFixed(1)} ${this.y(value).toFixed(1)}`;
        down = fits(value);
      });
      return text;
    };
    const least = curves.data[`${line.key}_least`], most = curves.data[`${line.key}_most`];
    const thinned = most && most.some((value, i) => fits(value) && value > least[i]);
    if (thinned) {
      const at = step.map((_, i) => i).filter((i) => fits(least[i]) && fits(most[i]));
      const edge = (i, list) => `${this.x(step[i]).toFixed(1)} ${this.y(list[i]).toFixed(1)}`;
      this.svg.append(draw("path", {class: "band", d: `M${at.map((i) => edge(i, most)).join("L")}L${
        at.reverse().map((i) => edge(i, least)).join("L")}Z`}));
    } else if (line.smooth) {
      this.svg.append(draw("path", {class: "raw", d: path(values)}));
    }
    const shown = line.smooth && !thinned ? smoothed(values) : values;
    this.svg.append(draw("path", {class: `line ${line.kind}`, d: path(shown)}));
  }

  dots(line, step, values, fits) {
    values.forEach((value, i) => {
      if (fits(value))
        this.svg.append(draw("circle", {class: `dot ${line.kind}`, cx: this.x(step[i]),
                                        cy: this.y(value), r: 3}));
    });
  }

  // What the curves are where somebody points, or at their end.
  say() {
    const {step} = curves.data;
    const at = cursor === null ? step.length - 1 : step.indexOf(cursor);
    const words = this.lines.map((line) => {
      let i = at;  // an evaluation: the latest until there
      while (line.dots && i > 0 && !isNumber(curves.data[line.key][i])) --i;
      return [line, this.format(curves.data[line.key][i])];
    });
    this.output.replaceChildren(...words.map(([line, value]) => make(
        "span", {}, make("span", {className: `key ${line.kind}${line.dots ? " dots" : ""}`}),
        `${line.label ? line.label + " " : ""}${value}`)));
    if (cursor !== null && at >= 0)
      this.output.append(make("span", {className: "quiet", textContent: `step ${step[at] + 1}`}));
    const where = at < 0 ? "nothing yet" : `step ${step[at] + 1}: ` +
        words.map(([line, value]) => `${line.label} ${value}`.trim()).join(", ");
    this.svg.setAttribute("aria-label", `${this.title}; ${where}. Arrow keys move along the curve.`);
    if (!this.mark || at < 0) return;
    this.mark.replaceChildren();
    if (cursor === null) return;
    this.mark.append(draw("line", {class: "cursor", x1: this.x(step[at]), x2: this.x(step[at]),
                                   y1: 6, y2: this.bottom}));
    for (const {key, kind} of this.lines) {
      const value = curves.data[key][at];
      if (isNumber(value) && (!this.log || value > 0))
        this.mark.append(draw("circle", {class: `dot ${kind}`, cx: this.x(step[at]),
                                         cy: this.y(value), r: 3.5}));
    }
  }
}

const charts = [
  {title: "Loss", lines: [{key: "ce", label: "training", kind: "a", smooth: true},
                          {key: "val_loss", label: "held out", kind: "b", dots: true}],
   format: (x) => plain(x, 4), log: true,
   hint: "Cross-entropy in nats per token; the bold line is its mean over a fortieth of the steps"},
  {title: "Gradient norm", lines: [{key: "grad_norm", label: "", kind: "a", smooth: true}],
   format: (x) => plain(x, 3), log: true, hint: "Before clipping"},
  {title: "Learning rate", lines: [{key: "lr", label: "", kind: "a"}],
   format: (x) => plain(x, 3), log: true, zero: true},
  {title: "Tokens per second", lines: [{key: "tokens_per_second", label: "", kind: "a", smooth: true}],
   format: short, zero: true},
  {title: "Rows dropped", lines: [{key: "dropped_rows", label: "", kind: "a", smooth: true}],
   format: short, zero: true, hint: "Rows beyond an expert's capacity in a step"},
].map((spec) => new Chart($("charts"), spec));

function point(step) {
  if (step === cursor) return;
  cursor = step;
  for (const chart of charts) chart.say();
}

for (const [steps, label] of [[0, "all steps"], [10000, "last 10k"], [1000, "last 1k"],
                              [100, "last 100"]]) {
  const button = make("button", {type: "button", textContent: label});
  button.setAttribute("aria-pressed", String(steps === 0));
  button.onclick = () => {
    range = steps;
    for (const other of $("ranges").children)
      other.setAttribute("aria-pressed", String(other === button));
    curves.epoch = null;  // from anew
    ask_now();
  };
  $("ranges").append(button);
}

// New steps are asked for alone; all of them again where they were replaced, or became many.
async function load_curves(status) {
  const {data} = curves, newest = status.latest?.step ?? -1;
  const anew = curves.epoch !== status.curves_epoch || data.step.length > 3000 ||
               (range > 0 && data.step.length > range + Math.max(20, range / 10));
  if (!anew && newest <= (data.step.at(-1) ?? -1)) return;
  const from = anew ? (range > 0 ? Math.max(0, newest + 1 - range) : 0) : (data.step.at(-1) ?? -1) + 1;
  const found = await fetch_json(`api/curves?from=${from}`);
  if (!anew && found.epoch !== curves.epoch) {
    curves.epoch = null;
    return load_curves(status);
  }
  curves.epoch = found.epoch;
  put($("behind"), found.behind ? "metrics.jsonl is still being read" : "");
  for (const name of NAMES) data[name] = anew ? found[name] : data[name].concat(found[name]);
  if (cursor !== null && !data.step.includes(cursor)) cursor = null;
  for (const chart of charts) chart.draw();
}
