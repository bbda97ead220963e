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

/** Fetches one part of a page, as the server renders it, and puts it in place. False where that failed. */
export async function refresh(holder, address) {
  let text;
  try {
    const answer = await fetch(address, { headers: { accept: "text/html" } });
    if (!answer.ok) return false;
    text = await answer.text();
  } catch {
    return false;
  }
  // The server has escaped all of it; scripts in it would not run either.
  const fresh = new DOMParser().parseFromString(text, "text/html");
  if (holder.contains(document.activeElement)) {
    const href = document.activeElement.getAttribute("href");
    holder.replaceChildren(...fresh.body.childNodes);
    [...holder.querySelectorAll("a")].find((a) => a.getAttribute("href") === href)?.focus();
  } else {
    holder.replaceChildren(...fresh.body.childNodes);
  }
  tick();
  return true;
}
