"""Health and metrics over HTTP: what probes and Prometheus are told."""

import json
import logging
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from io import StringIO

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hone import logs, metrics
from hone.errors import Unavailable
from hone.logs import about
from hone.monitor import CLUSTER, Check, Monitor, Sources

WELL = Check(name="database", is_well=True, text="sqlite answers")
AWAY = Check(name=CLUSTER, is_well=False, text="no answer", is_needed=False, since=datetime(2026, 11, 24, tzinfo=UTC))


class Service:
    """What the monitor asks, as the test has it."""

    def __init__(self) -> None:
        self.checks = [WELL]
        self.is_alive = True
        self.counts: dict[tuple[str, str], int] | Exception = {("team-a", "RUNNING"): 3, ("team-b", "FAILED"): 1}

    def count(self) -> dict[tuple[str, str], int]:
        if isinstance(self.counts, Exception):
            raise self.counts
        return self.counts


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def ask(service: Service) -> Iterator[Callable[[str], tuple[int, str]]]:
    """GET from a monitor of that service."""
    sources = Sources(checks=lambda: service.checks, counts=service.count, is_alive=lambda: service.is_alive)
    monitor = Monitor("127.0.0.1", 0, sources)

    def get(path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{monitor.address}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    yield get
    monitor.stop()


def samples(text: str) -> dict[tuple[str, str], float]:
    """Name and labels → value."""
    return {
        (sample.name, ",".join(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_service_that_has_what_it_needs_is_ready(ask: Callable[[str], tuple[int, str]]) -> None:
    assert ask("/readyz") == (200, "[+] database: sqlite answers\n")
    assert ask("/healthz?verbose") == (200, "ok\n")
    assert ask("/other")[0] == 404


def test_a_database_that_is_away_makes_it_unready_and_not_dead(
    service: Service, ask: Callable[[str], tuple[int, str]]
) -> None:
    service.checks = [Check(name="database", is_well=False, text="It does not answer.")]
    assert ask("/readyz") == (503, "[-] database: It does not answer.\n")
    assert ask("/healthz")[0] == 200


def test_a_cluster_that_is_away_is_told_and_serves_on(service: Service, ask: Callable[[str], tuple[int, str]]) -> None:
    service.checks = [WELL, AWAY]
    assert ask("/readyz") == (200, "[+] database: sqlite answers\n[-] kubernetes: no answer\n")
    found = samples(ask("/metrics")[1])
    assert (found["hone_up", "database"], found["hone_up", "kubernetes"]) == (1.0, 0.0)


def test_a_loop_that_is_stuck_is_dead(service: Service, ask: Callable[[str], tuple[int, str]]) -> None:
    service.is_alive = False
    assert ask("/healthz")[0] == 503


def test_jobs_are_counted_and_a_count_that_cannot_be_had_is_a_gap(
    service: Service, ask: Callable[[str], tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hone.monitor.COUNTED_S", 0.0)
    found = samples(ask("/metrics")[1])
    assert found["hone_jobs", "team-a,RUNNING"] == 3 and found["hone_jobs", "team-b,FAILED"] == 1
    service.counts = Unavailable("The database does not answer.")
    code, text = ask("/metrics")
    assert code == 200 and not [name for name, _ in samples(text) if name == "hone_jobs"]


def test_what_is_counted_elsewhere_is_told(ask: Callable[[str], tuple[int, str]]) -> None:
    metrics.STEP_SECONDS.labels("retry").observe(0.1)
    metrics.KUBERNETES_REQUESTS.labels("GET", "200").inc()
    found = samples(ask("/metrics")[1])
    assert found["hone_reconcile_step_seconds_count", "retry"] >= 1
    assert found["hone_kubernetes_requests_total", "200,GET"] >= 1


def test_an_address_of_ip_6_is_served_too(service: Service) -> None:
    sources = Sources(checks=lambda: service.checks, counts=service.count, is_alive=lambda: True)
    try:
        monitor = Monitor("::1", 0, sources)
    except Unavailable:
        pytest.skip("this machine has no IPv6")
    with urllib.request.urlopen(f"http://{monitor.address}/healthz", timeout=5) as answer:
        assert answer.status == 200
    monitor.stop()


def test_a_port_that_is_taken_is_told(service: Service) -> None:
    sources = Sources(checks=lambda: service.checks, counts=service.count, is_alive=lambda: True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(Unavailable, match="HONE_HTTP_ADDRESS"):
            Monitor("127.0.0.1", taken.getsockname()[1], sources)


@pytest.fixture
def log_to() -> Iterator[Callable[..., StringIO]]:
    """Send the log into a text; what was there before comes back."""
    root, own = logging.getLogger(), logging.getLogger("hone")
    before = root.handlers[:], root.level, own.level

    def configure(*, as_json: bool) -> StringIO:
        stream = StringIO()
        logs.configure("info", as_json=as_json, stream=stream)
        return stream

    yield configure
    root.handlers[:], root.level, own.level = before
    logging.getLogger("hone")._cache.clear()  # type: ignore[attr-defined]


def test_lines_name_namespace_and_job(log_to: Callable[..., StringIO]) -> None:
    stream = log_to(as_json=True)
    log = logging.getLogger("hone.test")
    with about("team-a", "sft-1"):
        log.warning("it waits for %s", "room")
    log.info("nobody's")
    try:
        raise ValueError("a bug")
    except ValueError:
        log.exception("it failed")
    first, second, third = map(json.loads, stream.getvalue().splitlines())
    assert (first["level"], first["message"]) == ("warning", "it waits for room")
    assert (first["namespace"], first["job"], first["logger"]) == ("team-a", "sft-1", "hone.test")
    assert datetime.fromisoformat(first["time"]).tzinfo is not None
    assert (second["namespace"], second["job"]) == ("", "")
    assert "ValueError: a bug" in third["trace"]


def test_lines_for_people_do_too(log_to: Callable[..., StringIO]) -> None:
    stream = log_to(as_json=False)
    with about("team-a", "sft-1"):
        logging.getLogger("hone.test").info("it runs")
    logging.getLogger("other").info("nobody asked")
    (line,) = stream.getvalue().splitlines()
    assert line.endswith("INFO hone.test: it runs [team-a/sft-1]")
