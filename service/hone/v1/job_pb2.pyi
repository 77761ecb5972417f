import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from hone.v1 import spec_pb2 as _spec_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATE_UNSPECIFIED: _ClassVar[State]
    STATE_PENDING: _ClassVar[State]
    STATE_QUEUED: _ClassVar[State]
    STATE_RUNNING: _ClassVar[State]
    STATE_PAUSING: _ClassVar[State]
    STATE_PAUSED: _ClassVar[State]
    STATE_CANCELLING: _ClassVar[State]
    STATE_SUCCEEDED: _ClassVar[State]
    STATE_FAILED: _ClassVar[State]
    STATE_CANCELLED: _ClassVar[State]

class FailureClass(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FAILURE_CLASS_UNSPECIFIED: _ClassVar[FailureClass]
    FAILURE_CLASS_USER: _ClassVar[FailureClass]
    FAILURE_CLASS_DATA: _ClassVar[FailureClass]
    FAILURE_CLASS_OOM: _ClassVar[FailureClass]
    FAILURE_CLASS_PREEMPTED: _ClassVar[FailureClass]
    FAILURE_CLASS_INFRA: _ClassVar[FailureClass]
    FAILURE_CLASS_INTERNAL: _ClassVar[FailureClass]

class FindingState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINDING_STATE_UNSPECIFIED: _ClassVar[FindingState]
    FINDING_STATE_OK: _ClassVar[FindingState]
    FINDING_STATE_WARNING: _ClassVar[FindingState]
    FINDING_STATE_FAILED: _ClassVar[FindingState]
    FINDING_STATE_NOT_CHECKED: _ClassVar[FindingState]
STATE_UNSPECIFIED: State
STATE_PENDING: State
STATE_QUEUED: State
STATE_RUNNING: State
STATE_PAUSING: State
STATE_PAUSED: State
STATE_CANCELLING: State
STATE_SUCCEEDED: State
STATE_FAILED: State
STATE_CANCELLED: State
FAILURE_CLASS_UNSPECIFIED: FailureClass
FAILURE_CLASS_USER: FailureClass
FAILURE_CLASS_DATA: FailureClass
FAILURE_CLASS_OOM: FailureClass
FAILURE_CLASS_PREEMPTED: FailureClass
FAILURE_CLASS_INFRA: FailureClass
FAILURE_CLASS_INTERNAL: FailureClass
FINDING_STATE_UNSPECIFIED: FindingState
FINDING_STATE_OK: FindingState
FINDING_STATE_WARNING: FindingState
FINDING_STATE_FAILED: FindingState
FINDING_STATE_NOT_CHECKED: FindingState

class Finding(_message.Message):
    __slots__ = ("check", "state", "message", "fix", "path", "how")
    CHECK_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIX_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    HOW_FIELD_NUMBER: _ClassVar[int]
    check: str
    state: FindingState
    message: str
    fix: str
    path: str
    how: str
    def __init__(self, check: _Optional[str] = ..., state: _Optional[_Union[FindingState, str]] = ..., message: _Optional[str] = ..., fix: _Optional[str] = ..., path: _Optional[str] = ..., how: _Optional[str] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("failure_class", "message", "next_step", "rank", "exit_code", "log_tail")
    FAILURE_CLASS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    NEXT_STEP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    LOG_TAIL_FIELD_NUMBER: _ClassVar[int]
    failure_class: FailureClass
    message: str
    next_step: str
    rank: int
    exit_code: int
    log_tail: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, failure_class: _Optional[_Union[FailureClass, str]] = ..., message: _Optional[str] = ..., next_step: _Optional[str] = ..., rank: _Optional[int] = ..., exit_code: _Optional[int] = ..., log_tail: _Optional[_Iterable[str]] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("seq", "time", "type", "message", "job", "attempt", "step", "metrics", "fields")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class FieldsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SEQ_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    seq: int
    time: _timestamp_pb2.Timestamp
    type: str
    message: str
    job: str
    attempt: int
    step: int
    metrics: _containers.ScalarMap[str, float]
    fields: _containers.ScalarMap[str, str]
    def __init__(self, seq: _Optional[int] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., type: _Optional[str] = ..., message: _Optional[str] = ..., job: _Optional[str] = ..., attempt: _Optional[int] = ..., step: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., fields: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Point(_message.Message):
    __slots__ = ("step", "value", "time", "attempt")
    STEP_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    step: int
    value: float
    time: _timestamp_pb2.Timestamp
    attempt: int
    def __init__(self, step: _Optional[int] = ..., value: _Optional[float] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., attempt: _Optional[int] = ...) -> None: ...

class MetricSeries(_message.Message):
    __slots__ = ("name", "points")
    NAME_FIELD_NUMBER: _ClassVar[int]
    POINTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    points: _containers.RepeatedCompositeFieldContainer[Point]
    def __init__(self, name: _Optional[str] = ..., points: _Optional[_Iterable[_Union[Point, _Mapping]]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("step", "max_steps", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second", "eta_s", "phase")
    STEP_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    ETA_S_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    step: int
    max_steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    eta_s: float
    phase: str
    def __init__(self, step: _Optional[int] = ..., max_steps: _Optional[int] = ..., epoch: _Optional[float] = ..., loss: _Optional[float] = ..., learning_rate: _Optional[float] = ..., grad_norm: _Optional[float] = ..., tokens_per_second: _Optional[float] = ..., eta_s: _Optional[float] = ..., phase: _Optional[str] = ...) -> None: ...

class Output(_message.Message):
    __slots__ = ("kind", "uri", "size_bytes", "sha256", "attempt")
    KIND_FIELD_NUMBER: _ClassVar[int]
    URI_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    kind: str
    uri: str
    size_bytes: int
    sha256: str
    attempt: int
    def __init__(self, kind: _Optional[str] = ..., uri: _Optional[str] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class Checkpoint(_message.Message):
    __slots__ = ("step", "place", "uri", "size_bytes", "sha256", "attempt", "time", "complete")
    STEP_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    URI_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    step: int
    place: str
    uri: str
    size_bytes: int
    sha256: str
    attempt: int
    time: _timestamp_pb2.Timestamp
    complete: bool
    def __init__(self, step: _Optional[int] = ..., place: _Optional[str] = ..., uri: _Optional[str] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[str] = ..., attempt: _Optional[int] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., complete: _Optional[bool] = ...) -> None: ...

class Attempt(_message.Message):
    __slots__ = ("number", "state", "create_time", "start_time", "end_time", "failure", "counted", "gpus")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    END_TIME_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    number: int
    state: State
    create_time: _timestamp_pb2.Timestamp
    start_time: _timestamp_pb2.Timestamp
    end_time: _timestamp_pb2.Timestamp
    failure: Failure
    counted: bool
    gpus: int
    def __init__(self, number: _Optional[int] = ..., state: _Optional[_Union[State, str]] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., end_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., counted: _Optional[bool] = ..., gpus: _Optional[int] = ...) -> None: ...

class MemoryItem(_message.Message):
    __slots__ = ("name", "size_bytes", "formula")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    FORMULA_FIELD_NUMBER: _ClassVar[int]
    name: str
    size_bytes: int
    formula: str
    def __init__(self, name: _Optional[str] = ..., size_bytes: _Optional[int] = ..., formula: _Optional[str] = ...) -> None: ...

class Launch(_message.Message):
    __slots__ = ("launcher", "strategy", "device", "nodes", "processes_per_node", "gpus_per_node", "precision", "micro_batch_size", "gradient_accumulation_steps", "activation_checkpointing", "threads_per_process")
    LAUNCHER_FIELD_NUMBER: _ClassVar[int]
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    PROCESSES_PER_NODE_FIELD_NUMBER: _ClassVar[int]
    GPUS_PER_NODE_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_ACCUMULATION_STEPS_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_CHECKPOINTING_FIELD_NUMBER: _ClassVar[int]
    THREADS_PER_PROCESS_FIELD_NUMBER: _ClassVar[int]
    launcher: str
    strategy: str
    device: str
    nodes: int
    processes_per_node: int
    gpus_per_node: int
    precision: str
    micro_batch_size: int
    gradient_accumulation_steps: int
    activation_checkpointing: bool
    threads_per_process: int
    def __init__(self, launcher: _Optional[str] = ..., strategy: _Optional[str] = ..., device: _Optional[str] = ..., nodes: _Optional[int] = ..., processes_per_node: _Optional[int] = ..., gpus_per_node: _Optional[int] = ..., precision: _Optional[str] = ..., micro_batch_size: _Optional[int] = ..., gradient_accumulation_steps: _Optional[int] = ..., activation_checkpointing: _Optional[bool] = ..., threads_per_process: _Optional[int] = ...) -> None: ...

class Alternative(_message.Message):
    __slots__ = ("change", "gpu", "gpus", "peak_bytes")
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    GPU_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    change: str
    gpu: str
    gpus: int
    peak_bytes: int
    def __init__(self, change: _Optional[str] = ..., gpu: _Optional[str] = ..., gpus: _Optional[int] = ..., peak_bytes: _Optional[int] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("fits", "sentence", "gpu", "launch", "memory", "peak_bytes", "capacity_bytes", "host_memory_bytes", "disk_bytes", "output_bytes", "model_family", "parameters", "trainable_parameters", "max_steps", "seconds_low", "seconds_high", "notes", "warnings", "alternatives", "step_flops")
    class OutputBytesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    FITS_FIELD_NUMBER: _ClassVar[int]
    SENTENCE_FIELD_NUMBER: _ClassVar[int]
    GPU_FIELD_NUMBER: _ClassVar[int]
    LAUNCH_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FAMILY_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    TRAINABLE_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_LOW_FIELD_NUMBER: _ClassVar[int]
    SECONDS_HIGH_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    STEP_FLOPS_FIELD_NUMBER: _ClassVar[int]
    fits: bool
    sentence: str
    gpu: str
    launch: Launch
    memory: _containers.RepeatedCompositeFieldContainer[MemoryItem]
    peak_bytes: int
    capacity_bytes: int
    host_memory_bytes: int
    disk_bytes: int
    output_bytes: _containers.ScalarMap[str, int]
    model_family: str
    parameters: int
    trainable_parameters: int
    max_steps: int
    seconds_low: float
    seconds_high: float
    notes: _containers.RepeatedScalarFieldContainer[str]
    warnings: _containers.RepeatedScalarFieldContainer[str]
    alternatives: _containers.RepeatedCompositeFieldContainer[Alternative]
    step_flops: float
    def __init__(self, fits: _Optional[bool] = ..., sentence: _Optional[str] = ..., gpu: _Optional[str] = ..., launch: _Optional[_Union[Launch, _Mapping]] = ..., memory: _Optional[_Iterable[_Union[MemoryItem, _Mapping]]] = ..., peak_bytes: _Optional[int] = ..., capacity_bytes: _Optional[int] = ..., host_memory_bytes: _Optional[int] = ..., disk_bytes: _Optional[int] = ..., output_bytes: _Optional[_Mapping[str, int]] = ..., model_family: _Optional[str] = ..., parameters: _Optional[int] = ..., trainable_parameters: _Optional[int] = ..., max_steps: _Optional[int] = ..., seconds_low: _Optional[float] = ..., seconds_high: _Optional[float] = ..., notes: _Optional[_Iterable[str]] = ..., warnings: _Optional[_Iterable[str]] = ..., alternatives: _Optional[_Iterable[_Union[Alternative, _Mapping]]] = ..., step_flops: _Optional[float] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("name", "uid", "requested_spec", "resolved_spec", "plan", "state", "state_reason", "creator", "create_time", "update_time", "version", "start_time", "end_time", "delete_time", "attempts", "progress", "outputs", "failure", "observed")
    NAME_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    REQUESTED_SPEC_FIELD_NUMBER: _ClassVar[int]
    RESOLVED_SPEC_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STATE_REASON_FIELD_NUMBER: _ClassVar[int]
    CREATOR_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    UPDATE_TIME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    END_TIME_FIELD_NUMBER: _ClassVar[int]
    DELETE_TIME_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    OBSERVED_FIELD_NUMBER: _ClassVar[int]
    name: str
    uid: str
    requested_spec: _spec_pb2.JobSpec
    resolved_spec: _spec_pb2.JobSpec
    plan: Plan
    state: State
    state_reason: str
    creator: str
    create_time: _timestamp_pb2.Timestamp
    update_time: _timestamp_pb2.Timestamp
    version: int
    start_time: _timestamp_pb2.Timestamp
    end_time: _timestamp_pb2.Timestamp
    delete_time: _timestamp_pb2.Timestamp
    attempts: _containers.RepeatedCompositeFieldContainer[Attempt]
    progress: Progress
    outputs: _containers.RepeatedCompositeFieldContainer[Output]
    failure: Failure
    observed: bool
    def __init__(self, name: _Optional[str] = ..., uid: _Optional[str] = ..., requested_spec: _Optional[_Union[_spec_pb2.JobSpec, _Mapping]] = ..., resolved_spec: _Optional[_Union[_spec_pb2.JobSpec, _Mapping]] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., state: _Optional[_Union[State, str]] = ..., state_reason: _Optional[str] = ..., creator: _Optional[str] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., update_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., version: _Optional[int] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., end_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., delete_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., attempts: _Optional[_Iterable[_Union[Attempt, _Mapping]]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., outputs: _Optional[_Iterable[_Union[Output, _Mapping]]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., observed: _Optional[bool] = ...) -> None: ...
