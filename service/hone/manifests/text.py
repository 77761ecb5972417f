"""Objects as YAML that people read and that every parser reads alike.

Block style, keys in the order given, long texts as literal blocks. A text that any YAML version could take for a
number, a date or a truth is quoted: kubectl's parser and Python's do not agree on `1e3`, `y` or `0o7`.
"""

import re
from collections.abc import Sequence
from typing import Any

import yaml

_PLAIN = re.compile(r"[A-Za-z/].*|[0-9]+([KMGT]i|m)")
_UNSEEN = re.compile(r"[^\n\x20-\x7e\xa1-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
"""Control characters and all but one of the line breaks: escaped between double quotes, nothing else keeps them."""
_WORDS = re.compile(r"y|n|yes|no|on|off|true|false|null|nan|inf", re.IGNORECASE)
WIDTH = 10_000
"""Columns: lines are never folded."""


def to_yaml(objects: Sequence[dict[str, Any]]) -> str:
    """One document for each object. The same objects give the same bytes."""
    return yaml.dump_all(
        objects,
        Dumper=_Dumper,
        default_flow_style=False,
        sort_keys=False,
        allow_unicode=True,
        width=WIDTH,
        explicit_start=len(objects) > 1,
    )


class _Dumper(yaml.SafeDumper):
    """No anchors: what is given twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=_style(text))


def _style(text: str) -> str | None:
    """Between double quotes, or as a literal block, or plain where the emitter finds that it can be."""
    if _UNSEEN.search(text):
        return '"'
    if "\n" in text:
        return "|"
    return None if _PLAIN.fullmatch(text) and not _WORDS.fullmatch(text) else '"'


_Dumper.add_representer(str, _text)
