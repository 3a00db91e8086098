"""`specstream chat`: the terminal chat.

cli ──► app ──► session   asks the model, keeps conversation and cache in step
         │ ├──► commands  what a line that starts with / does; reports, listing: its tables
         │ ├──► reader    where lines come from: line editor or pipe
         │ └──► view      where answers go: live terminal or plain text
         │       └──► markdown, live_region, drafts, status, text
         └──► paths       where conversations and line history are kept

What a conversation is, and how much of the KV cache it can use again, is in `apps/`, for the
server as well.
"""
