"""What a person starts: the terminal chat and the server."""
