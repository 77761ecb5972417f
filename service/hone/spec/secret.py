"""Texts that look like a known token: refused wherever people write, because what they write is stored and shown.

Only forms that name themselves are known here; a plain password looks like any other word.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

_KINDS: Mapping[str, re.Pattern[str]] = {
    "a private key": re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY"),
    "a Hugging Face token": re.compile(r"(?<![A-Za-z0-9])(hf|api_org)_[A-Za-z0-9]{20,}"),
    "an AWS access key": re.compile(r"(?<![A-Za-z0-9])(AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"),
    "a GitHub token": re.compile(r"(?<![A-Za-z0-9])(gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})"),
    "a GitLab token": re.compile(r"(?<![A-Za-z0-9])glpat-[A-Za-z0-9_-]{20,}"),
    "a Slack token": re.compile(r"(?<![A-Za-z0-9])xox[abeprs]-[A-Za-z0-9-]{20,}"),
    "a Google API key": re.compile(r"(?<![A-Za-z0-9])AIza[A-Za-z0-9_-]{35}"),
    "a JSON web token": re.compile(r"(?<![A-Za-z0-9])eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"),
    "an address with user-info": re.compile(r"(?<![\w+.-])(?!hf://)[A-Za-z][A-Za-z0-9+.-]*://[^\s/@?#]+@"),
}

_KEY_BLOCK = re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY.*?(-----END [A-Z0-9 ]*PRIVATE KEY-----|\Z)", re.DOTALL)


def secret_in(text: str) -> str:
    """What kind of token a text holds, as words for a sentence; empty when none is seen."""
    return next((kind for kind, pattern in _KINDS.items() if pattern.search(text)), "")


def secret_message(kind: str) -> str:
    """The sentence for it; never with the text itself."""
    return (
        f"holds what looks like {kind}, and what is written here is stored and shown: remove it, have it revoked, and "
        "let the platform give it by the name of a Secret."
    )


def hide_tokens(text: str, hidden: str) -> str:
    """The text with everything that looks like a token replaced; of a private key, all of it."""
    text = _KEY_BLOCK.sub(hidden, text)
    for pattern in _KINDS.values():
        text = pattern.sub(hidden, text)
    return text


def secrets(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Path and kind of everything in nested mappings and lists that looks like a token; never the text itself."""
    if isinstance(value, str):
        if kind := secret_in(value):
            yield path, kind
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            place = f"{path}.{name}" if path else str(name)
            if kind := secret_in(str(name)):
                yield path, kind
            yield from secrets(inner, place)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from secrets(inner, path)
