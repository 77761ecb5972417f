"""Keep secrets out of what is written for others: events, failures, records, printed lines.

Called wherever the trainer writes such a thing. What is known as a secret: values of variables of the environment whose
names say so, passwords in addresses, and whatever names itself as a token. Workers are not handed these variables at
all, so that no library can write them down.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, unquote

from hone.spec.secret import hide_tokens

HIDDEN = "***"
MIN_LENGTH = 6
"""Shorter values are words such as `true`; hiding them would garble every text."""

_NAMES = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|API_?KEY|ACCESS_KEY(_ID)?|PRIVATE_KEY)(_|$)"
)
_PLACES = ("_FILE", "_PATH", "_DIR", "_URI", "_URL")
"""Such a variable says where a secret lies; an address may still hold one."""
_ACCESS_KEY_ID = "AWS_ACCESS_KEY_ID"
_USER_INFO = re.compile(r"((?<![A-Za-z0-9+.-])(?!hf:)[A-Za-z][A-Za-z0-9+.-]*://)([^\s/@]+)@")
"""`hf://gpt2@main` names a revision; everywhere else a user stands there."""


def is_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret."""
    upper = name.upper()
    return bool(_NAMES.search(upper)) and not upper.endswith(_PLACES)


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without its secrets, and without addresses that hold a password."""
    return {name: value for name, value in environment.items() if not is_secret(name) and not _USER_INFO.search(value)}


class Scrubber:
    """Takes the secrets of one environment out of texts."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        shown = {secret: HIDDEN for secret in _secrets(environment)}
        if key := environment.get(_ACCESS_KEY_ID, ""):
            shown[key] = f"{key[:4]}{HIDDEN}"  # enough to tell two keys apart, which is what messages need it for
        self._shown = {text: hidden for text, hidden in shown.items() if len(text) >= MIN_LENGTH}
        longest_first = sorted(self._shown, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def text(self, text: str) -> str:
        """The text without secrets."""
        if self._pattern:
            text = self._pattern.sub(lambda match: self._shown[match[0]], text)
        return hide_tokens(_USER_INFO.sub(rf"\1{HIDDEN}@", text), HIDDEN)

    def value(self, value: Any) -> Any:
        """Nested mappings and lists without secrets; keys and numbers stay."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {key: self.value(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(inner) for inner in value]
        return value


def _secrets(environment: Mapping[str, str]) -> Iterator[str]:
    for name, value in environment.items():
        if is_secret(name):
            yield from (value, quote(value, safe=""))
        for _, info in _USER_INFO.findall(value):
            user, _, password = info.partition(":")
            secret = password or user  # a token may stand alone
            yield from (secret, unquote(secret))
