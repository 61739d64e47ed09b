// The present and past activity of the service, read from its metrics while the tab is visible.

import { call } from "./api.js";
import { drawBars } from "./chart.js";
import { byId } from "./dom.js";
import { histogram, parseMetrics, quantileBound, total } from "./metrics.js";
import { count, duration } from "./words.js";

const EVERY_MS = 2000;
const GIVE_UP_MS = 10_000;

/** Start to update; stops while the tab is hidden. */
export function watchService() {
  let before = null;
  let looking = false;
  const look = async () => {
    if (document.hidden || looking) return;
    looking = true;
    try {
      const answer = await call("metrics", { background: true, signal: AbortSignal.timeout(GIVE_UP_MS) });
      const metrics = parseMetrics(await answer.text());
      const now = { at: performance.now(), rowSteps: total(metrics, "iddpm_row_steps_total") };
      const sameProcess = before && now.rowSteps >= before.rowSteps; // otherwise it is another process
      show(metrics, sameProcess ? (1000 * (now.rowSteps - before.rowSteps)) / (now.at - before.at) : null);
      before = now;
    } catch (error) {
      before = null;
      if ([403, 404].includes(error.status)) { // a proxy keeps the metrics to itself
        showLoad("unknown", "");
        for (const part of document.querySelectorAll(".live > dl, .live > figure")) part.hidden = true;
        clearInterval(timer);
        document.removeEventListener("visibilitychange", look);
      } else if (error.name === "TimeoutError") { // it may be that running streams use all connections of the browser
        showLoad("unknown", `No news for ${duration(GIVE_UP_MS / 1000)}`);
      } else showLoad("away", error.status === 401 ? "A key is needed" : "The service does not answer");
    } finally {
      looking = false;
    }
  };
  document.addEventListener("visibilitychange", look);
  const timer = setInterval(look, EVERY_MS);
  look();
}

function show(metrics, rate) {
  const waiting = total(metrics, "iddpm_images_waiting") + total(metrics, "iddpm_images_evicted");
  const running = total(metrics, "iddpm_images_running");
  const remaining = total(metrics, "iddpm_remaining_row_steps");
  const busy = waiting + running > 0;
  const untilIdle = busy ? (rate > 0 ? `≈ ${duration(remaining / rate)}` : "…") : "–";
  byId("waiting").textContent = waiting;
  byId("running").textContent = running;
  byId("until-idle").textContent = untilIdle;
  byId("rate").textContent = rate === null ? "…" : Math.round(rate);
  const eta = busy && rate > 0 ? `, idle in ${untilIdle}` : "";
  if (!total(metrics, "iddpm_ready")) showLoad("away", "Not ready");
  else showLoad(busy ? "busy" : "idle", busy ? `${running} running, ${waiting} waiting${eta}` : "Idle");
  showLatency(histogram(metrics, "iddpm_request_duration_seconds"));
  showRows(metrics);
}

function showLoad(state, text) {
  byId("lamp").dataset.state = state;
  byId("load").textContent = text;
}

function showLatency(buckets) {
  const all = buckets.reduce((sum, { count }) => sum + count, 0);
  const within = (part) => {
    const bound = quantileBound(buckets, part);
    return bound === Infinity ? "longer than shown" : `within ${duration(bound)}`;
  };
  byId("latency-summary").textContent = all ? `half ${within(0.5)}, 95 % ${within(0.95)}` : "none yet";
  drawBars(byId("latency"), buckets, "Requests by latency in seconds");
}

function showRows(metrics) {
  const calls = total(metrics, "iddpm_rows_per_network_call_count");
  const mean = total(metrics, "iddpm_rows_per_network_call_sum") / calls;
  byId("rows-summary").textContent = calls ? `${mean.toFixed(1)} on average of ${count(calls, "call")}` : "none yet";
  drawBars(byId("rows"), histogram(metrics, "iddpm_rows_per_network_call"), "Network calls by rows");
}
