// ---- The state of the run ---------------------------------------------------------------------

const GOOD = ["training", "done"], BAD = ["failed"];
const KINDS = {
  good: ["started", "saved", "resumed", "done", "evaluated", "taken_over"],
  bad: ["lost", "hang", "failed", "crash_loop", "save_failed", "host_left_out"],
};

function tile(title, value, more, kind = "") {
  const body = make("dd", {textContent: value});
  if (more) body.append(make("small", {textContent: more}));
  return make("div", {className: kind}, make("dt", {textContent: title}), body);
}

function show_tiles(s) {
  const of = s.of_ranks.filter((rank) => rank.step_seconds > 0);
  const sum = (key) => of.reduce((total, rank) => total + (rank[key] ?? 0), 0);
  const latest = s.latest ?? {}, held_out = s.latest_evaluation;
  const up = s.of_ranks.filter((rank) => rank.state === "alive").length;
  const behind = s.saved_step >= 0 ? s.steps_done - s.saved_step : null;
  $("tiles").replaceChildren(
      tile("Loss", plain(latest.ce, 4), `with router losses ${plain(latest.loss, 4)}`),
      tile("Held-out loss", plain(held_out?.val_loss, 4), isNumber(held_out?.val_bpb)
          ? `${plain(held_out.val_bpb, 4)} bits per byte` : held_out ? "" : "no evaluation yet"),
      tile("Tokens per second", short(s.tokens_per_second || NaN), `${seconds(s.step_seconds)} a step`),
      tile("All-to-all", of.length ? percent(sum("exchange_seconds") / sum("step_seconds")) : "–",
           "share of the ranks' time"),
      tile("Rows dropped", short(latest.dropped_rows),
           s.experts.experts ? `${count(latest.dead_experts ?? 0, "dead expert")}` : "no experts"),
      tile("Ranks", `${up} of ${s.ranks}`, s.expert_ranks > 1 ? `experts over ${s.expert_ranks}` : "up",
           up < s.ranks && s.state === "training" ? "bad" : ""),
      tile("Checkpoint", s.saved_step >= 0 ? `step ${s.saved_step}` : "none yet",
           s.failed_saves ? `${count(s.failed_saves, "save")} failed`
                          : behind === null ? "" : `${count(behind, "step")} behind`,
           s.failed_saves > 0 ? "bad" : ""),
      tile("Restarts", String(s.restarts),
           `${count(s.steps_lost, "step")} twice, ${s.skipped_steps} skipped`,
           s.restarts > 0 ? "warn" : ""));
}

function show_state(s) {
  const name = s.run.split("/").filter(Boolean).pop() ?? "moemamba";
  const kind = !s.healthy || BAD.includes(s.state) ? "bad" : GOOD.includes(s.state) ? "good" : "warn";
  const share = s.steps > 0 ? Math.min(1, s.steps_done / s.steps) : 0;
  const hangs = !s.healthy && s.health.startsWith("hanging");
  const word = hangs ? "hanging" : s.state;
  put($("run"), name);
  $("run").title = s.run;
  $("state").className = `pill ${kind}`;
  put($("state"), word);
  put($("sentence"), `step ${s.steps_done} of ${s.steps}, ${percent(share)}` +
      (s.state === "training" && isNumber(s.eta_seconds) ? `, about ${duration(s.eta_seconds)} left`
                                                         : "") +
      (s.state_text && s.state_text !== s.state ? ` · ${s.state_text}` : ""));
  $("done").style.width = `${100 * share}%`;
  $("bar").setAttribute("aria-valuenow", (100 * share).toFixed(1));
  document.title = `${Math.floor(100 * share)} % ${word} · ${name}`;
  $("trouble").hidden = !s.hang_report;
  if (document.documentElement.dataset.state !== word) $("trouble").open = kind !== "good";
  put($("report"), s.hang_report);
  document.documentElement.dataset.state = word;
  put($("identity"), `run ${s.run_id || "–"} · ${s.global_batch} × ${s.sequence_length} tokens a step · ` +
      `attempt began ${duration(s.attempt_seconds)} ago`);
  alarm(s.healthy ? "" : s.state === "failed" ? `The run has failed: ${s.state_text || "no reason is known"}`
                       : hangs ? `The run hangs. ${s.health}` : `Look at it: ${s.health}`);
}

let alarmed = "";
function alarm(text) {
  if (text === alarmed) return;
  alarmed = text;
  $("alarm").hidden = !text;
  put($("alarm"), text);
}

// ---- Ranks, hosts, events ---------------------------------------------------------------------

const MOST_RANKS = 64;
let all_ranks = false;
$("all-ranks").onclick = () => {
  all_ranks = !all_ranks;
  $("all-ranks").setAttribute("aria-pressed", String(all_ranks));
  if (last) show_ranks(last);
};

function meter(whole, part, most) {
  const inner = make("i"), outer = make("i", {}, inner);
  outer.style.width = `${100 * Math.min(1, whole / most || 0)}%`;
  inner.style.width = `${100 * Math.min(1, part / whole || 0)}%`;
  return make("span", {className: "meter"}, outer);
}

