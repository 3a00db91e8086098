// node clients.mjs CLIENT TALKING CALLING: asks both servers by one client, prints what came as JSON.
import Anthropic from "@anthropic-ai/sdk";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, stepCountIs, streamText, tool } from "ai";
import OpenAI from "openai";
import { z } from "zod";

globalThis.AI_SDK_LOG_WARNINGS = false;
const [client, talking, calling] = process.argv.slice(2);
const apiKey = "a-test-key";
const parameters = { type: "object", properties: { a: { type: "integer" }, b: { type: "string" } } };
const messages = [{ role: "user", content: "hello" }];

async function drained(stream) {
  for await (const _ of stream);
  return stream;
}

async function refusal(asking) {
  try {
    await asking();
  } catch (error) {
    return error.message;
  }
}

const openai = (url) => new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0 });
const anthropic = (url) => new Anthropic({ baseURL: url, apiKey, maxRetries: 0 });

async function chat() {
  const tools = [{ type: "function", function: { name: "add", parameters } }];
  const { completions } = openai(calling).chat;
  const whole = await openai(talking).chat.completions.create({ model: "parrot", messages });
  const stream = await drained(completions.stream({ model: "caller", messages, tools }));
  const { message } = (await stream.finalChatCompletion()).choices[0];
  const made = message.tool_calls[0];
  const turns = [...messages, message, { role: "tool", tool_call_id: made.id, content: "3" }];
  const again = await completions.create({ model: "caller", messages: turns, tools });
  return {
    text: whole.choices[0].message.content,
    calls: [made, again.choices[0].message.tool_calls[0]].map((one) => JSON.parse(one.function.arguments)),
  };
}

async function responses() {
  const tools = [{ type: "function", name: "add", parameters, strict: false }];
  const whole = await openai(talking).responses.create({ model: "parrot", input: "hello" });
  const api = openai(calling).responses;
  const stream = await drained(api.stream({ model: "caller", input: "hello", tools }));
  const { id, output } = await stream.finalResponse();
  const input = [{ type: "function_call_output", call_id: output[1].call_id, output: "3" }];
  const again = await api.create({ model: "caller", input, tools, previous_response_id: id });
  return {
    text: whole.output_text,
    calls: [output[1], again.output[1]].map((one) => JSON.parse(one.arguments)),
  };
}

async function anthropics() {
  const options = { model: "caller", max_tokens: 300, tools: [{ name: "add", input_schema: parameters }] };
  const asked = { model: "parrot", max_tokens: 300, messages };
  const whole = await anthropic(talking).messages.create(asked);
  const api = anthropic(calling).messages;
  const { content } = await (await drained(api.stream({ ...options, messages }))).finalMessage();
  const result = [{ type: "tool_result", tool_use_id: content[1].id, content: "3" }];
  const turns = [...messages, { role: "assistant", content }, { role: "user", content: result }];
  const again = await api.create({ ...options, messages: turns });
  return { text: whole.content[0].text, calls: [content[1].input, again.content[1].input] };
}

// The Vercel AI SDK, over one of its providers. It runs the tool itself and asks again.
async function vercel(provider) {
  const execute = async ({ a }) => a + 2;
  const tools = { add: tool({ inputSchema: z.object({ a: z.number(), b: z.string() }), execute }) };
  const loop = { model: provider(calling)("caller"), prompt: "hello", tools, maxRetries: 0 };
  const whole = await generateText({ model: provider(talking)("parrot"), prompt: "hello", maxRetries: 0 });
  const steps = (await generateText({ ...loop, stopWhen: stepCountIs(2) })).steps;
  const stream = streamText({ ...loop, stopWhen: stepCountIs(2) });
  await drained(stream.fullStream);
  const content = [{ type: "image", image: new Uint8Array([137, 80, 78, 71]), mediaType: "image/png" }];
  const image = { model: provider(talking)("parrot"), messages: [{ role: "user", content }], maxRetries: 0 };
  return {
    text: whole.text,
    calls: [...steps, ...(await stream.steps)].map((step) => step.toolCalls[0].input),
    refusal: await refusal(() => generateText(image)),
  };
}

const clients = {
  "openai chat": chat,
  "openai responses": responses,
  anthropic: anthropics,
  "vercel openai": () => vercel((url) => createOpenAI({ baseURL: `${url}/v1`, apiKey })),
  "vercel openai chat": () => vercel((url) => createOpenAI({ baseURL: `${url}/v1`, apiKey }).chat),
  "vercel openai-compatible": () =>
    vercel((url) => createOpenAICompatible({ name: "specstream", baseURL: `${url}/v1`, apiKey })),
  "vercel anthropic": () => vercel((url) => createAnthropic({ baseURL: `${url}/v1`, apiKey })),
};
console.log(JSON.stringify(await clients[client]()));
