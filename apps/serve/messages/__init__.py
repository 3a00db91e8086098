"""Anthropic's Messages API over the chat: `request` in, `reply` out."""
