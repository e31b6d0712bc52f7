"""Whom a flow tells of its end: a command, or an address that takes JSON."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

SCHEMES = ("http", "https")
HIDDEN = "***"

# Words of a command, or a URL.
Notify = tuple[str, ...] | str


def check_notify(given: Any) -> Notify | None:
    """The hook as it is used; raises ValueError for what is neither a command nor a URL, without repeating it."""
    if given is None:
        return None
    if isinstance(given, list | tuple):
        words = tuple(given)
        if not words or not all(isinstance(word, str) for word in words) or not words[0].strip():
            raise ValueError("a command is a list of words, the program first, as in [python, tell.py]")
        return words
    if not (isinstance(given, str) and _is_url(given)):
        raise ValueError(
            "it is neither a URL, https://HOST/PATH, nor a command, which is a list of words: [python, tell.py]"
        )
    return given


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def hidden(notify: Notify) -> Notify:
    """The hook as it may be shown: arguments, paths and passwords may hold secrets."""
    if isinstance(notify, tuple):
        return (notify[0], HIDDEN) if len(notify) > 1 else notify
    parts = urlsplit(notify)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{host}{port}/{HIDDEN}"
