"""Publishing: the fence, the outputs with their manifests, the record of the run. All that the trainer stores goes
here.

Called by the supervisor. An attempt that is not the current one any more writes nothing.
"""

import json
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from hone.job import EventType
from hone.run import Run, TrainerExit
from hone.storage import JobLayout, Manifest, open_store, upload_directory
from hone_trainer.failure import RunFailed
from hone_trainer.report import EventLog

OUTPUT_KINDS = ("adapter", "merged", "model")


class Publisher:
    """The artefact store as one attempt may use it."""

    def __init__(self, run: Run, events: EventLog) -> None:
        self._run = run
        self._events = events
        self._layout = JobLayout(run.namespace, run.job)
        self._store = open_store(run.store)

    def claim(self) -> None:
        """Make this attempt the current one, and prove that the store can be written. Raises FENCED or a
        StorageError."""
        wanted = json.dumps({"attempt": self._run.attempt, "nonce": self._run.nonce}).encode()
        while True:
            current = self._store.get_versioned(self._layout.current)
            if current is None:
                if self._store.create(self._layout.current, wanted):
                    break
            elif self._owner(current.data) > self._run.attempt:
                raise self._fenced(self._owner(current.data))
            elif current.data == wanted or self._store.replace(self._layout.current, wanted, version=current.version):
                break
        text = yaml.safe_dump(self._run.spec.to_mapping(), sort_keys=False, allow_unicode=True)
        self._store.put_bytes(self._layout.spec, text.encode())

    def publish(self, scratch: Path, *, seconds: float) -> None:
        """Send every output, read it back, then the record; nothing is called complete before its manifest was read."""
        self._check_fence()
        self._events.write(EventType.PHASE, "uploading", fields={"phase": "uploading"})
        record = json.loads((scratch / "worker.json").read_text(encoding="utf-8"))
        outputs = {}
        for kind in OUTPUT_KINDS:
            if (directory := scratch / "outputs" / kind).is_dir():
                outputs[kind] = self._send(kind, directory)
                shutil.rmtree(directory)
        self._check_fence()
        result = self._result(record, outputs, seconds)
        self._store.put_bytes(self._layout.result, json.dumps(result, indent=2, ensure_ascii=False).encode())

    def keep_events(self, path: Path) -> None:
        """Store the attempt's events beside its outputs, however it ended."""
        key = self._layout.attempt(self._run.attempt).metrics
        self._store.put_bytes(key, path.read_bytes())

    def close(self) -> None:
        """Give connections back."""
        self._store.close()

    def _send(self, kind: str, directory: Path) -> Manifest:
        prefix: str = getattr(self._layout, kind)
        self._store.delete(prefix)  # what an earlier attempt left before it died; this one owns the job
        manifest = upload_directory(self._store, directory, prefix)
        uri = self._store.url(prefix)
        fields = {"kind": kind, "uri": uri, "size_bytes": str(manifest.size_bytes), "sha256": manifest.digest}
        self._events.write(EventType.OUTPUT, f"{kind} is complete: {uri}", fields=fields)
        return manifest

    def _result(self, record: Mapping[str, Any], outputs: Mapping[str, Manifest], seconds: float) -> dict[str, Any]:
        described = {
            kind: {
                "uri": self._store.url(getattr(self._layout, kind)),
                "size_bytes": manifest.size_bytes,
                "sha256": manifest.digest,
            }
            for kind, manifest in outputs.items()
        }
        head = {"job": self._run.job, "namespace": self._run.namespace, "attempt": self._run.attempt}
        durations = {**record["durations_s"], "total": round(seconds, 3)}
        end = datetime.now(UTC).isoformat()
        return {**head, "end_time": end, **record, "durations_s": durations, "outputs": described}

    def _check_fence(self) -> None:
        current = self._store.get_versioned(self._layout.current)
        owner = self._owner(current.data) if current else 0
        if owner != self._run.attempt:
            raise self._fenced(owner)

    def _owner(self, data: bytes) -> int:
        return int(json.loads(data)["attempt"])

    def _fenced(self, owner: int) -> RunFailed:
        return RunFailed(
            TrainerExit.FENCED,
            f"Attempt {owner} owns job {self._run.job} now; attempt {self._run.attempt} stops and writes nothing.",
        )
