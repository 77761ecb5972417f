"""docs/api.md lists exactly the reasons and codes that the server sends."""

import re
from pathlib import Path

from hone.rpc.status import CODES

PAGE = (Path(__file__).parents[2] / "docs/api.md").read_text()


def test_every_reason_is_listed_with_its_code() -> None:
    listed = dict(re.findall(r"^\| ([A-Z_]+) \| ([A-Z_]+) \|", PAGE, flags=re.MULTILINE))
    assert listed == {kind.reason: code.name for kind, code in CODES.items()}
