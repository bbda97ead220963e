// The list of builds: asked anew while somebody looks at its first page.

import { refresh } from "./page.js";

const EVERY_MILLIS = 3000;

async function again() {
  const isBusy = document.hidden || document.getSelection()?.type === "Range";
  if (!isBusy) await refresh(location.pathname + location.search, "environments", "list");
  setTimeout(again, EVERY_MILLIS);
}

if (document.querySelector("#list[data-live]")) setTimeout(again, EVERY_MILLIS);

for (const select of document.querySelectorAll(".filter select")) {
  select.addEventListener("change", () => select.form.requestSubmit());
}
