"""The bare client of bench.py: `python -m benchmarks.cluster.bare FILE CONCURRENCY KUBECONFIG` creates Jobs of a file.

Each line of the file is a Job as JSON. Every thread opens its connection first; then `ready` is printed, and a line on
stdin starts them. At the end it prints the seconds of processor time that they took.
"""

import json
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

from benchmarks.cluster.place import configuration_of
from kubernetes.client.rest import RESTClientObject


class Client:
    """Creates Jobs, so many at once."""

    def __init__(self, concurrency: int, kubeconfig: Path | str) -> None:
        configuration = configuration_of(kubeconfig)
        configuration.connection_pool_maxsize = concurrency
        self._host = configuration.host
        self._rest = RESTClientObject(configuration)
        self._threads = ThreadPoolExecutor(concurrency)
        self._together = Barrier(concurrency)

    def connect(self) -> None:
        """Open every connection."""
        list(self._threads.map(lambda _: self._connect(), range(self._together.parties)))

    def create_all(self, jobs: Iterable[dict[str, Any]]) -> None:
        """Create them."""
        list(self._threads.map(self.create, jobs))

    def create(self, job: dict[str, Any]) -> None:
        """Create one."""
        url = f"{self._host}/apis/batch/v1/namespaces/{job['metadata']['namespace']}/jobs"
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        answer = self._rest.pool_manager.request("POST", url, body=json.dumps(job).encode(), headers=headers)
        assert answer.status == 201 and answer.json()["metadata"]["uid"], answer.data

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()
        self._rest.close()

    def _connect(self) -> None:
        self._together.wait()
        self._rest.pool_manager.request("GET", f"{self._host}/version")


def main(path: str, concurrency: int, kubeconfig: str) -> None:
    """Create them all."""
    jobs = [json.loads(line) for line in Path(path).read_text().splitlines()]
    client = Client(concurrency, kubeconfig)
    client.connect()
    print("ready", flush=True)
    sys.stdin.readline()
    used = time.process_time()
    client.create_all(jobs)
    print(time.process_time() - used, flush=True)
    client.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
