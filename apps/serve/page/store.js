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

// A tab keeps its own conversation; a new tab begins with the newest one.
export function loadChat() {
  const turns = read(tab, CHAT, null) ?? read(browser, CHAT, []);
  const known = (turn) => turn && ["user", "assistant"].includes(turn.role)
    && typeof turn.text === "string";
  return Array.isArray(turns) && turns.every(known) ? turns : [];
}

export function saveChat(turns) {
  write(browser, CHAT, turns);
  return write(tab, CHAT, turns);
}

export const loadSettings = () => ({ system: "", temperature: "", length: "", drafts: true,
  ...read(browser, SETTINGS, {}) });
export const saveSettings = (settings) => write(browser, SETTINGS, settings);
export const loadKey = () => String(read(tab, KEY, ""));
export const saveKey = (key) => write(tab, KEY, key);
