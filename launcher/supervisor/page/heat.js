// ---- Expert load: layers x experts ------------------------------------------------------------

const heat = {experts: null, size: 0, left: 34, at: null};

function colors() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(name).trim();
  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  return {low: rgb(of("--heat-low")), even: rgb(of("--heat-even")), high: rgb(of("--heat-high")),
          dead: of("--heat-dead"), text: of("--text"), quiet: of("--quiet"), card: of("--card")};
}
// Blue at a third of the even share, red at three times of it, alike on both sides of it.
function color_of(share, c) {
  if (share === 0) return c.dead;
  const t = Math.max(-1, Math.min(1, Math.log(share) / Math.log(3)));
  const end = t < 0 ? c.low : c.high;
  return `rgb(${c.even.map((even, i) => Math.round(even + (end[i] - even) * Math.abs(t))).join(" ")})`;
}

function shares_of({layers, experts, choices}) {
  return Array.from({length: layers}, (_, layer) => {
    const own = choices.slice(layer * experts, (layer + 1) * experts);
    const even = own.reduce((a, b) => a + b, 0) / experts;
    return own.map((n) => even > 0 ? n / even : 0);
  });
}

function prepare(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  return context;
}

function draw_cell(context, c, share, x, y, wide, tall) {
  context.fillStyle = color_of(share, c);
  context.fillRect(x, y, wide, tall);
  if (share === 0 && wide >= 6 && tall >= 6) {
    context.strokeStyle = c.card;
    context.beginPath();
    context.moveTo(x + 2, y + 2), context.lineTo(x + wide - 2, y + tall - 2);
    context.moveTo(x + wide - 2, y + 2), context.lineTo(x + 2, y + tall - 2);
    context.stroke();
  } else if (wide >= 34 && tall >= 18) {
    context.fillStyle = share > 2.2 ? "#fff" : c.text;
    context.fillText(share.toFixed(share < 10 ? 2 : 0), x + wide / 2, y + tall / 2 + 4);
  }
}

function draw_heat() {
  const e = heat.experts;
  if (!e || !e.layers || !e.experts) return;
  const c = colors(), shares = heat.shares, width = $("map").clientWidth || 300;
  heat.wide = Math.min(88, (width - heat.left) / e.experts);
  heat.tall = Math.max(6, Math.min(24, 420 / e.layers));
  const gap = heat.wide >= 8 ? 1 : 0;
  const context = prepare($("heat"), Math.floor(heat.left + heat.wide * e.experts),
                          Math.ceil(heat.tall * e.layers) + 16);
  context.font = "11px system-ui, sans-serif";
  context.textAlign = "center";
  shares.forEach((row, layer) => row.forEach((share, expert) => draw_cell(
      context, c, share, heat.left + expert * heat.wide, layer * heat.tall,
      Math.max(0.5, heat.wide - gap), heat.tall - (heat.tall >= 8 ? 1 : 0))));
  context.fillStyle = c.quiet;
  const each = Math.ceil(e.layers * 12 / (heat.tall * e.layers)), of = Math.ceil(30 / heat.wide);
  for (let layer = 0; layer < e.layers; layer += each)
    context.fillText(`${layer}`, heat.left / 2 - 2, layer * heat.tall + heat.tall / 2 + 4);
  for (let expert = 0; expert < e.experts; expert += of)
    context.fillText(`${expert}`, heat.left + (expert + 0.5) * heat.wide, e.layers * heat.tall + 12);
  draw_ramp(c);
}

function draw_ramp(c) {
  const width = Math.min(420, $("scale").clientWidth || 300), dead = 34;
  const context = prepare($("ramp"), width, 14);
  draw_cell(context, c, 0, 0, 0, dead - 6, 14);
  for (let x = dead; x < width; ++x) {
    context.fillStyle = color_of(3 ** (2 * (x - dead) / (width - dead) - 1), c);
    context.fillRect(x, 0, 1, 14);
  }
  if ($("marks").children.length === 0)
    for (const text of ["dead", "⅓ or less", "even share", "3 or more"])
      $("marks").append(make("span", {textContent: text}));
}

function show_experts(s) {
  const e = s.experts;
  $("experts").hidden = !e.layers || !e.experts || e.choices.length !== e.layers * e.experts;
  if ($("experts").hidden) return;
  heat.experts = e;
  heat.shares = shares_of(e);
  let worst = [0, 0], dead = 0;
  heat.shares.forEach((row, layer) => row.forEach((share, expert) => {
    if (share > heat.shares[worst[0]][worst[1]]) worst = [layer, expert];
    dead += share === 0;
  }));
  const text = `Step ${e.step + 1}: ${count(e.layers, "layer")} (down) of ${count(e.experts, "expert")} ` +
      `(across). Most loaded: layer ${worst[0]}, expert ${worst[1]}, ` +
      `${plain(heat.shares[worst[0]][worst[1]], 3)} times the even share. Dead: ${dead}. ` +
      `Rows dropped: ${e.dropped_rows}.`;
  put($("experts-text"), text);
  $("heat").setAttribute("aria-label", `Expert load. ${text} Arrow keys move from expert to expert.`);
  draw_heat();
  say_cell();
}

function say_cell() {
  const e = heat.experts, at = heat.at;
  if (!at || at[0] >= e.layers || at[1] >= e.experts) return put($("cell"), "");
  const [layer, expert] = at, share = heat.shares[layer][expert];
  put($("cell"), `layer ${layer}, expert ${expert}: ${short(e.choices[layer * e.experts + expert])} ` +
      `choices, ${share === 0 ? "dead" : `${plain(share, 3)} times the even share`}`);
}

$("heat").onpointermove = (event) => {
  const at = [Math.floor(event.offsetY / heat.tall), Math.floor((event.offsetX - heat.left) / heat.wide)];
  heat.at = at[1] < 0 ? null : at;
  say_cell();
};
$("heat").onpointerleave = () => {
  heat.at = null;
  say_cell();
};
$("heat").onkeydown = (event) => {
  const by = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]}[event.key];
  if (!by || !heat.experts) return;
  const inside = (i, most) => Math.max(0, Math.min(most - 1, i));
  const [layer, expert] = heat.at ?? [0, 0];
  heat.at = heat.at === null ? [0, 0] : [inside(layer + by[0], heat.experts.layers),
                                         inside(expert + by[1], heat.experts.experts)];
  say_cell();
  event.preventDefault();
};
