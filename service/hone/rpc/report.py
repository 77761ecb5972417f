"""What a trainer tells the service over the wire, where it has no event file that the backend reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hone.errors import StorageError, TemporaryError
from hone.job import Event
from hone.run import Run

TIMEOUT_S = 10.0


class Reporter:
    """Sends events of one attempt. One connection, made again when it broke; not for several threads at once.

    A pod's token is short-lived and its file is written anew, so it is read for every call; the authority's certificate
    may change too, and is read whenever a connection is made. grpc is imported by the first call: a trainer that
    reports through its file never loads it.
    """

    def __init__(self, address: str, run: Run, *, token_file: Path | None = None, ca_file: Path | None = None) -> None:
        """Without `ca_file` the authorities that this machine trusts are asked, and a service on this machine is talked
        to in plain text; a token never leaves it in the clear."""
        self._address, self._run = address, run
        self._token_file, self._ca_file = token_file, ca_file
        self._channel: Any = None

    def send(self, events: Sequence[Event], *, timeout_s: float = TIMEOUT_S) -> int:
        """Send events; the answer is the attempt's own seq up to which all are recorded.

        Whoever calls keeps what is not acknowledged and sends it again; doubles are dropped by the service. Raises
        Unavailable when nobody answers, and UserError when the service does not know the attempt or its pod.
        """
        import grpc

        from hone.rpc.convert import event_to_message, job_name
        from hone.rpc.status import from_rpc_error
        from hone.v1 import report_service_pb2, report_service_pb2_grpc

        request = report_service_pb2.ReportEventsRequest(
            job=job_name(self._run.namespace, self._run.job),
            attempt=self._run.attempt,
            nonce=self._run.nonce,
            events=[event_to_message(event) for event in events],
        )
        metadata = self._metadata()
        stub = report_service_pb2_grpc.ReportServiceStub(self._connection())  # type: ignore[no-untyped-call]
        try:
            return int(stub.ReportEvents(request, timeout=timeout_s, metadata=metadata).acked_seq)
        except grpc.RpcError as error:
            meaning = from_rpc_error(error, address=self._address)
            if isinstance(meaning, TemporaryError):
                self.close()  # the next one reads the certificate again, and asks the name server again
            raise meaning from error

    def close(self) -> None:
        """Give the connection back."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _connection(self) -> Any:
        if self._channel is None:
            import grpc

            from hone.rpc.channel import channel_options, is_local

            options = channel_options(self._address)
            if self._ca_file is None and is_local(self._address):
                self._channel = grpc.insecure_channel(self._address, options=options)
            else:
                roots = _read(self._ca_file) if self._ca_file else None
                credentials = grpc.ssl_channel_credentials(root_certificates=roots)
                self._channel = grpc.secure_channel(self._address, credentials, options=options)
        return self._channel

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        if self._token_file is None:
            return ()
        return (("authorization", f"Bearer {_read(self._token_file).decode('ascii', 'replace').strip()}"),)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}.", fix="Look at the pod's volumes.") from error
