// The chat page: a conversation, who wrote each word of it, and what can be done about it.
// Everything a model or a person wrote goes through text nodes, so it can never become markup.

import { linesOf, blocksOf, renderBlock } from "./markdown.js";
import { answer as answered, model as described } from "./server.js";
import { loadChat, loadKey, loadSettings, saveChat, saveKey, saveSettings } from "./store.js";

const COLOURS = 5; // styles of streams in page.css
const FEWEST_TIMED = 3; // passes; the rate of fewer says nothing
const SAVE_EVERY_MS = 1000;
const SLOW_MS = 2000; // of waiting, after which the seconds are shown

const at = (id) => document.getElementById(id);
const chat = at("chat"), question = at("question"), welcome = at("welcome");
const settings = loadSettings();
let turns = loadChat(); // {role, text} and, of answers, {thought, runs, end, figures, limit}
let stopping = null; // of the answer under way
let leaving = false;
let streams = null; // how many; null until the server has said so

const styleOf = (origin) => (origin < 0 ? "lookup" : `s${((origin - 1) % COLOURS) + 1}`);

function element(name, style, text) {
  const made = document.createElement(name);
  if (style) made.className = style;
  if (text) made.textContent = text;
  return made;
}

function button(text, action, title) {
  const made = element("button", "", text);
  made.type = "button";
  if (title) made.title = title;
  made.addEventListener("click", action);
  return made;
}

// -- one answer ---------------------------------------------------------------------------------

class AnswerView {
  constructor(turn) {
    this.turn = turn;
    this.article = element("article", "assistant");
    this.waiting = this.article.appendChild(element("p", "waiting"));
    this.thought = this.article.appendChild(element("details", "thought"));
    this.summary = this.thought.appendChild(element("summary"));
    this.thoughtText = this.thought.appendChild(element("div"));
    this.body = this.article.appendChild(element("div", "body"));
    this.foot = this.article.appendChild(element("div", "foot"));
    this.shown = []; // blocks that are drawn: {from, to, nodes}
    this.began = performance.now();
    this.render();
  }

  get running() {
    return stopping?.view === this;
  }

  // Draw what has changed; blocks that nothing can change any more stay as they are.
  render() {
    const { turn } = this;
    this.thought.hidden = !turn.thought;
    if (turn.thought) {
      const thinking = this.running && !turn.text;
      this.summary.textContent = thinking ? "Thinking …" : "Thought";
      if (this.thoughtText.textContent.length !== turn.thought.length) {
        this.thoughtText.textContent = turn.thought;
      }
    }
    const blocks = blocksOf(linesOf(turn.text));
    let kept = 0;
    while (kept < blocks.length - 1 && kept < this.shown.length - 1
      && this.shown[kept].to === endOf(blocks[kept])) kept += 1;
    for (const old of this.shown.splice(kept)) old.nodes.forEach((node) => node.remove());
    for (const block of blocks.slice(kept)) {
      const before = this.body.childNodes.length;
      renderBlock(this.body, block, (parent, from, to) => this.paint(parent, from, to));
      this.shown.push({ to: endOf(block), nodes: [...this.body.childNodes].slice(before) });
    }
    this.renderWaiting();
    this.renderFoot();
  }

  // Append the text between two places, each stretch marked with who wrote it.
  paint(parent, from, to) {
    const { runs, text } = this.turn;
    let low = 0, high = runs.length;
    while (low < high) { // the first run that ends behind `from`
      const middle = (low + high) >> 1;
      if (runs[middle][0] <= from) low = middle + 1;
      else high = middle;
    }
    for (let start = from; start < to; low += 1) {
      const [end, origin] = runs[low] ?? [to, 0];
      const part = text.slice(start, Math.min(end, to));
      const word = part.trimStart();
      if (origin && word) {
        if (word !== part) parent.append(part.slice(0, part.length - word.length));
        const made = parent.appendChild(element("span", styleOf(origin), word));
        const by = origin < 0 ? "looked up in the text" : `guessed by stream ${origin}`;
        made.title = `${by}, confirmed by the model`;
      } else {
        parent.append(part);
      }
      start = Math.min(end, to);
    }
  }

