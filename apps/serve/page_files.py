"""The files of the chat page: what is served at which path, to anybody."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "page"
PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    **{
        f"/{name}.js": (f"{name}.js", "text/javascript")
        for name in ("page", "markdown", "server", "store")
    },
}
"""File and media type by path."""
