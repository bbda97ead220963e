// One build while it runs: its lines as they come, its stages as they change. Text is only ever set as text.

import { refresh } from "./page.js";

const LINES_MAX = 5000;
const DRAW_EVERY_MILLIS = 100;
const BOTTOM_SLACK_PIXELS = 48;
const CLASSES = /^(?:[fg](?:[0-9]|1[0-5])|[bdiu])(?: (?:[fg](?:[0-9]|1[0-5])|[bdiu]))*$/;
const TITLES = {
  checkout: "Checkout Code",
  image: "Build Docker Image",
  test: "Test",
  deploy: "Deploy to Kubernetes",
  verify: "Verify Deployment",
  smoke_test: "Smoke Test",
  rollback: "Rollback",
};

const summary = document.getElementById("summary");
const log = document.getElementById("log");
const news = document.getElementById("news");
const logState = document.getElementById("log-state");
const follow = document.getElementById("follow");

const build = Number(summary.dataset.build);
let last = Number(summary.dataset.after);
let waiting = [];
let drawTimer = 0;
let lines = log.querySelectorAll(".line").length;

// Following: the page stays at the log's end until somebody scrolls up, and again once they are back there.

let isFollowing = false;
let lastScroll = scrollY;

function setFollowing(on) {
  isFollowing = on;
  follow.setAttribute("aria-pressed", String(on));
  follow.textContent = on ? "Following" : "Follow";
  if (on) toEnd();
}

function toEnd() {
  const end = log.getBoundingClientRect().bottom + scrollY - innerHeight + BOTTOM_SLACK_PIXELS / 2;
  if (end > scrollY) scrollTo({ top: end, behavior: "instant" });
  lastScroll = scrollY;
}

follow.addEventListener("click", () => setFollowing(!isFollowing));
addEventListener("scroll", () => {
  const moved = scrollY - lastScroll;
  lastScroll = scrollY;
  if (isFollowing && moved < -4) setFollowing(false);
  const isAtEnd = log.getBoundingClientRect().bottom <= innerHeight + BOTTOM_SLACK_PIXELS;
  if (!isFollowing && moved > 4 && isAtEnd && !follow.hidden) setFollowing(true);
}, { passive: true });

// Lines.

function lineNode(line) {
  const node = document.createElement("div");
  node.className = "line";
  node.id = `L${line.n}`;
  const number = document.createElement("a");
  number.href = `#L${line.n}`;
  number.textContent = line.n;
  const text = document.createElement("span");
  if (line.spans) {
    for (const span of line.spans) {
      if (CLASSES.test(span.class)) {
        const part = document.createElement("i");
        part.className = span.class;
        part.textContent = span.text;
        text.append(part);
      } else {
        text.append(span.text);
      }
    }
  } else {
    text.textContent = line.text;
  }
  node.append(number, text, "\n");
  return node;
}

function linesOf(stage, first) {
  const newest = log.querySelector(".log-stage:last-of-type");
  if (newest?.dataset.stage === stage) return newest.querySelector(".lines");
  const section = document.createElement("section");
  section.className = "log-stage";
  section.dataset.stage = stage;
  const plain = `stage-${stage}`;
  section.id = document.getElementById(plain) ? `${plain}-${first}` : plain;
  const title = document.createElement("h3");
  title.textContent = TITLES[stage] ?? stage;
  const holder = document.createElement("div");
  holder.className = "lines";
  section.append(title, holder);
  log.append(section);
  return holder;
}

function draw() {
  drawTimer = 0;
  const batch = waiting.slice(-LINES_MAX);
  waiting = [];
  if (batch.length === 0) return;
  document.getElementById("log-empty")?.remove();
  for (const line of batch) {
    linesOf(line.stage, line.n).append(lineNode(line));
    lines += 1;
  }
  if (lines > LINES_MAX) drop();
  if (isFollowing) toEnd();
}

// A browser with a million lines is a browser that hangs.
function drop() {
  for (const old of [...log.querySelectorAll(".line")].slice(0, lines - LINES_MAX)) {
    const section = old.closest(".log-stage");
    old.remove();
    if (!section.querySelector(".line")) section.remove();
  }
  lines = LINES_MAX;
  let note = document.getElementById("log-hidden");
  if (!note) {
    note = document.createElement("p");
    note.className = "note";
    note.id = "log-hidden";
    log.prepend(note);
  }
  note.textContent = `Lines before the last ${LINES_MAX} are in the raw log.`;
}

// Status: the server renders, we only ask when it says that something changed.

let isAsking = false;
let askAgain = false;

async function refreshSummary() {
  if (isAsking) {
    askAgain = true;
    return;
  }
  isAsking = true;
  do {
    askAgain = false;
    await refresh(`/builds/${build}?part=summary`, "summary");
    showStatus();
  } while (askAgain);
  isAsking = false;
}

function showStatus() {
  const head = document.querySelector("#summary .build-head");
  if (!head) return;
  const { status, word } = head.dataset;
  document.title = document.title.replace(/^[^·]*·/, `${word} ·`);
  document.querySelector("link[rel=icon]").href = `/favicon.svg?status=${encodeURIComponent(status)}`;
}

function say(text) {
  if (news.textContent !== text) news.textContent = text;
}

// The stream. A line that came already is not drawn twice, whatever the browser asked for when it came back.

function listen() {
  const source = new EventSource(`/api/builds/${build}/log/live?after=${last}`);
  source.addEventListener("open", () => {
    logState.textContent = "Live";
    logState.classList.add("is-live");
  });
  source.addEventListener("error", () => {
    logState.textContent = "Connection lost, trying again …";
    logState.classList.remove("is-live");
    // A refused stream is closed for good by browsers: the agent may only be restarting.
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, 3000);
  });
  source.addEventListener("message", (event) => {
    const line = JSON.parse(event.data);
    if (line.n <= last) return;
    last = line.n;
    waiting.push(line);
    if (waiting.length > 2 * LINES_MAX) waiting = waiting.slice(-LINES_MAX);
    drawTimer ||= setTimeout(draw, DRAW_EVERY_MILLIS);
  });
  source.addEventListener("stage", (event) => {
    const stage = JSON.parse(event.data);
    say(`${stage.title}: ${stage.status}`);
    if (stage.status === "running") logState.textContent = `Live: ${stage.title}`;
  });
  source.addEventListener("build", refreshSummary);
  source.addEventListener("end", (event) => {
    source.close();
    draw();
    logState.textContent = "";
    logState.classList.remove("is-live");
    follow.hidden = true;
    setFollowing(false);
    say(`Build ${build} ${JSON.parse(event.data).status}`);
    refreshSummary();
  });
}

if (summary.hasAttribute("data-live")) {
  follow.hidden = false;
  setFollowing(false);
  listen();
}