  renderWaiting() {
    const { turn } = this;
    this.waiting.hidden = !this.running || Boolean(turn.text || turn.thought);
    const waited = performance.now() - this.began;
    const seconds = waited < SLOW_MS ? "" : `, ${Math.floor(waited / 1000)} s`;
    const text = `Reading the question${seconds} …`;
    if (this.waiting.textContent !== text) this.waiting.textContent = text;
  }

  renderFoot() {
    const { turn } = this;
    const parts = [];
    if (!this.running) {
      if (turn.end === "stopped") parts.push(element("strong", "", "Stopped."));
      if (turn.end === "error") parts.push(element("strong", "", "Broken off."));
      if (turn.end === "length") {
        const where = turn.text ? "Cut at the longest answer allowed" : "Cut while it was thinking";
        parts.push(element("strong", "", `${where}.`));
      }
    }
    const figures = told(turn.figures);
    if (figures) parts.push(element("span", "figures", figures));
    if (!this.running && !stopping && turns.at(-1) === turn) {
      if (turn.text && turn.end !== "stop") parts.push(button("Continue", () => goOn(this)));
      parts.push(button("Retry", retry, "At temperature 0 the answer stays the same."));
    }
    if (!this.running && turn.text) parts.push(copyButton(() => turn.text));
    this.foot.replaceChildren(...parts);
  }
}

const endOf = (block) => block.lines.at(-1).from + block.lines.at(-1).text.length;

function told(figures) {
  if (!figures) return "";
  const parts = [`${figures.tokens} token${figures.tokens === 1 ? "" : "s"}`];
  if (figures.passes >= FEWEST_TIMED) {
    parts.push(`${figures.tokens_per_s.toFixed(1)} tok/s`);
    parts.push(`${figures.tokens_per_pass.toFixed(2)} tokens per pass`);
  }
  return parts.join(" · ");
}

function take(turn, { pieces, finish, figures }) {
  for (const piece of pieces) {
    if (!piece.text) continue;
    if (piece.thought) {
      turn.thought += piece.text;
      continue;
    }
    turn.text += piece.text;
    const last = turn.runs.at(-1);
    if (last?.[1] === piece.origin) last[0] = turn.text.length;
    else turn.runs.push([turn.text.length, piece.origin]);
  }
  turn.figures = figures ?? turn.figures;
  if (finish) turn.end = finish;
}

// -- the conversation ---------------------------------------------------------------------------

function questionView(turn) {
  const article = element("article", "user");
  article.append(element("div", "bubble", turn.text));
  const foot = article.appendChild(element("div", "foot"));
  foot.append(button("Edit", () => edit(turn, article)), copyButton(() => turn.text));
  return article;
}

const views = new WeakMap(); // of turns, so that what is open or selected stays so

function articleOf(turn) {
  if (!views.has(turn)) {
    views.set(turn, turn.role === "user" ? { article: questionView(turn) } : new AnswerView(turn));
  }
  views.get(turn).renderFoot?.();
  return views.get(turn).article;
}

function showAll() {
  chat.replaceChildren(welcome, ...turns.map(articleOf));
  welcome.hidden = turns.length > 0;
  chat.scrollTop = chat.scrollHeight;
}

function say(text) {
  at("says").hidden = !text;
  at("says").textContent = text;
}

function keep() {
  if (!saveChat(turns)) say("This browser cannot keep the conversation: a reload will lose it.");
}

function messages() {
  const found = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
  for (const turn of turns) {
    const message = { role: turn.role, content: turn.text };
    if (turn.thought) message.reasoning = turn.thought;
    found.push(message);
  }
  return found;
}

