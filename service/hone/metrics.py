"""What the service counts, for Prometheus; monitor.py serves it. Whoever does a thing counts it here.

No label says more than a namespace: jobs come and go, and each would be a series for ever.
"""

from prometheus_client import Counter, Gauge, Histogram

_QUICK_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SLOW_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)

RPC_SECONDS = Histogram("hone_rpc_seconds", "Time to answer one unary call.", ("method", "code"), buckets=_QUICK_S)
STREAMS_ENDED = Counter("hone_rpc_streams_ended_total", "Streams that ended, by how.", ("method", "code"))
STREAMS_OPEN = Gauge("hone_rpc_streams_open", "Streams under way.", ("method",))
STEP_SECONDS = Histogram(
    "hone_reconcile_step_seconds", "Time of one step of the reconciler, by how it ended.", ("result",), buckets=_QUICK_S
)
"""result: ok, retry (something is away: it is tried again), error (a bug, or a person has to look)."""
EVENT_LAG_SECONDS = Histogram(
    "hone_event_lag_seconds", "From a trainer's event to its record, the newest of a batch.", buckets=_SLOW_S
)
KUBERNETES_REQUESTS = Counter("hone_kubernetes_requests_total", "Requests to the API server.", ("method", "code"))
"""code: the status, or `none` where no answer came."""
