"""hone.rpc.convert: the proto has the fields of the spec and of the answers, and everything survives the way there and
back."""

import types
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hone import job as answers
from hone.errors import InvalidRequest, Violation
from hone.findings import Finding, FindingState
from hone.job import Attempt, Event, Failure, FailureClass, Job, MetricSeries, Point, State
from hone.rpc import convert
from hone.spec import JobSpec
from hone.spec.faults import part_of
from hone.spec.part import Part
from hone.v1 import job_pb2, spec_pb2
from hone.v1 import training_service_pb2 as pb

NOW = datetime(2026, 11, 24, 1, 2, 3, 456789, tzinfo=UTC)


def parts(part: type[Part], message: Any) -> Iterator[tuple[type[Part], Any]]:
    """Every part of the request with its message."""
    yield part, message
    for name, field in part.model_fields.items():
        if (inner := part_of(field.annotation)) and name in message.fields_by_name:
            yield from parts(inner, message.fields_by_name[name].message_type)


@pytest.mark.parametrize(
    ("part", "message"),
    [pytest.param(*pair, id=pair[1].name) for pair in parts(JobSpec, spec_pb2.JobSpec.DESCRIPTOR)],
)
def test_every_part_of_the_request_has_the_same_fields_in_the_proto(part: type[Part], message: Any) -> None:
    assert {field.name for field in message.fields} == set(part.model_fields)
    for name, field in part.model_fields.items():
        wire = message.fields_by_name[name]
        assert wire_kind(wire) == spec_kind(field.annotation), name
        if not wire.is_repeated:
            assert wire.has_presence, f"{name}: unset must be told from zero"


def spec_kind(annotation: Any) -> str:
    """What a field of the spec is on the wire."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return spec_kind(arguments[0])
    if origin in (Union, types.UnionType):
        return spec_kind(next(argument for argument in arguments if argument is not types.NoneType))
    if origin is tuple:
        return f"repeated {spec_kind(arguments[0])}"
    if origin is dict:
        return "map of string"
    if origin is Literal:
        return "string"
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return "message"
    return {int: "int32", float: "double", str: "string", bool: "bool"}[annotation]


def wire_kind(field: FieldDescriptor) -> str:
    """What a field of a message is."""
    if field.message_type and field.message_type.GetOptions().map_entry:
        return f"map of {wire_kind(field.message_type.fields_by_name['value'])}"
    names = {
        FieldDescriptor.TYPE_INT32: "int32",
        FieldDescriptor.TYPE_INT64: "int64",
        FieldDescriptor.TYPE_DOUBLE: "double",
        FieldDescriptor.TYPE_STRING: "string",
        FieldDescriptor.TYPE_BOOL: "bool",
        FieldDescriptor.TYPE_MESSAGE: "message",
        FieldDescriptor.TYPE_ENUM: "enum",
    }
    return f"repeated {names[field.type]}" if field.is_repeated else names[field.type]


@pytest.mark.parametrize(
    "name",
    ["Failure", "Event", "Point", "MetricSeries", "Progress", "Output", "Checkpoint", "Attempt", "MemoryItem", "Launch",
     "Alternative", "Plan", "Job", "Finding"],
)  # fmt: skip
def test_every_answer_has_the_same_fields_in_the_proto(name: str) -> None:
    kind = Finding if name == "Finding" else getattr(answers, name)
    wire = {field.name for field in job_pb2.DESCRIPTOR.message_types_by_name[name].fields}
    own = {field.name for field in fields(kind)} - set(convert.ELSEWHERE.get(kind, {}))
    assert wire - own == ({"name"} if kind is Job else set())
    assert own <= wire


@pytest.mark.parametrize("enum", [State, FailureClass, FindingState])
def test_every_word_of_an_enumeration_has_its_number(enum: type) -> None:
    prefix = {State: "STATE_", FailureClass: "FAILURE_CLASS_", FindingState: "FINDING_STATE_"}[enum]
    found = [value.name for value in job_pb2.DESCRIPTOR.enum_types_by_name[enum.__name__].values[1:]]
    assert found == [prefix + member.value for member in enum]  # type: ignore[attr-defined]


def test_both_watch_streams_have_one_shape() -> None:
    def shape(message: Any) -> list[tuple[str, int, str]]:
        return [(field.name, field.number, wire_kind(field)) for field in message.fields]

    assert shape(pb.WatchJobResponse.DESCRIPTOR) == shape(pb.WatchJobsResponse.DESCRIPTOR)


text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


def values_of(annotation: Any, limits: tuple[Any, ...] = ()) -> st.SearchStrategy[Any]:
    """Values that a field may have, as in YAML."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return values_of(arguments[0], (*arguments[1:], *limits))
    if origin in (Union, types.UnionType):
        return values_of(next(argument for argument in arguments if argument is not types.NoneType), limits)
    if origin is tuple:
        return st.lists(values_of(arguments[0]), min_size=1, max_size=3)
    if origin is dict:
        return st.dictionaries(values_of(arguments[0]), values_of(arguments[1]), max_size=3)
    if origin is Literal:
        return st.sampled_from(arguments)
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return part_values(annotation)
    if annotation is bool:
        return st.booleans()
    pattern = next((limit.pattern for limit in limits if getattr(limit, "pattern", None)), None)
    if annotation is str:
        return st.from_regex(pattern, fullmatch=True, alphabet=st.characters(codec="ascii")) if pattern else text
    low, high = bounds(limits)
    if annotation is int:
        return st.integers(int(low if low is not None else -(2**31)), int(high if high is not None else 2**31 - 1))
    return st.floats(low, high, allow_nan=False, allow_infinity=False)