function request(turn, continues) {
  const asked = { messages: messages() };
  if (continues) {
    Object.assign(asked, { continue_final_message: true, add_generation_prompt: false });
  } else {
    asked.messages.pop(); // the empty answer itself
  }
  if (settings.temperature !== "") asked.temperature = Number(settings.temperature);
  if (settings.length !== "") asked.max_tokens = Number(settings.length);
  return asked;
}

const atEnd = () => chat.scrollHeight - chat.scrollTop - chat.clientHeight < 60;

// Let the model write `turn`, the last one, which `view` shows; return the error, if any.
async function write(turn, view, continues = false) {
  const controller = new AbortController();
  const mine = { controller, view };
  stopping = mine;
  let saved = performance.now(), drawing = 0, failed = null;
  const asked = request(turn, continues);
  turn.end = "stopped"; // what a reload would find
  busy(true);
  const draw = () => {
    drawing = 0;
    const follow = atEnd();
    view.render();
    if (follow) chat.scrollTop = chat.scrollHeight;
  };
  const ticking = setInterval(() => view.renderWaiting(), 500);
  draw();
  try {
    for await (const pass of answered(asked, at("key").value, controller.signal)) {
      take(turn, pass);
      drawing ||= requestAnimationFrame(draw);
      if (performance.now() - saved > SAVE_EVERY_MS && turns.includes(turn)) {
        saved = performance.now();
        keep();
      }
    }
    keyIsFine();
  } catch (error) {
    if (!controller.signal.aborted && !leaving) {
      failed = error;
      turn.end = "error";
    }
  } finally {
    clearInterval(ticking);
    cancelAnimationFrame(drawing);
    if (stopping === mine) {
      stopping = null;
      busy(false);
    }
  }
  return failed;
}

function busy(now) {
  at("send").hidden = now;
  at("stop").hidden = !now;
  chat.setAttribute("aria-busy", String(now));
  document.body.classList.toggle("busy", now);
}

function complain(error) {
  if (error.status === 401) {
    const sent = at("key").value;
    at("key-form").hidden = false;
    at("key-says").textContent = sent
      ? "The server refuses this API key. Check it and try again."
      : "This server wants an API key.";
    at("key").setAttribute("aria-invalid", String(Boolean(sent)));
  } else {
    say(error.message);
  }
}

function keyIsFine() {
  at("key-form").hidden = true;
  at("key").removeAttribute("aria-invalid");
  saveKey(at("key").value);
}

// Ask for an answer to the conversation's last question; `restore` undoes it if nothing came.
async function ask(restore) {
  say("");
  const turn = { role: "assistant", text: "", thought: "", runs: [], end: "stopped", figures: null };
  turns.push(turn);
  const conversation = turns;
  showAll();
  const view = views.get(turn);
  const failed = await write(turn, view);
  if (conversation !== turns) return; // a new chat was begun
  const follow = atEnd();
  if (!turn.text && !turn.thought && turn.end !== "stop") {
    turns = restore();
    showAll();
  }
  view.render();
  if (follow) chat.scrollTop = chat.scrollHeight;
  keep();
  if (failed) complain(failed);
}

function send() {
  const text = question.value.trim();
  if (!text || stopping) return;
  const before = turns;
  turns = [...turns, { role: "user", text }];
  question.value = "";
  fit();
  ask(() => {
    if (!question.value) question.value = text;
    fit();
    return before;
  });
}

function retry() {
  if (stopping) return;
  const before = turns;
  turns = turns.slice(0, -1);
  ask(() => before);
}

async function goOn(view) {
  if (stopping) return;
  say("");
  const conversation = turns, { turn } = view, end = turn.end, length = turn.text.length;
  const failed = await write(turn, view, true);
  if (conversation !== turns) return;
  if (turn.text.length === length && turn.end !== "stop") turn.end = end;
  keep();
  view.render();
  if (failed) complain(failed);
}

