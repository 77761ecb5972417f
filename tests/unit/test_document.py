"""What is generated from the fields: current, complete, and accepting what the parser accepts."""

from pathlib import Path

import jsonschema
import pytest
import yaml

from hone.spec.document import fields, json_schema, json_schema_text, markdown

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def test_the_shipped_schema_and_page_are_current() -> None:
    assert (ROOT / "service/hone/spec/job.schema.json").read_text() == json_schema_text()
    assert (ROOT / "docs/spec.md").read_text() == markdown()


def test_the_page_names_every_field() -> None:
    page = markdown()
    for field in fields():
        assert f"`{field.path}`" in page or f"## {field.path}\n" in page


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_schema_accepts_every_example(path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        jsonschema.validate(document, json_schema())


@pytest.mark.parametrize("fault", [{"learnig_rate": 1}, {"epochs": []}, {"scheduler": 3}])
def test_the_schema_refuses_what_the_parser_refuses(fault: dict[str, object]) -> None:
    data = next(yaml.safe_load_all(EXAMPLES[0].read_text())) | {"training": fault}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, json_schema())
