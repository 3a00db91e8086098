"""Sections of documentation pages that a study writes itself."""

from __future__ import annotations

import re
from pathlib import Path


def set_section(page: Path, title: str, text: str, before: str) -> None:
    """Put a section into a page, in place of the one of that title, else before another one."""
    old = page.read_text(encoding="utf-8")
    section = f"## {title}\n\n{text.strip()}\n\n"
    found = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", old, re.MULTILINE | re.DOTALL)
    if found:
        new = old[: found.start()] + section + old[found.end() :]
    else:
        place = old.index(f"## {before}\n")
        new = old[:place] + section + old[place:]
    page.write_text(new.rstrip() + "\n", encoding="utf-8")