function edit(turn, article) {
  if (stopping) return;
  const form = element("form", "edit");
  const field = form.appendChild(element("textarea"));
  field.value = turn.text;
  field.rows = Math.min(12, turn.text.split("\n").length + 1);
  field.setAttribute("aria-label", "Changed question");
  const save = form.appendChild(element("button", "main", "Ask this instead"));
  save.type = "submit";
  form.append(button("Cancel", () => {
    views.delete(turn);
    article.replaceWith(articleOf(turn));
  }));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = field.value.trim();
    if (!text || stopping) return;
    const before = turns;
    turns = [...turns.slice(0, turns.indexOf(turn)), { role: "user", text }];
    ask(() => before);
  });
  article.replaceChildren(form);
  field.focus();
}

// -- copying ------------------------------------------------------------------------------------

function copyButton(text) {
  const made = button("Copy", () => copy(text(), made));
  return made;
}

async function copy(text, from) {
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch { // not over plain HTTP from another machine
    const field = document.body.appendChild(element("textarea", "away"));
    field.value = text;
    field.select();
    done = document.execCommand("copy");
    field.remove();
    from.focus();
  }
  from.textContent = done ? "Copied" : "Cannot copy";
  setTimeout(() => { from.textContent = "Copy"; }, 1500);
}

chat.addEventListener("click", (event) => {
  const pressed = event.target.closest("button.copy");
  if (pressed) copy(pressed.closest(".code").querySelector("code").textContent, pressed);
});

// -- what the page is told ----------------------------------------------------------------------

function fit() {
  question.style.height = "auto";
  question.style.height = `${Math.min(question.scrollHeight + 2, innerHeight / 3)}px`;
}

function stop() {
  stopping?.controller.abort();
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
question.addEventListener("input", fit);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing) stop();
});
at("stop").addEventListener("click", stop);
at("clear").addEventListener("click", () => {
  stop();
  turns = [];
  say("");
  keep();
  showAll();
  question.focus();
});
addEventListener("beforeunload", () => {
  if (!stopping) return;
  keep();
  leaving = true; // the request is going to fail, which is nobody's error
  setTimeout(() => { leaving = false; }, SAVE_EVERY_MS); // if the page stays after all
});

at("settings-button").addEventListener("click", () => {
  const hidden = at("settings").toggleAttribute("hidden");
  at("settings-button").setAttribute("aria-expanded", String(!hidden));
});
for (const name of ["system", "temperature", "length"]) {
  const field = at(name);
  field.value = settings[name];
  field.addEventListener("input", () => {
    settings[name] = field.checkValidity() ? field.value : settings[name];
    field.setAttribute("aria-invalid", String(!field.checkValidity()));
    saveSettings(settings);
  });
}
at("drafts").checked = settings.drafts;
document.body.classList.toggle("drafts", settings.drafts);
at("drafts").addEventListener("change", (event) => {
  settings.drafts = event.target.checked;
  document.body.classList.toggle("drafts", settings.drafts);
  saveSettings(settings);
});

function showLegend() {
  at("explain").hidden = streams === null;
  at("legend").replaceChildren(
    ...(streams
      ? Array.from({ length: streams }, (_, n) => element("span", styleOf(n + 1), `stream ${n + 1}`))
      : [document.createTextNode("this model has no streams: nothing is guessed ahead")]),
    ...(streams ? [element("span", "more", "What is this?")] : []),
  );
}

async function describe() {
  try {
    const model = await described(at("key").value);
    at("model").textContent = model.id;
    streams = model.num_streams;
    showLegend();
    keyIsFine();
    say("");
  } catch (error) {
    complain(error);
  }
}

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  describe();
});
at("key").value = loadKey();
const cut = turns.at(-1);
if (cut?.role === "assistant" && !cut.text && !cut.thought && cut.end !== "stop") {
  turns.pop(); // reloaded before the first word: the question waits where it was typed
  question.value = turns.pop()?.text ?? "";
  fit();
}
showLegend();
showAll();
describe();