def bounds(limits: tuple[Any, ...]) -> tuple[Any, Any]:
    low = high = None
    for limit in [inner for outer in limits for inner in (outer, *getattr(outer, "metadata", ()))]:
        low = next((getattr(limit, name) for name in ("ge", "gt") if getattr(limit, name, None) is not None), low)
        high = next((getattr(limit, name) for name in ("le", "lt") if getattr(limit, name, None) is not None), high)
    return low, high


@st.composite
def part_values(draw: st.DrawFn, part: type[Part]) -> dict[str, Any]:
    names = list(part.model_fields)
    kinds = [name for name in names if spec_kind(part.model_fields[name].annotation) == "message"]
    if part.__name__ in ("Method", "RewardPart"):
        names = [draw(st.sampled_from(kinds)), *(name for name in names if name not in kinds)]
    found = {}
    for name in names:
        field = part.model_fields[name]
        if field.is_required() or part.__name__ == "Method" or draw(st.booleans()):
            found[name] = draw(values_of(field.annotation, tuple(field.metadata)))
    if part.__name__ == "RewardPart" and not set(found) & set(kinds):
        found[names[0]] = draw(values_of(part.model_fields[names[0]].annotation))
    return found


def valid(data: dict[str, Any]) -> JobSpec | None:
    try:
        return JobSpec.model_validate(data)
    except ValueError:  # a bound is exclusive, or a text too long
        return None


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.data())
def test_every_request_survives_the_way_there_and_back(data: st.DataObject) -> None:
    spec = data.draw(part_values(JobSpec).map(valid).filter(lambda found: found is not None))
    assert spec is not None
    message = convert.spec_to_message(spec)
    again = spec_pb2.JobSpec.FromString(message.SerializeToString())
    assert convert.from_message(Holder, pb.PlanJobResponse(spec=again)).spec == spec


@dataclass(frozen=True)
class Holder:
    """Something with a decided request, which is read without the rules for what may be asked."""

    spec: JobSpec


def demo(**changes: Any) -> dict[str, Any]:
    return {
        "name": "demo",
        "model": {"source": "hf://a/b"},
        "dataset": {"source": "hf://a/c"},
        "method": {"sft": {}},
        **changes,
    }


def test_a_request_that_breaks_rules_is_refused_with_all_of_them() -> None:
    message = convert.spec_to_message(JobSpec.model_validate(demo(training={"epochs": 1, "max_steps": 3})))
    message.training.learning_rate = 7
    message.compute.nodes = 0
    with pytest.raises(InvalidRequest) as refused:
        convert.spec_from_message(message)
    assert {v.path for v in refused.value.violations} >= {"training.learning_rate", "compute.nodes"}


def test_a_number_that_the_wire_cannot_carry_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"training\.max_steps"):
        JobSpec.model_validate(demo(training={"max_steps": 2**31}))
    spec = JobSpec.model_validate(demo())
    unchecked = spec.model_copy(update={"training": spec.training.model_copy(update={"max_steps": 2**40})})
    with pytest.raises(InvalidRequest, match="cannot be sent"):
        convert.spec_to_message(unchecked)


