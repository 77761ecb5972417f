"""What a trainer tells the service over the wire, where it has no event file that the backend reads."""

from collections.abc import Sequence

from hone.job import Event
from hone.run import Run

TIMEOUT_S = 10.0


def send(address: str, run: Run, events: Sequence[Event]) -> int:
    """Send events of an attempt; the answer is the attempt's own seq up to which all are recorded.

    Whoever calls keeps what is not acknowledged and sends it again; doubles are dropped by the service. Raises
    Unavailable when nobody answers, and UserError when the service does not know the attempt.
    """
    import grpc  # late: a trainer that reports through its file never loads it

    from hone.rpc.channel import channel_options
    from hone.rpc.convert import event_to_message, job_name
    from hone.rpc.status import from_rpc_error
    from hone.v1 import report_service_pb2, report_service_pb2_grpc

    request = report_service_pb2.ReportEventsRequest(
        job=job_name(run.namespace, run.job),
        attempt=run.attempt,
        nonce=run.nonce,
        events=[event_to_message(event) for event in events],
    )
    try:
        with grpc.insecure_channel(address, options=channel_options(address)) as channel:
            stub = report_service_pb2_grpc.ReportServiceStub(channel)  # type: ignore[no-untyped-call]
            return int(stub.ReportEvents(request, timeout=TIMEOUT_S).acked_seq)
    except grpc.RpcError as error:
        raise from_rpc_error(error, address=address) from error
