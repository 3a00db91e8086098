// What survives a reload: the conversation and the settings in this browser, the key in this tab.

const CHAT = "specstream.chat", SETTINGS = "specstream.settings", KEY = "specstream.key";

function read(storage, name, otherwise) {
  try {
    return JSON.parse(storage().getItem(name)) ?? otherwise;
  } catch { // switched off, or not ours
    return otherwise;
  }
}

function write(storage, name, value) {
  try {
    storage().setItem(name, JSON.stringify(value));
    return true;
  } catch { // full, or switched off
    return false;
  }
}

const tab = () => sessionStorage, browser = () => localStorage;

// A tab keeps its own conversation; a new tab begins with the newest one. What another version of
// the page kept, or another page, is taken as far as it can be read.
export function loadChat() {
  const turns = read(tab, CHAT, null) ?? read(browser, CHAT, []);
  return Array.isArray(turns) && turns.every(isTurn) ? turns.map(whole) : [];
}

const isTurn = (turn) => turn && ["user", "assistant"].includes(turn.role)
  && typeof turn.text === "string";

function whole(turn) {
  const { role, text, thought, runs, end, figures } = turn;
  if (role === "user") return { role, text };
  const known = Array.isArray(runs)
    && runs.every((run) => Array.isArray(run) && run.length === 2 && run.every(Number.isFinite));
  return {
    role,
    text,
    thought: typeof thought === "string" ? thought : "",
    runs: known ? runs : [],
    end: typeof end === "string" ? end : "stop",
    figures: NUMBERS.every((name) => Number.isFinite(figures?.[name])) ? figures : null,
  };
}

const NUMBERS = ["tokens", "passes", "tokens_per_pass", "tokens_per_s"];

export function saveChat(turns) {
  write(browser, CHAT, turns);
  return write(tab, CHAT, turns);
}

export const loadSettings = () => ({ system: "", temperature: "", length: "", drafts: true,
  ...read(browser, SETTINGS, {}) });
export const saveSettings = (settings) => write(browser, SETTINGS, settings);
export const loadKey = () => String(read(tab, KEY, ""));
export const saveKey = (key) => write(tab, KEY, key);
