"""Write the platform's configuration (hone.cluster.Cluster) into the schema of the chart's values.

usage: chart_schema.py FILE     Reads helm/hone/values.schema.json, whose other parts are written by hand; writes FILE.
tools/generated.sh calls it.
"""

import json
import sys
from pathlib import Path
from typing import Any

from hone.cluster import Cluster

SCHEMA = Path(__file__).parents[1] / "helm/hone/values.schema.json"
_FOR_PAGES = {"title", "origin", "unit"}
"""What editors and Helm have no use for."""
_SHORTHANDS = {"bytes": r"^\d+[KMGT]i$", "seconds": r"^\d+[smhd]$"}


def schema_text() -> str:
    """The chart's schema with the current fields of Cluster."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    model = Cluster.model_json_schema()
    _accept_shorthands(model["properties"])
    cluster = _plain(model)
    schema["$defs"] = cluster.pop("$defs")
    schema["properties"]["cluster"] = cluster
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _accept_shorthands(fields: dict[str, Any]) -> None:
    """Sizes and times may be written as people write them, which the model's own schema does not say."""
    for field in fields.values():
        if pattern := _SHORTHANDS.get(field.get("unit", "")):
            kinds = field.pop("anyOf", [{"type": field.pop("type", "integer")}])
            field["anyOf"] = [{"type": "string", "pattern": pattern}, *kinds]


def _plain(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_plain(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: _plain(field) for name, field in value.items()} if key == "properties" else _plain(value)
        for key, value in schema.items()
        if key not in _FOR_PAGES
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(schema_text(), encoding="utf-8")
