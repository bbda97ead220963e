// What every page shares: times that stay true, and putting a fresh part of a page in place of the old one.

const SECOND = 1000;

/** The same words as `human_duration` in builds.rs. */
export function duration(millis) {
  const s = Math.floor(Math.max(millis, 0) / SECOND);
  if (millis < SECOND) return `${Math.max(millis, 0)} ms`;
  if (s < 60) return `${s}.${Math.floor((millis % SECOND) / 100)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
}

/** The same words as `ago` in dashboard/views.rs. */
export function ago(millis) {
  const s = Math.floor(millis / SECOND);
  if (s < 5) return "just now";
  if (s < 60) return `${s} s ago`;
  if (s < 3600) return `${Math.floor(s / 60)} min ago`;
  if (s < 172800) return `${Math.floor(s / 3600)} h ago`;
  return `${Math.floor(s / 86400)} d ago`;
}

function tick() {
  const now = Date.now();
  for (const time of document.querySelectorAll("time[data-at]")) {
    time.textContent = ago(now - Number(time.dataset.at));
  }
  for (const span of document.querySelectorAll("[data-since]")) {
    // Whole seconds while it runs: tenths would only flicker.
    const millis = Math.max(now - Number(span.dataset.since), 0);
    span.textContent = millis < 60 * SECOND ? `${Math.floor(millis / SECOND)} s` : duration(millis);
  }
}

tick();
setInterval(tick, SECOND);

/** Asks for a page, as the server renders it, and puts the parts of it with these ids in place of the old ones. */
export async function refresh(address, ...ids) {
  let text;
  try {
    const answer = await fetch(address, { headers: { accept: "text/html" } });
    if (!answer.ok) return;
    text = await answer.text();
  } catch {
    return;
  }
  // The server has escaped all of it; scripts in it would not run either.
  const fresh = new DOMParser().parseFromString(text, "text/html");
  for (const id of ids) {
    const old = document.getElementById(id);
    const next = fresh.getElementById(id);
    if (!old || !next) continue;
    const focused = old.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
    old.replaceWith(next);
    if (focused) [...next.querySelectorAll("a")].find((a) => a.getAttribute("href") === focused)?.focus();
  }
  tick();
}
