"""A place where real trainers fail: a tenant of an installation, and what a test does to its jobs. Used by
test_failures.py.

What runs in a pod runs on this machine, so a test reads the trainer's own events from its scratch volume, within
milliseconds, and kills the one process that it means.
"""

import json
import os
import re
import signal
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Event as Flag
from threading import Thread
from typing import Any, TypeVar

from kubernetes.client.configuration import Configuration
from kubernetes.config import load_kube_config

from hone import Client
from hone.backends.kubernetes.client import Api, path_of, pods_path
from hone.errors import HoneError, Unavailable
from hone.job import EventType, Job, State
from hone.manifests import names

from .harness import process
from .harness.access import Cluster
from .harness.api import KubectlFailed
from .installation import Installation

Json = dict[str, Any]
START_S = 240.0
"""A trainer has come to any of its phases within this, with four others beside it on two cores and a cold disk."""
_INDEX = "batch.kubernetes.io/job-completion-index"
_Seen = TypeVar("_Seen")


def administrator(cluster: Cluster) -> Api:
    """The API server for a test: kubectl costs a tenth of a second of a processor for each look."""
    configuration = Configuration()
    load_kube_config(str(cluster.kubeconfig), client_configuration=configuration)
    return Api(configuration)


@dataclass(kw_only=True)
class Place:
    """One tenant of an installation, and a caller who submits there."""

    hone: Installation
    tenant: str
    request: Json
    api: Api
    client: Client

    @property
    def cluster(self) -> Cluster:
        return self.hone.cluster

    def kubectl(self, *words: str) -> str:
        """In the tenant's namespace."""
        return self.cluster.kubectl(*words, namespace=self.tenant)

    def submit(self, name: str, **changes: Any) -> str:
        """A job that trains four steps, with changes of whole parts of the request but `training`, which is merged."""
        training = {**self.request["training"], **changes.pop("training", {})}
        return self.client.submit({**self.request, "name": name, "training": training, **changes}).id

    def train(self, name: str, **changes: Any) -> str:
        """One that trains until somebody ends it, and does so now."""
        job = self.submit(
            name, **{"training": {"max_steps": 1_000_000}, "reporting": {"logging_steps": 500}, **changes}
        )
        self.reach(job, "training")
        self.wait(job, "it is seen to run", lambda: self.client.get(job).state == State.RUNNING)
        return job

    def pods(self, job: str) -> list[Json]:
        """Those that are there."""
        query = {"labelSelector": f"{names.LABEL_JOB}={job}"}
        return [pod for page in self.api.pages(pods_path(self.tenant), **query) for pod in page["items"]]

    def pod(self, job: str, *, index: int = 0, attempt: int = 1) -> Json:
        """The pod of one node, once it has its place."""

        def placed() -> Json | None:
            for pod in self.pods(job):
                is_it = pod["metadata"]["annotations"].get(_INDEX, "0") == str(index)
                is_it &= pod["metadata"]["labels"][names.LABEL_ATTEMPT] == str(attempt)
                if is_it and pod["spec"].get("nodeName"):
                    return pod
            return None

        return self.wait(job, f"pod {index} of attempt {attempt} has a place", placed)

    def reach(self, job: str, phase: str, *, attempt: int = 1) -> Json:
        """Return the pod within milliseconds of its trainer's entering a phase."""
        pod = self.pod(job, attempt=attempt)
        self.wait(job, f"its trainer says {phase}", lambda: phase in self._phases(pod), every_s=0.005)
        return pod

    def kill_in(self, job: str, phase: str, who: str) -> None:
        """SIGKILL to one process of the first attempt while it is in a phase."""
        pod = self.reach(job, phase)
        self.kill(pod, who)
        assert self._phases(pod)[-1] == phase, f"{job}: it was in another phase when it was killed"

    def reach_step(self, job: str, step: int, *, attempt: int = 1) -> Json:
        """Return the pod within milliseconds of its trainer's telling an optimizer step, or a later one."""
        pod = self.pod(job, attempt=attempt)

        def steps() -> list[int]:
            return [int(found) for found in re.findall(r'"type": "progress".*?"step": (\d+)', self._told(pod))]

        self.wait(job, f"its trainer tells step {step}", lambda: max(steps(), default=0) >= step, every_s=0.005)
        return pod

    def evict(self, pod: Json) -> None:
        """As a drain does."""
        name = pod["metadata"]["name"]
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}}
        path = f"/api/v1/namespaces/{self.tenant}/pods/{name}/eviction"
        self.cluster.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(eviction))

    def _phases(self, pod: Json) -> list[str]:
        return re.findall(r'"phase": "(\w+)"', self._told(pod))

    def _told(self, pod: Json) -> str:
        """As the trainer wrote it; what it wrote last before it is killed, it tells nobody."""
        directory = self.cluster.directory_of(pod, "work") / "pods" / pod["metadata"]["uid"]
        try:
            return (directory / "events.jsonl").read_text(encoding="utf-8")
        except OSError:
            return ""

    def kill(self, pod: Json, who: str, *, number: signal.Signals = signal.SIGKILL, rank: int = 0) -> None:
        """Signal one process of a trainer: its `main` (the container's first), its `supervisor`, or a `worker`."""
        pid = self.wait(
            pod["metadata"]["name"], f"there is its {who}", lambda: self._find(pod, who, rank), every_s=0.005
        )
        os.kill(pid, number)

    def _find(self, pod: Json, who: str, rank: int) -> int | None:
        for pid in self.cluster.processes_of(pod):
            words = process.command_of(pid)
            if who == "worker":
                is_worker = "hone_trainer.worker" in words and "hone_trainer.launcher" not in words
                if is_worker and process.variable_of(pid, "RANK") in (str(rank), "" if rank == 0 else str(rank)):
                    return pid
            elif words[1:] == ["-m", "hone_trainer", "pod"] and process.is_first(pid) == (who == "main"):
                return pid
        return None

    def monitor(self, path: str, *, address: str = "") -> str:
        """What the service says of itself; `address` where the API server cannot be asked for it."""
        with urllib.request.urlopen(f"http://{address or self.address()}:8080{path}", timeout=10) as answer:
            return str(answer.read().decode())

    def address(self) -> str:
        """Of the service's pod, which this machine reaches."""
        return str(self.hone.pod()["status"]["podIP"])

    def wait(
        self, job: str, what: str, look: Callable[[], _Seen | None], *, timeout_s: float = START_S, every_s: float = 0.2
    ) -> _Seen:
        """Look until there is something true to see; what cannot be seen at the moment is looked at again."""
        deadline, seen = time.monotonic() + timeout_s, None
        while time.monotonic() < deadline:
            try:
                if seen := look():
                    return seen
            except Unavailable:
                pass
            time.sleep(every_s)
        raise AssertionError(f"{job}: {what}: not within {timeout_s:.0f} s. {self.describe(job)}")

    def describe(self, job: str) -> str:
        """What the service and the cluster know of a job, for a test that fails."""
        told: list[str] = []
        try:
            told += [f"{e.time:%H:%M:%S} {e.attempt} {e.type} {e.message}" for e in self.client.events(job)][-30:]
            for event in self.api.get(path_of("namespaces", self.tenant, "events"))["items"]:
                if event["involvedObject"]["name"].startswith(job):
                    told.append(f"{event['involvedObject']['name']}: {event['reason']}: {event.get('message', '')}")
            for pod in self.pods(job):
                told.append(f"{pod['metadata']['name']} {json.dumps(pod['status'])}")
                told += self.kubectl("logs", pod["metadata"]["name"], "--tail=15").splitlines()
        except (HoneError, KubectlFailed) as error:
            told.append(str(error))
        return "\n".join(told)

    def end(self, job: str) -> None:
        """Cancel it: nobody looks at it any more."""
        self.client.cancel(job)

    def second_attempt_trains(self, job: str) -> Job:
        """Return once attempt 2 trains; the job as it is then."""
        self.reach(job, "training", attempt=2)
        return self.wait(job, "attempt 2 is seen to run", lambda: self._runs_again(job))

    def _runs_again(self, job: str) -> Job | None:
        found = self.client.get(job)
        return found if found.state == State.RUNNING and len(found.attempts) == 2 else None

    def assert_trained_once(self, job: str, *, steps: int) -> None:
        """It succeeded, in one attempt by one pod; every step is told once and in order."""
        found = self.client.wait(job, timeout_s=START_S)
        assert found.state == State.SUCCEEDED, f"{found.state_reason} {self.describe(job)}"
        told = list(self.client.events(job))
        assert [event.step for event in told if event.type == EventType.PROGRESS] == list(range(1, steps + 1))
        seqs = [event.seq for event in told]
        assert seqs == sorted(set(seqs)) and len(found.attempts) == 1
        made = {"fieldSelector": f"involvedObject.name={job}-a1,reason=SuccessfulCreate"}
        (event,) = self.api.get(path_of("namespaces", self.tenant, "events"), **made)["items"]
        assert event["count"] == 1


