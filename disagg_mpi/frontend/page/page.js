// Asks the server for its state twice a second while somebody looks, and shows it.
//
// A server that goes away leaves the last state, greyed, until it or another one answers. The API key, if the
// server needs one, is asked for once and kept in this tab's session alone.

import { byId, setText } from "./dom.js";
import { PromptBox } from "./prompt.js";
import { View } from "./view.js";

const STATE = new URL("state", import.meta.url);
const EVERY_MS = 500;
const AGAIN_MS = 1500;
const PATIENCE_MS = 8000;
const KEY = "disagg_mpi.api-key";

const view = new View();

const sleep = (milliseconds) => new Promise((resolve) => { setTimeout(resolve, milliseconds); });

const once = (target, event) => new Promise((resolve) => {
  target.addEventListener(event, resolve, { once: true });
});

function headers() {
  const key = sessionStorage.getItem(KEY);
  return key === null ? {} : { authorization: `Bearer ${key}` };
}

async function askForKey() {
  const form = byId("key-form");
  if (sessionStorage.getItem(KEY) !== null) setText(byId("key-problem"), "The server does not take that key.");
  sessionStorage.removeItem(KEY);
  setText(byId("health"), "needs its API key");
  document.body.classList.add("locked");
  form.hidden = false;
  byId("key").focus();
  await once(form, "submit");
  sessionStorage.setItem(KEY, byId("key").value.trim());
  byId("key").value = "";
}

function showGone() {
  document.body.classList.add("gone");
  byId("gone").hidden = false;
  setText(byId("health"), "gone");
  byId("health").className = "pill bad";
}

function showBack() {
  document.body.classList.remove("gone", "locked");
  byId("gone").hidden = true;
  byId("key-form").hidden = true;
}

// The server's state; `null` where it does not answer, `401` where it wants a key.
async function ask() {
  try {
    const response = await fetch(STATE, {
      headers: headers(), cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    if (response.status === 401) return 401;
    return response.ok ? await response.json() : null;
  } catch {
    return null;
  }
}

byId("key-form").addEventListener("submit", (event) => event.preventDefault());
new PromptBox(headers);

for (;;) {
  if (document.hidden) await once(document, "visibilitychange");
  const state = await ask();
  if (state === 401) {
    await askForKey();
    continue;
  }
  if (state === null) {
    showGone();
  } else {
    showBack();
    view.show(state);
  }
  await sleep(state === null ? AGAIN_MS : EVERY_MS);
}