function place_of(rank) {
  if (rank.phase === undefined) return ["–", ""];
  const place = rank.phase + (rank.layer >= 0 ? `, layer ${rank.layer}` : "");
  const waits = rank.in_collective ? `in ${rank.group || "a collective"}` +
      (rank.rows_expected >= 0 ? `, ${short(rank.rows_received)} of ${short(rank.rows_expected)} rows` : "")
                                   : "";
  return [`step ${rank.at_step + 1}, ${place}`, waits];
}

// Ranks that are not there yet, or not any more, are as they should be where the run is.
function kind_of(rank, s) {
  if (rank.state === "alive") return rank.straggler ? "warn" : "good";
  const ends = ["stopping", "done", "stopped"].includes(s.state) && rank.state === "ended";
  const begins = ["starting", "recovering"].includes(s.state) && rank.state === "absent";
  return ends || begins ? "" : "bad";
}

function show_ranks(s) {
  const trouble = (rank) => (rank.state !== "alive") * 2 + rank.straggler;
  let shown = s.of_ranks;
  $("all-ranks").hidden = shown.length <= MOST_RANKS;
  put($("all-ranks"), `all ${shown.length}`);
  if (!all_ranks && shown.length > MOST_RANKS)
    shown = [...shown].sort((a, b) => trouble(b) - trouble(a) || b.busy_seconds - a.busy_seconds)
        .slice(0, MOST_RANKS);
  const most = Math.max(...s.of_ranks.map((rank) => rank.step_seconds || 0), 1e-9);
  const cell = (...content) => make("td", {}, ...content);
  const small = (text) => make("small", {textContent: text});
  $("ranks").replaceChildren(...shown.map((rank) => {
    const head = make("th", {scope: "row", textContent: rank.rank});
    const late = rank.progress_seconds_ago > 5 ? `no progress for ${duration(rank.progress_seconds_ago)}`
                                               : "";
    const state = make("span", {className: kind_of(rank, s), textContent:
        rank.state === "alive" && rank.straggler ? "slow" : rank.state});
    const [place, waits] = place_of(rank);
    return make("tr", {}, head, cell(state, small(late || rank.host)), cell(place, small(waits)),
                cell(seconds(rank.step_seconds || NaN),
                     meter(rank.step_seconds, rank.busy_seconds, most)),
                cell(percent(rank.busy_seconds / rank.step_seconds)),
                cell(percent(rank.exchange_seconds / rank.step_seconds)),
                cell(bytes(rank.resident_bytes), small(rank.gpu_bytes > 0
                    ? `GPU ${bytes(rank.gpu_bytes)}` : "")));
  }));
}

function show_hosts(s) {
  const hosts = new Map();
  for (const rank of s.of_ranks) {
    const key = rank.host || "not connected yet";
    hosts.set(key, [...(hosts.get(key) ?? []), rank]);
  }
  const items = [...hosts].map(([host, ranks]) => {
    const gpus = [...new Set(ranks.map((rank) => rank.gpu).filter(Boolean))].join(", ");
    const numbers = ranks.map((rank) => rank.rank);
    const list = numbers.length > 8 ? `${numbers[0]} to ${numbers.at(-1)}` : numbers.join(", ");
    const memory = ranks.reduce((sum, rank) => sum + (rank.resident_bytes ?? 0), 0);
    const down = ranks.filter((rank) => rank.state !== "alive").length;
    return make("li", {}, make("b", {textContent: host}),
                ` ${ranks.length === 1 ? "rank" : "ranks"} ${list} · ${bytes(memory)}` +
                (gpus ? ` · ${gpus}` : "") + (down ? ` · ${down} not alive` : ""));
  });
  for (const host of s.hosts_left_out)
    items.push(make("li", {className: "bad"}, make("b", {textContent: host}),
                    " left out: it failed too often"));
  $("hosts").replaceChildren(...items);
}

let events_shown = "";
function show_events(s) {
  const key = JSON.stringify(s.events.at(-1)) + s.events.length;
  if (key === events_shown) return;  // whoever scrolls there stays where they are
  events_shown = key;
  $("events").replaceChildren(...s.events.toReversed().map((event) => {
    const when = new Date(event.milliseconds_since_1970);
    const time = make("time", {textContent: isNaN(when) ? "–" : when.toLocaleString()});
    if (!isNaN(when)) time.dateTime = when.toISOString();
    const kind = KINDS.good.includes(event.kind) ? "good" : KINDS.bad.includes(event.kind) ? "bad" : "warn";
    return make("li", {className: kind}, time, make("b", {textContent: event.kind}), event.text);
  }));
  if (s.events.length === 0) $("events").append(make("li", {textContent: "none yet"}));
}

let samples_of = null;
async function load_samples(status) {
  const key = `${status.curves_epoch} ${status.latest_evaluation?.step}`;
  if (key === samples_of) return;
  const {samples} = await fetch_json("api/samples");
  if (samples.length === 0 || samples.at(-1).step === status.latest_evaluation?.step) samples_of = key;
  $("samples-section").hidden = samples.length === 0;
  $("samples").replaceChildren(...samples.toReversed().map((sample) => make(
      "article", {}, make("small", {className: "quiet", textContent: `after step ${sample.step + 1}`}),
      make("p", {}, make("b", {textContent: sample.prompt}), sample.text))));
}
