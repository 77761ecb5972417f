"""One wrapper around every call: who may, what comes in, what goes out, what it counts as, and what errors become.

Called by server.py with the methods of services.py. Whoever calls is looked at before anything of the request is.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from hone import metrics
from hone.logs import about_now
from hone.rpc import auth, convert
from hone.rpc.auth import SUBJECTS, Gate
from hone.rpc.status import abort, code_of, foreseen

_Methods = Mapping[str, Callable[[Any, Any], Any]]


def handlers(service: ServiceDescriptor, methods: _Methods, gate: Gate | None = None) -> grpc.GenericRpcHandler:
    """Handlers of a service. Without a gate everybody may do everything."""
    known = {method.name for method in service.methods}
    assert known == set(methods), f"handlers and proto differ: {known ^ set(methods)}"
    table: dict[str, Any] = {}
    for method in service.methods:
        entrance = _Entrance(method, gate)
        if method.server_streaming:
            table[method.name] = grpc.unary_stream_rpc_method_handler(_stream(entrance, methods[method.name]))
        else:
            table[method.name] = grpc.unary_unary_rpc_method_handler(_unary(entrance, methods[method.name]))
    return grpc.method_handlers_generic_handler(service.full_name, table)


class _Entrance:
    """Where the calls of one method come in."""

    def __init__(self, method: MethodDescriptor, gate: Gate | None) -> None:
        self.name = method.name
        self._kind: type[Message] = GetMessageClass(method.input_type)
        self._subject = next(field for field in SUBJECTS if field in method.input_type.fields_by_name)
        self._gate = gate

    async def read(self, data: bytes, context: Any) -> Any:
        """The request of somebody who may make it."""
        if self._gate:
            await self.admit(data, context)
        request = convert.decode(self._kind, data)
        about_now.set(getattr(request, self._subject))
        return request

    async def admit(self, data: bytes, context: Any) -> None:
        """Raises Unauthenticated, Refused, or Unavailable. Asked again while a stream goes on."""
        if self._gate is None:
            return
        who = await self._gate.identify(dict(context.invocation_metadata() or ()))
        try:
            request = self._kind.FromString(data)  # the subject alone is looked at; the rest may be anything
        except DecodeError:
            return  # so there is no subject, and reading it is refused
        await self._gate.permit(who, self.name, request)
        auth.caller.set(who.info.user)


def _unary(entrance: _Entrance, method: Callable[[Any, Any], Awaitable[Any]]) -> Any:
    seconds = _Seconds(entrance.name)

    async def call(data: bytes, context: Any) -> bytes:
        started, code = time.perf_counter(), "CANCELLED"
        try:
            answer = _bytes(await method(await entrance.read(data, context), context))
            code = "OK"
            return answer
        except Exception as error:  # CancelledError is none, and passes
            meaning = foreseen(error)
            code = code_of(meaning).name
            await abort(context, meaning)
            raise AssertionError("abort raises") from error
        finally:
            seconds.of(code).observe(time.perf_counter() - started)

    return call


def _stream(entrance: _Entrance, method: Callable[[Any, Any], AsyncIterator[Any]]) -> Any:
    async def call(data: bytes, context: Any) -> AsyncIterator[bytes]:
        code = "CANCELLED"
        open_streams = metrics.STREAMS_OPEN.labels(entrance.name)
        open_streams.inc()
        try:
            async for answer in method(await entrance.read(data, context), context):
                await entrance.admit(data, context)  # remembered mostly; who may no longer sees no more
                yield _bytes(answer)
            code = "OK"
        except Exception as error:
            meaning = foreseen(error)
            code = code_of(meaning).name
            await abort(context, meaning)
        finally:
            open_streams.dec()
            metrics.STREAMS_ENDED.labels(entrance.name, code).inc()

    return call


class _Seconds:
    """The histogram of one method, its series found once."""

    def __init__(self, method: str) -> None:
        self._method = method
        self._series: dict[str, Any] = {}

    def of(self, code: str) -> Any:
        """The series of one code."""
        if code not in self._series:
            self._series[code] = metrics.RPC_SECONDS.labels(self._method, code)
        return self._series[code]


def _bytes(answer: Message | bytes) -> bytes:
    return answer if isinstance(answer, bytes) else answer.SerializeToString()
