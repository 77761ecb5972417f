"""The request's own promises: one shape, defaults with origins, frozen, round trips."""

import pytest
from pydantic import ValidationError

from hone.spec import JobSpec
from hone.spec.document import fields
from hone.spec.part import Part
from hone.spec.sources import bucket_and_prefix


def minimal(**changes: object) -> dict[str, object]:
    return {
        "name": "demo",
        "model": {"source": "hf://org/model"},
        "dataset": {"source": "hf://org/data"},
        "method": {"sft": {}},
        **changes,
    }


def test_the_architecture_page_example_is_a_valid_request() -> None:
    spec = JobSpec.model_validate(
        {
            "name": "ultrachat-sft",
            "model": {"source": "hf://mistralai/Mistral-7B-v0.3@caa1feb0e54d415e2df31207e5f4e273e33509b1"},
            "dataset": {"source": "hf://HuggingFaceH4/ultrachat_200k", "split": "train_sft[:5000]"},
            "method": {"sft": {"packing": True, "max_length": 2048}},
            "adapter": {"lora": {"rank": 16, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"}},
            "quantization": "nf4",
            "training": {
                "epochs": 1,
                "learning_rate": 2.0e-4,
                "scheduler": "cosine",
                "warmup_ratio": 0.1,
                "precision": "bf16",
            },
            "compute": {"nodes": 1, "gpus_per_node": 4, "strategy": "auto"},
            "output": {"merged": True, "hub": {"repo": "my-org/mistral-7b-finetuned", "private": True}},
        }
    )
    assert spec.adapter is not None
    assert spec.adapter.lora.target_modules == ("all-linear",)
    assert spec.method.name == "sft"


@pytest.mark.parametrize("text", ["2e-4", "0.0002", 0.0002])
def test_a_number_in_any_of_yaml_s_spellings_is_the_same_number(text: object) -> None:
    spec = JobSpec.model_validate(minimal(training={"learning_rate": text}))
    assert spec.training.learning_rate == 2e-4


@pytest.mark.parametrize(("text", "seconds"), [("90m", 5400), ("4h", 14400), ("2d", 172800), (600, 600), ("600", 600)])
def test_a_deadline_is_read_in_people_s_units(text: object, seconds: int) -> None:
    assert JobSpec.model_validate(minimal(scheduling={"deadline": text})).scheduling.deadline == seconds


def test_what_is_written_back_reads_as_the_same_request() -> None:
    spec = JobSpec.model_validate(minimal(adapter={"lora": {}}, labels={"team": "a"}, training={"epochs": 2}))
    written = spec.to_mapping()
    assert written["method"] == {"sft": {}}
    assert JobSpec.model_validate(written) == spec


def test_a_request_cannot_be_changed_after_it_was_checked() -> None:
    spec = JobSpec.model_validate(minimal())
    with pytest.raises(ValidationError, match="frozen"):
        spec.name = "other"


def test_every_field_has_a_text_and_every_default_an_origin() -> None:
    union_parts = ("method.", "method.ppo.rewards[].", "method.grpo.rewards[].")
    for field in fields():
        assert field.text, f"{field.path} has no docstring"
        assert field.text.endswith((".", "…")), f"{field.path}: the text is no sentence"
        is_union_member = any(field.path.startswith(u) and "." not in field.path[len(u) :] for u in union_parts)
        if field.default != "required" and not is_union_member:
            assert field.origin, f"{field.path} does not say where its default comes from"


def test_parts_refuse_unknown_fields_everywhere() -> None:
    pending, seen = [Part], []
    while pending:
        part = pending.pop()
        seen += part.__subclasses__()
        pending += part.__subclasses__()
    assert len(seen) > 20
    assert all(part.model_config["extra"] == "forbid" and part.model_config["frozen"] for part in seen)


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("s3://b/data/", ("b", "data")),
        ("s3://b/data/rows.jsonl", ("b", "data/rows.jsonl")),
        ("s3://b/data/part-*.jsonl", ("b", "data")),
        ("s3://b/data/part-?.jsonl", ("b", "data")),
        ("s3://b/data/part-[01].jsonl", ("b", "data")),
        ("s3://b/*.jsonl", ("b", "")),
    ],
)
def test_the_objects_of_an_s3_source_begin_with_its_key_or_with_the_folder_of_its_pattern(
    source: str, place: tuple[str, str]
) -> None:
    assert bucket_and_prefix(source) == place
