"""OpenAI's Responses API over the chat: `request` in, `reply` out, `store` between two turns."""
