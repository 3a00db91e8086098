// The chat page: asks the server it came from, shows who proposed each word, and can stop.
// Everything a model or a person wrote goes through textContent, so it can never become markup.
"use strict";

const COLOURS = 5; // styles of streams in page.css

const at = (id) => document.getElementById(id);
const chat = at("chat"), question = at("question"), key = at("key");
let messages = [];
let stopping = null; // of the request under way
let shownStreams = 0;

const styleOf = (origin) => (origin ? `s${((origin - 1) % COLOURS) + 1}` : "s0");

function element(name, style, text) {
  const made = document.createElement(name);
  if (style) made.className = style;
  made.textContent = text;
  return made;
}

function article(style, text) {
  const made = chat.appendChild(element("article", style, text));
  made.scrollIntoView({ block: "end" });
  return made;
}

function headers() {
  const found = { "Content-Type": "application/json" };
  if (key.value) found.Authorization = `Bearer ${key.value}`;
  return found;
}

async function complaint(response) {
  if (response.status === 401) {
    key.hidden = false;
    key.focus();
  }
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with status ${response.status}.`;
  }
}

// Yield the objects of a stream of server-sent events.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      const data = part.slice(6);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function showFigures(figures) {
  at("figures").textContent =
    `${figures.tokens_per_s.toFixed(1)} tok/s · ${figures.tokens_per_pass.toFixed(2)} tokens/pass`;
}

function showLegend(streams) {
  if (streams === shownStreams) return;
  shownStreams = streams;
  at("legend").replaceChildren(
    element("span", "s0", "main"),
    ...Array.from({ length: streams }, (_, n) => element("span", styleOf(n + 1), ` stream ${n + 1}`)),
  );
}

async function answer(place) {
  stopping = new AbortController();
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: headers(),
    body: JSON.stringify({ messages, stream: true, draft_details: true }),
    signal: stopping.signal,
  });
  if (!response.ok) throw new Error(await complaint(response));
  for await (const chunk of events(response.body)) {
    if (chunk.error) throw new Error(chunk.error.message);
    const [choice] = chunk.choices;
    if (!choice || !choice.specstream) continue;
    const low = chat.scrollHeight - chat.scrollTop - chat.clientHeight < 40;
    for (const piece of choice.specstream.pieces) {
      if (piece.text) place.appendChild(element("span", styleOf(piece.origin), piece.text));
    }
    showFigures(choice.specstream);
    if (low) chat.scrollTop = chat.scrollHeight;
  }
}

function busy(now) {
  at("send").hidden = now;
  at("stop").hidden = !now;
}

async function ask() {
  const text = question.value.trim();
  if (!text || stopping) return;
  question.value = "";
  messages.push({ role: "user", content: text });
  const asked = article("user", text);
  const place = article("assistant", "");
  const conversation = messages;
  busy(true);
  try {
    await answer(place);
  } catch (error) {
    if (error.name !== "AbortError") article("error", error.message);
  } finally {
    stopping = null;
    busy(false);
  }
  if (conversation !== messages) return; // a new chat was begun
  if (place.textContent) {
    messages.push({ role: "assistant", content: place.textContent });
  } else { // nothing came, so nothing was asked
    messages.pop();
    asked.remove();
    place.remove();
    if (!question.value) question.value = text;
  }
  question.focus();
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask();
  }
});
at("stop").addEventListener("click", () => stopping && stopping.abort());
at("clear").addEventListener("click", () => {
  if (stopping) stopping.abort();
  messages = [];
  chat.replaceChildren();
  at("figures").textContent = "";
});
at("drafts").addEventListener("change", (event) => {
  document.body.classList.toggle("drafts", event.target.checked);
});
document.body.classList.add("drafts");

async function describe() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (!response.ok) {
    await complaint(response);
    return;
  }
  const [model] = (await response.json()).data;
  at("model").textContent = model.id;
  showLegend(model.num_streams);
}
key.addEventListener("change", describe);
describe();
