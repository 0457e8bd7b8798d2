// Asks the server every few seconds what the run says, and shows it. All that comes from a run is put in as text.

import { Chart, element } from "./chart.js";

const SECONDS = { running: 2, still: 10, lost: 5 };
const charts = new Map();
const rows = new Map();
let seen = "";
let skew = 0; // seconds by which the server's clock is ahead of this one
let last = null;
let timer = null;

const byId = (id) => document.getElementById(id);
const chosen = () => new URLSearchParams(location.search).get("run");

function write(id, text) {
  const node = byId(id);
  const content = text ?? "";
  if (node.textContent !== content) node.textContent = content;
  node.hidden = content === "";
}

function clock(seconds) {
  const then = new Date(seconds * 1000);
  const sameDay = then.toDateString() === new Date().toDateString();
  const day = sameDay ? {} : { weekday: "short", day: "numeric", month: "short" };
  return then.toLocaleString("en-GB", { ...day, hour: "2-digit", minute: "2-digit" });
}

function ago(seconds) {
  if (seconds < 90) return `${Math.max(0, Math.round(seconds))} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h ago` : `${Math.round(seconds / 86400)} days ago`;
}

function stateClass(state) {
  if (state === "running") return "state live";
  return state === "finished" ? "state" : state === "ended by an error" ? "state bad" : "state wait";
}

function showRuns(state) {
  byId("runs").hidden = state.runs.length < 2;
  const keys = state.runs.map((run) => run.key);
  for (const key of rows.keys()) {
    if (!keys.includes(key)) {
      rows.get(key).remove();
      rows.delete(key);
    }
  }
  state.runs.forEach((run, i) => {
    if (!rows.has(run.key)) rows.set(run.key, newRow(run));
    const row = rows.get(run.key);
    if (byId("rows").children[i] !== row) byId("rows").insertBefore(row, byId("rows").children[i] ?? null);
    row.toggleAttribute("data-shown", run.key === state.run?.key);
    const [, stateCell, ...cells] = row.children;
    stateCell.firstChild.textContent = run.state;
    stateCell.firstChild.className = stateClass(run.state);
    const epochs = run.epochs === null ? String(run.epoch) : `${run.epoch} of ${run.epochs}`;
    [epochs, run.validation, run.test].forEach((text, k) => (cells[k].textContent = text));
  });
}

// A run of the table; updated in place, so that its link keeps the focus.
function newRow(run) {
  const parts = run.name.split("/").flatMap((part) => ["/", element("wbr"), part]).slice(2);
  const link = element("a", { href: `?run=${run.key}` }, ...parts);
  if (run.key === chosen()) link.setAttribute("aria-current", "page");
  const cells = [1, 2, 3].map(() => element("td", { class: "num" }));
  return element("tr", {}, element("th", { scope: "row" }, link), element("td", {}, element("span")), ...cells);
}

function showRun(run, alone) {
  byId("run").hidden = false;
  byId("run-title").textContent = alone ? "Progress" : run.name;
  write("subject", run.subject);
  const done = byId("done");
  done.hidden = run.done === null || run.done === undefined;
  if (!done.hidden) done.value = run.done;
  byId("numbers").replaceChildren(
    ...run.numbers.map(([name, value, note]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, value),
        ...(note ? [element("dd", { class: "small" }, note)] : []))),
  );
  showFaults(run);
  showCharts(run.charts);
  byId("settings").replaceChildren(
    ...run.settings.map(([name, value]) => element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, value))),
  );
  write("command", run.command);
  byId("about").hidden = !run.command && !run.settings.length;
  write("path", run.path);
}

function showFaults(run) {
  const { error, skipped = [], doubts } = run;
  byId("faults").hidden = !error && !skipped.length && !doubts.length;
  const since = error && run.state === "running" ? " The run has gone on since." : "";
  write("error-where", error && `Last error: ${error.time}, ${error.place}.${since}`);
  write("error", error?.message);
  byId("trace").hidden = !error;
  write("traceback", error?.traceback);
  byId("skipped").replaceChildren(...[...doubts, ...skipped.map((s) => `Skipped. ${s}`)].map((s) => element("li", {}, s)));
}

function showCharts(wanted) {
  const keys = wanted.map((chart) => chart.key);
  for (const [key, chart] of charts) {
    if (!keys.includes(key)) {
      chart.figure.remove();
      charts.delete(key);
    }
  }
  wanted.forEach((content, i) => {
    if (!charts.has(content.key)) charts.set(content.key, new Chart());
    const { figure } = charts.get(content.key);
    if (byId("charts").children[i] !== figure) byId("charts").insertBefore(figure, byId("charts").children[i] ?? null);
    charts.get(content.key).show(content);
  });
  byId("no-charts").hidden = wanted.length > 0;
}

function showFollowing() {
  const following = byId("following");
  if (chosen()) following.replaceChildren(element("a", { href: "?" }, "Follow the latest run"));
  else following.textContent = "Below is the run that began last, of those that are running. Choose one to stay with it.";
}

function show(state) {
  write("name", state.name);
  document.title = `${state.name} – dpt_hpc watch`;
  showRuns(state);
  if (state.run) showRun(state.run, state.runs.length === 1);
  else byId("run").hidden = true;
}

// What changes by the clock alone.
function tick() {
  if (!last) return;
  const run = last.run;
  const state = byId("state");
  const text = run ? run.state : "no run here yet";
  if (state.textContent !== text) state.textContent = text;
  state.className = stateClass(text);
  const words = [];
  if (run?.reading) words.push(`reading the log, ${Math.round(100 * run.reading)} % to go`);
  if (run?.left) words.push(`ends about ${clock(Date.now() / 1000 + run.left)}`);
  if (run?.time) words.push(`last record ${run.state === "running" ? ago(Date.now() / 1000 + skew - run.time) : clock(run.time - skew)}`);
  write("end", words.join(", "));
}

async function ask() {
  clearTimeout(timer);
  let wait = SECONDS.lost;
  try {
    const query = new URLSearchParams({ seen, ...(chosen() ? { run: chosen() } : {}) });
    const answer = await fetch(`state?${query}`, { cache: "no-store" });
    if (!answer.ok) throw new Error(await answer.text());
    if (answer.status === 200) {
      last = await answer.json();
      seen = last.version;
      skew = last.now - Date.now() / 1000;
      show(last);
    }
    write("warning", "");
    byId("updated").textContent = `Asked at ${new Date().toLocaleTimeString("en-GB")}.`;
    const busy = !last.run || last.runs.some((run) => run.state === "running");
    wait = last.run?.reading ? 0.1 : busy ? SECONDS.running : SECONDS.still;
  } catch (error) {
    const lost = error instanceof TypeError;
    write("warning", lost ? "dpt-hpc watch does not answer: what is shown is the last that it said." : String(error.message));
  }
  tick();
  if (!document.hidden) timer = setTimeout(ask, 1000 * wait);
}

document.addEventListener("visibilitychange", () => document.hidden || ask());
setInterval(tick, 1000);
showFollowing();
ask();
