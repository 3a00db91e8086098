// What the page asks the server that it came from.

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function headers(key) {
  const found = { "Content-Type": "application/json" };
  if (key) found.Authorization = `Bearer ${key}`;
  return found;
}

async function asked(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  let message = `The server answered with status ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch { /* a proxy's page, perhaps */ }
  throw new Refused(response.status, message);
}

// Return what /v1/models says of the one model.
export async function model(key) {
  const response = await asked("/v1/models", { headers: headers(key) });
  return (await response.json()).data[0];
}

// Yield {pieces, finish, figures} for every pass of an answer; pieces are {text, origin, thought}.
export async function* answer(request, key, signal) {
  const response = await asked("/v1/chat/completions", {
    method: "POST",
    headers: headers(key),
    body: JSON.stringify({ ...request, stream: true, draft_details: true }),
    signal,
  });
  for await (const chunk of events(response.body)) {
    if (chunk.error) throw new Error(chunk.error.message);
    const [choice] = chunk.choices;
    if (!choice) continue;
    const { content, reasoning } = choice.delta;
    const plain = [
      ...(reasoning ? [{ text: reasoning, origin: 0, thought: true }] : []),
      ...(content ? [{ text: content, origin: 0 }] : []),
    ];
    yield {
      pieces: choice.specstream?.pieces ?? plain,
      finish: choice.finish_reason,
      figures: choice.specstream,
    };
  }
}

// Yield the objects of a stream of server-sent events.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection was lost before the answer was complete.");
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
