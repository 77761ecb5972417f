"""Messages to our types and back; called by the server, the client and the trainer's reports.

A request goes through proto's JSON form, which is the YAML's. Answers go field by field: a message of hone.v1 has the
fields of the dataclass of the same name (a test walks both), so one pair of functions serves all of them.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from hone.errors import InternalError, InvalidRequest, Violation
from hone.job import Attempt, Event, Job, Plan
from hone.remembered import MOST, Remembered
from hone.spec import JobSpec
from hone.spec.parse import parse
from hone.v1 import job_pb2, spec_pb2, training_service_pb2

_Answer = TypeVar("_Answer")
_AnyMessage = TypeVar("_AnyMessage", bound=Message)


def spec_to_message(spec: JobSpec) -> spec_pb2.JobSpec:
    """A request as a message. Raises InvalidRequest for a number or text that the wire cannot carry."""
    message = spec_pb2.JobSpec()
    message.CopyFrom(_message_of_spec(spec))
    return message


def _make_spec_message(spec: JobSpec) -> spec_pb2.JobSpec:
    data = spec.to_mapping()
    if empty := list(_empty_lists(data, "")):
        raise InvalidRequest([Violation(path=path, value=[], message=_EMPTY) for path in empty])
    try:
        return ParseDict(data, spec_pb2.JobSpec())
    except (ParseError, ValueError) as error:
        text = " ".join(str(error).split())
        raise InvalidRequest([Violation(path="", message=f"The request cannot be sent: {text}.")]) from error


_message_of_spec = Remembered[JobSpec, spec_pb2.JobSpec](_make_spec_message)


_EMPTY = "is empty, which the wire cannot tell from absent: name something, or leave it out."


def _empty_lists(data: Any, path: str) -> Iterator[str]:
    """Paths of lists that are empty where the default is not."""
    if data == []:
        yield path
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _empty_lists(value, f"{path}.{key}" if path else key)


def spec_from_message(message: spec_pb2.JobSpec) -> JobSpec:
    """The request that a message holds. Raises InvalidRequest with every violation."""
    return _spec_of(message.SerializeToString(deterministic=True))


@lru_cache(maxsize=MOST)
def _spec_of(data: bytes) -> JobSpec:
    return parse(MessageToDict(spec_pb2.JobSpec.FromString(data), preserving_proto_field_name=True))


def job_to_message(job: Job) -> job_pb2.Job:
    """A job as a message."""
    message = job_pb2.Job(name=job_name(job.namespace, job.id))
    fill(message, job)
    return message


def job_from_message(message: job_pb2.Job) -> Job:
    """The job that a message holds; its attempts have no nonce, which never leaves the service."""
    namespace, job_id = split_job_name(message.name)
    return from_message(Job, message, namespace=namespace, id=job_id)


def event_to_message(event: Event) -> job_pb2.Event:
    """An event as a message."""
    message = job_pb2.Event()
    fill(message, event)
    return message


def violation_to_message(violation: Violation) -> training_service_pb2.Violation:
    """A violation as a message; a value that JSON has no word for goes as text."""
    message = training_service_pb2.Violation(path=violation.path, message=violation.message)
    if violation.value is not None:
        value = json.loads(json.dumps(violation.value, default=str).encode("utf-8", "replace"))
        ParseDict(value, message.value)
    return message


def violation_from_message(message: training_service_pb2.Violation) -> Violation:
    """The violation that a message holds."""
    value = MessageToDict(message.value) if message.HasField("value") else None
    return Violation(path=message.path, message=message.message, value=value)


def namespace_name(namespace: str) -> str:
    """namespaces/{namespace}"""
    return f"namespaces/{namespace}"


def job_name(namespace: str, job_id: str) -> str:
    """namespaces/{namespace}/jobs/{job}"""
    return f"namespaces/{namespace}/jobs/{job_id}"


_SEGMENT = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_NAMESPACE = re.compile(rf"namespaces/(?P<namespace>{_SEGMENT})")
_JOB = re.compile(rf"namespaces/(?P<namespace>{_SEGMENT})/jobs/(?P<job>{_SEGMENT})")


def split_namespace_name(name: str, *, field: str = "parent") -> str:
    """The namespace of `namespaces/{namespace}`. Raises InvalidRequest."""
    if match := _NAMESPACE.fullmatch(name):
        return match["namespace"]
    raise _not_a_name(field, name, "namespaces/{namespace}")


def split_job_name(name: str, *, field: str = "name") -> tuple[str, str]:
    """Namespace and job of `namespaces/{namespace}/jobs/{job}`. Raises InvalidRequest."""
    if match := _JOB.fullmatch(name):
        return match["namespace"], match["job"]
    raise _not_a_name(field, name, "namespaces/{namespace}/jobs/{job}")


def _not_a_name(field: str, name: str, form: str) -> InvalidRequest:
    message = f"{name!r} is not of the form {form}, of letters, digits, '.', '_' and '-'."
    return InvalidRequest([Violation(path=field, value=name, message=message)])


def decode(kind: type[_AnyMessage], data: bytes) -> _AnyMessage:
    """What came in, as a message. Raises InvalidRequest when it is none, or has fields that are unknown here."""
    message = kind()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        name = kind.DESCRIPTOR.full_name
        raise InvalidRequest([Violation(path="", message=f"What was sent is not a {name}: {error}.")]) from error
    size = message.ByteSize()
    message.DiscardUnknownFields()
    if message.ByteSize() != size:
        unknown = unknown_fields(kind.FromString(data))
        raise InvalidRequest([Violation(path=path, message=_UNKNOWN) for path in unknown])
    return message


_UNKNOWN = "is unknown to this version of the service: use a client of its version, or update the service."


def unknown_fields(message: Message, path: str = "") -> list[str]:
    """Paths of everything that a newer sender put in and this version would pass over in silence."""
    unknown = UnknownFieldSet(message)
    found = [f"{path}field number {unknown[index].field_number}" for index in range(len(unknown))]
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for part in value if field.is_repeated else (value,):
            found += unknown_fields(part, f"{path}{field.name}.")
    return found


def fill(message: Message, value: Any) -> None:
    """Copy a dataclass into a message of the same fields."""
    kind: Any = type(value)
    for name, codec in _codecs(kind):
        part = getattr(value, name)
        if part is not None:
            codec.write(message, name, part)


def from_message(kind: type[_Answer], message: Message, **others: Any) -> _Answer:
    """A dataclass from a message of the same fields; `others` are the fields that the message holds otherwise."""
    values = {
        name: None if codec.optional and not message.HasField(name) else codec.read(message, name)
        for name, codec in _codecs(cast(Any, kind))
    }
    return kind(**values, **others)


ELSEWHERE: Mapping[type, Mapping[str, Any]] = {Job: {"namespace": "", "id": ""}, Attempt: {"nonce": ""}}
"""Fields that the message of that dataclass does not hold under their own name, with what stands in for them."""


@dataclass(frozen=True)
class _Codec:
    """How one field goes into a message and comes out again."""

    write: Callable[[Any, str, Any], None]
    read: Callable[[Any, str], Any]
    optional: bool = False


@lru_cache
def _codecs(kind: Any) -> tuple[tuple[str, _Codec], ...]:
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind) if field.name not in ELSEWHERE.get(kind, {})]
    return tuple((name, _codec(hints[name])) for name in names)


def _codec(hint: Any) -> _Codec:
    arguments = get_args(hint)
    if NoneType in arguments:
        inner = _codec(next(argument for argument in arguments if argument is not NoneType))
        return _Codec(inner.write, inner.read, optional=True)
    if get_origin(hint) is tuple:
        return _list_codec(arguments[0])
    if get_origin(hint) is not None:  # Mapping[str, …]
        return _Codec(lambda message, name, value: getattr(message, name).update(value), _read_map)
    if hint is datetime:
        return _Codec(lambda message, name, value: getattr(message, name).FromDatetime(value), _read_time)
    if hint is Plan:
        return _Codec(
            lambda message, name, value: getattr(message, name).CopyFrom(_message_of_plan(value)),
            lambda message, name: _part(Plan, getattr(message, name)),
        )
    if hint is JobSpec:
        return _Codec(lambda message, name, value: getattr(message, name).CopyFrom(spec_to_message(value)), _read_spec)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return _enum_codec(hint)
    if is_dataclass(hint) and isinstance(hint, type):
        return _Codec(_write_part, lambda message, name: _part(hint, getattr(message, name)))
    return _Codec(setattr, getattr)


def _list_codec(item: Any) -> _Codec:
    if not is_dataclass(item) or not isinstance(item, type):
        return _Codec(lambda message, name, value: getattr(message, name).extend(value), _read_list)
    return _Codec(_write_parts, lambda message, name: tuple(_part(item, part) for part in getattr(message, name)))


def _enum_codec(enum: type[StrEnum]) -> _Codec:
    descriptor = job_pb2.DESCRIPTOR.enum_types_by_name[enum.__name__]
    prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.__name__).upper() + "_"
    number_of = {member: descriptor.values_by_name[prefix + member.value].number for member in enum}
    member_of = {number: member for member, number in number_of.items()}

    def read(message: Any, name: str) -> StrEnum:
        number = getattr(message, name)
        if number not in member_of:
            raise InternalError(
                f"The service answers {name} {number}, which this client does not know.", fix="Update hone-tuning."
            )
        return member_of[number]

    return _Codec(lambda message, name, value: setattr(message, name, number_of[value]), read)


def _make_plan_message(plan: Plan) -> job_pb2.Plan:
    message = job_pb2.Plan()
    fill(message, plan)
    return message


_message_of_plan = Remembered[Plan, job_pb2.Plan](_make_plan_message)


def _part(kind: type[_Answer], message: Message) -> _Answer:
    return from_message(kind, message, **ELSEWHERE.get(kind, {}))


def _write_part(message: Any, name: str, value: Any) -> None:
    part = getattr(message, name)
    part.SetInParent()  # or a part whose every field is zero would be taken for absent
    fill(part, value)


def _write_parts(message: Any, name: str, values: Any) -> None:
    for value in values:
        fill(getattr(message, name).add(), value)


def _read_map(message: Any, name: str) -> dict[str, Any]:
    return dict(getattr(message, name))


def _read_list(message: Any, name: str) -> tuple[Any, ...]:
    return tuple(getattr(message, name))


def _read_time(message: Any, name: str) -> datetime:
    time: datetime = getattr(message, name).ToDatetime(tzinfo=UTC)
    return time


def _read_spec(message: Any, name: str) -> JobSpec:
    # Not parse(): rules for what may be asked are not rules for what was decided.
    return JobSpec.model_validate(MessageToDict(getattr(message, name), preserving_proto_field_name=True))
