"""`specstream serve`: an OpenAI-compatible server, and a page to chat in a browser.

A request's way through the files:

guard ──► endpoints ──► body, schema      who may ask; JSON that is what the description says
              │ ├─────► prompt, settings  messages to token ids; how tokens are to be drawn
              │ └─────► engine ──► decoding (interleaved)   one thread owns the model
              ▼              ▲          └──► prefixes       KV caches shared between requests
           replies ◄─ work ──┘                              tokens and text to OpenAI's JSON
              └──► tool_calls

`app` puts it together, `run` starts and stops it, `openapi` describes it, `metrics` counts, and
`page/` is the web page. What a conversation's KV cache is, is in `apps/`, as for the chat.
"""
