"""`specstream serve`: a server for OpenAI's and Anthropic's clients, and a page to chat in a browser.

A request's way through the files:

guard ──► endpoints ──► body, schema      who may ask; JSON that is what the description says
              │ ├─────► prompt, settings  messages to token ids; how tokens are to be drawn
              │ └─────► engine ──► scheduler ──► request_state one thread owns the model; one answer
              ▼              ▲          └──► prefixes     KV caches shared between requests
   answering, replies ◄ request ┘                         passes to OpenAI's JSON and events
              └──► tool_calls

`responses/` and `messages/` are two further APIs over the same chat: `request` makes a chat request of
theirs, `reply` makes their events of an answer's `blocks`.

`forced_calls` is the grammar of answers that must call a tool, `grammars` compiles and keeps grammars;
`timed` does in another process what somebody's text could prolong for ever. `app` puts it together,
`run` starts and stops it, `connections` bounds its sockets, `refusals` says what is wrong with a request,
`following` is what the leader of several processes tells those that decode along,
`disconnect` ends what nobody waits for, `openapi` describes it, `metrics` counts, and `page/` is the web
page. What a conversation's KV cache is, is in `apps/`, as for the chat.
"""
