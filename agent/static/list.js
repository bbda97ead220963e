// The list of builds: asked anew while somebody looks at its first page.

import { refresh } from "./page.js";

const EVERY_MILLIS = 3000;
const holder = document.getElementById("live");

async function again() {
  const isBusy = document.hidden || document.getSelection()?.type === "Range";
  if (!isBusy) {
    const address = new URL(location.href);
    address.hash = "";
    address.searchParams.set("part", "live");
    await refresh(holder, address);
  }
  setTimeout(again, EVERY_MILLIS);
}

if (holder?.hasAttribute("data-live")) setTimeout(again, EVERY_MILLIS);

for (const select of document.querySelectorAll(".filter select")) {
  select.addEventListener("change", () => select.form.requestSubmit());
}