@dataclass(kw_only=True)
class Ranks:
    """Watches the pods of a namespace: no two of them may run as one rank of one job at any time."""

    api: Api
    namespace: str
    doubles: list[str] = field(default_factory=list)
    """What was seen that must not be."""
    num_seen: int = 0
    """Containers that ran."""
    _running: dict[tuple[str, str], set[str]] = field(default_factory=lambda: defaultdict(set))
    _stop: Flag = field(default_factory=Flag)

    def __enter__(self) -> "Ranks":
        self._thread = Thread(target=self._watch, name="ranks", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)

    def _watch(self) -> None:
        query = {"watch": "true", "labelSelector": names.LABEL_JOB, "timeoutSeconds": "5"}
        while not self._stop.is_set():
            try:
                with self.api.stream(pods_path(self.namespace), query) as stream:
                    self._running.clear()  # a watch without a version begins with all that there is
                    for line in stream.lines():
                        self._take(json.loads(line))
            except HoneError:
                self._stop.wait(0.5)

    def _take(self, event: Mapping[str, Any]) -> None:
        pod = event["object"]
        if event["type"] not in ("ADDED", "MODIFIED", "DELETED"):
            return
        metadata = pod["metadata"]
        rank = (metadata["labels"][names.LABEL_JOB], metadata["annotations"].get(_INDEX, "0"))
        states = [container["state"] for container in pod["status"].get("containerStatuses", ())]
        runs = any("running" in state for state in states) and event["type"] != "DELETED"
        mine = self._running[rank]
        if runs and metadata["name"] not in mine:
            self.num_seen += 1
            mine.add(metadata["name"])
        elif not runs:
            mine.discard(metadata["name"])
        if len(mine) > 1:
            self.doubles.append(f"{' and '.join(sorted(mine))} ran as rank {rank[1]} of {rank[0]}")


def matches(says: str, text: str) -> bool:
    """Whether a text holds a sentence of the page, in which … is anything."""
    return re.search(".*".join(re.escape(part.strip()) for part in says.split("…")), text, re.DOTALL) is not None
