"""docs/api.md lists exactly what the server sends, asks and counts."""

import re
from pathlib import Path

from hone import metrics
from hone.rpc.auth import VERBS
from hone.rpc.status import CODES

PAGE = (Path(__file__).parents[2] / "docs/api.md").read_text()


def test_every_reason_is_listed_with_its_code() -> None:
    listed = dict(re.findall(r"^\| ([A-Z_]+) \| ([A-Z_]+) \|", PAGE, flags=re.MULTILINE))
    assert listed == {kind.reason: code.name for kind, code in CODES.items()}


def test_every_call_is_listed_with_the_right_that_it_needs() -> None:
    rows = re.findall(r"^\| (create|get|list) \| (.+) \|", PAGE, flags=re.MULTILINE)
    listed = {call.removesuffix(" of a namespace"): verb for verb, calls in rows for call in calls.split(", ")}
    assert listed.pop("ListEvents of a job") == "get"
    assert listed == VERBS


def test_every_metric_is_listed() -> None:
    listed = set(re.findall(r"^\| (hone_[a-z_]+) \|", PAGE, flags=re.MULTILINE))
    counted = [metric for metric in vars(metrics).values() if hasattr(metric, "describe")]
    described = [family for metric in counted if not isinstance(metric, type) for family in metric.describe()]
    names = {f"{family.name}_total" if family.type == "counter" else family.name for family in described}
    assert listed == names | {"hone_jobs", "hone_up"}
