"""The chat page: one file, nothing from elsewhere, and no text that becomes markup."""

from __future__ import annotations

import base64
import hashlib

STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 46rem; margin: 0 auto; padding: 1rem; display: flex; flex-direction: column;
  min-height: calc(100vh - 2rem) }
h1 { font-size: 1rem; margin: 0 0 .5rem }
#log { flex: 1 }
.message { white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0; padding: .5rem .75rem;
  border-radius: .5rem; border: 1px solid color-mix(in srgb, currentColor 20%, transparent) }
.user { margin-left: 3rem; background: color-mix(in srgb, currentColor 7%, transparent) }
.error { border-color: #c33 }
form { position: sticky; bottom: 0; padding: .5rem 0; background: Canvas }
textarea { width: 100%; box-sizing: border-box; font: inherit; padding: .5rem }
details { margin-bottom: .5rem }
label { margin-right: 1rem }
input { font: inherit; width: 6rem }
#key { width: 12rem }
button { font: inherit; padding: .25rem 1rem }
"""

SCRIPT = """
"use strict";
const find = id => document.getElementById(id);
let messages = [], running = null;

function show(role, text) {
  const box = document.createElement("div");
  box.className = "message " + role;
  box.textContent = text;
  find("log").append(box);
  box.scrollIntoView({block: "end"});
  return box;
}

function headers() {
  const key = find("key").value.trim();
  return key ? {Authorization: "Bearer " + key} : {};
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\\n\\n");
    held = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

async function read(response, box) {
  let text = "", ended = false;
  for await (const data of events(response)) {
    if (data === "[DONE]") { ended = true; break; }
    const found = JSON.parse(data);
    if (found.error) throw new Error(found.error.message);
    for (const choice of found.choices) text += choice.delta.content || "";
    box.textContent = text;
    box.scrollIntoView({block: "end"});
  }
  if (!ended) throw new Error("the server ended the answer early");
}

async function send() {
  const text = find("text").value;
  if (!text.trim() || running) return;
  find("text").value = "";
  const chat = messages;
  chat.push({role: "user", content: text});
  show("user", text);
  const box = show("assistant", "");
  running = new AbortController();
  find("send").textContent = "Stop";
  try {
    const body = {messages: chat, stream: true, temperature: Number(find("temperature").value)};
    if (find("tokens").value) body.max_tokens = Number(find("tokens").value);
    const response = await fetch("v1/chat/completions", {
      method: "POST", body: JSON.stringify(body), signal: running.signal,
      headers: {"Content-Type": "application/json", ...headers()},
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    await read(response, box);
  } catch (error) {
    if (error.name !== "AbortError") show("error", error.message);
  } finally {
    if (box.textContent) {
      chat.push({role: "assistant", content: box.textContent});
    } else {
      chat.pop();
      box.remove();
    }
    running = null;
    find("send").textContent = "Send";
  }
}

find("form").addEventListener("submit", event => {
  event.preventDefault();
  if (running) running.abort(); else send();
});
find("text").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
find("clear").addEventListener("click", () => {
  if (running) running.abort();
  messages = [];
  find("log").replaceChildren();
});
"""

PAGE = f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Chat</title>
<style>{STYLE}</style>
<h1>Chat</h1>
<main id="log" aria-live="polite"></main>
<form id="form">
<details><summary>Settings</summary>
<label>Temperature <input id="temperature" type="number" min="0" step="0.1" value="0.8"></label>
<label>Most tokens <input id="tokens" type="number" min="1"></label>
<label>API key <input id="key" type="password" autocomplete="off"></label>
<button id="clear" type="button">New chat</button>
</details>
<textarea id="text" rows="3" aria-label="Message" autofocus></textarea>
<button id="send">Send</button>
</form>
<script>{SCRIPT}</script>
</html>
"""


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_source(SCRIPT)}; style-src {_source(STYLE)}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