def test_an_empty_list_where_the_default_has_words_is_refused_rather_than_lost() -> None:
    spec = JobSpec.model_validate(demo(adapter={"lora": {"target_modules": []}}))
    with pytest.raises(InvalidRequest, match=r"adapter\.lora\.target_modules"):
        convert.spec_to_message(spec)


def test_fields_of_a_newer_client_are_refused_with_their_place() -> None:
    newer = spec_pb2.Training.FromString(b"\xf8\x3f\x01")  # field 1023, varint 1
    request = pb.CreateJobRequest(parent="namespaces/a", spec=spec_pb2.JobSpec(training=newer))
    with pytest.raises(InvalidRequest) as refused:
        convert.decode(pb.CreateJobRequest, request.SerializeToString())
    assert [violation.path for violation in refused.value.violations] == ["spec.training.field number 1023"]


def test_bytes_that_are_no_message_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"hone\.v1\.GetJobRequest"):
        convert.decode(pb.GetJobRequest, b"\xff\xff\xff")


def test_an_event_survives_the_way_there_and_back() -> None:
    event = Event(seq=2**40, time=NOW, type="progress", message="µ", job="a", attempt=2, step=0,
                  metrics={"loss": 0.1, "nothing": 0.0}, fields={"state": "RUNNING"})  # fmt: skip
    assert convert.from_message(Event, convert.event_to_message(event)) == event


def test_what_is_absent_stays_absent_and_zero_stays_zero() -> None:
    event = Event(seq=1, time=NOW, type="note")
    assert convert.from_message(Event, convert.event_to_message(event)).step is None
    failure = Failure(failure_class=FailureClass.OOM, message="x", rank=0, log_tail=("a", "b"))
    message = job_pb2.Failure()
    convert.fill(message, failure)
    assert convert.from_message(Failure, message) == failure
    series = MetricSeries(name="loss", points=(Point(step=1, value=0.5, time=NOW, attempt=1),))
    series_message = job_pb2.MetricSeries()
    convert.fill(series_message, series)
    assert convert.from_message(MetricSeries, series_message) == series


def test_an_attempts_nonce_never_leaves_the_service() -> None:
    attempt = Attempt(number=1, nonce="secret-nonce", state=State.RUNNING, create_time=NOW)
    message = job_pb2.Attempt()
    convert.fill(message, attempt)
    assert b"secret-nonce" not in message.SerializeToString()


@pytest.mark.parametrize("value", [None, "7", 7, 0.5, True, ["a"], {"a": [1]}, {"b": None}])
def test_a_violation_survives_the_way_there_and_back(value: Any) -> None:
    violation = Violation(path="a.b", message="wrong", value=value)
    assert convert.violation_from_message(convert.violation_to_message(violation)) == violation


@pytest.mark.parametrize(
    "name", ["", "jobs/a", "namespaces/a/jobs/", "namespaces/a/jobs/../b", "namespaces/a/jobs/b/c"]
)
def test_what_is_no_name_of_a_job_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"namespaces/\{namespace\}/jobs/\{job\}"):
        convert.split_job_name(name)
    assert convert.split_job_name(convert.job_name("team-a", "demo-x7k2p")) == ("team-a", "demo-x7k2p")


def test_a_number_that_was_too_large_for_its_sender_is_refused_by_its_path() -> None:
    """A sender that checks nothing writes 2^31 into a field of 32 bits, where it turns negative."""
    request = convert.spec_to_message(JobSpec.model_validate(demo())).SerializeToString()
    training = spec_pb2.JobSpec.DESCRIPTOR.fields_by_name["training"].number
    max_steps = spec_pb2.Training.DESCRIPTOR.fields_by_name["max_steps"].number
    number = bytes([max_steps << 3, *_varint(2**31)])
    message = convert.decode(spec_pb2.JobSpec, request + bytes([training << 3 | 2, len(number)]) + number)
    with pytest.raises(InvalidRequest) as caught:
        convert.spec_from_message(message)
    assert [violation.path for violation in caught.value.violations] == ["training.max_steps"]


def _varint(number: int) -> list[int]:
    return [number] if number < 128 else [number & 127 | 128, *_varint(number >> 7)]
