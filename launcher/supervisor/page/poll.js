// ---- Asking again and again --------------------------------------------------------------------

const EVERY = 2000, HIDDEN = 15000, SLOWEST = 30000;  // milliseconds
const token = new URLSearchParams(location.search).get("token");
let last = null;        // answer to /api/status
let failures = 0;       // in a row
let silent_since = null;
let timer = 0, asking = false;

for (const path of ["metrics", "api/status", "api/curves", "api/samples", "healthz"])
  $("links").append(make("a", {
    href: path + (token ? `?token=${encodeURIComponent(token)}` : ""), textContent: `/${path}`}));

async function fetch_json(path) {
  const answer = await fetch(path, {
    cache: "no-store", signal: AbortSignal.timeout(10000),
    headers: token ? {Authorization: `Bearer ${token}`} : {}});
  if (answer.status === 401) throw new Error("token");
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
}

function show_silence(error) {
  silent_since ??= new Date();
  document.documentElement.classList.add("stale");
  document.documentElement.dataset.state = "silent";
  if (error.message === "token")
    return alarm("The supervisor wants a token: add ?token=… to this page's address. It stands in the " +
                 "file that launch.status_token_file names.");
  const since = `The supervisor does not answer since ${silent_since.toLocaleTimeString()}.`;
  if (last?.state === "done" || last?.state === "stopped")
    return alarm(`${since} It ended with its run, which was ${last.state}; below is the last that it said.`);
  if (last?.state === "failed")
    return alarm(`${since} The run has failed: ${last.state_text}`);
  alarm(`${since} The run has ended, its supervisor was killed, or the way to it is cut. The supervisor's ` +
        "terminal says which; the same command starts it again, and it goes on with ranks that still live. " +
        "Below is the last that it said.");
}

async function ask() {
  const status = await fetch_json("api/status");
  if (failures > 0) events_shown = "";
  failures = 0;
  silent_since = null;
  last = status;
  document.documentElement.classList.remove("stale");
  show_state(status);
  show_tiles(status);
  show_experts(status);
  show_ranks(status);
  show_hosts(status);
  show_events(status);
  await load_curves(status);
  await load_samples(status);
  put($("updated"), `as of ${new Date().toLocaleTimeString()}`);
  document.documentElement.dataset.ready = "true";
}

async function ask_now() {
  clearTimeout(timer);
  if (asking) return;
  asking = true;
  try {
    await ask();
  } catch (error) {
    ++failures;
    if (failures > 1 || !last) show_silence(error);
    if (!(error instanceof TypeError || error.name === "TimeoutError" ||
          /^token$|^api.*: \d+$/.test(error.message)))
      console.error(error);  // of this page's own
  }
  asking = false;
  const pause = failures > 0 ? Math.min(SLOWEST, EVERY * 2 ** (failures - 1))
                             : document.hidden ? HIDDEN : EVERY;
  timer = setTimeout(ask_now, pause);
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) ask_now();
});
let resizing = 0;
new ResizeObserver(() => {
  cancelAnimationFrame(resizing);
  resizing = requestAnimationFrame(() => {
    for (const chart of charts) chart.draw();
    draw_heat();
  });
}).observe($("charts"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw_heat);
ask_now();
