"""Publishing: the fence, the outputs with their manifests, the record of the run. All that the trainer stores goes
here.

Called by the supervisor of the first node; others send their shares of checkpoints. A writer that is not the current
one any more touches nothing of another's.

Why a look at the pointer before each write is not enough: between the look and the write a machine may stand still for
hours (a paused virtual machine, a partitioned network), and then write over what a newer attempt published meanwhile;
S3 has no conditional delete, and conditional multipart uploads not everywhere. So no two writers have a key in common:

1. `current.json` names the current writer. Claiming it is one conditional write that raises `epoch` by one, so every
   epoch belongs to one writer: of two attempts, of two pods of one attempt, and of two Jobs of one name.
2. Outputs and events go to keys that belong to the epoch alone (WriterLayout). Nothing there is ever replaced or
   deleted by another writer, and nothing needs to be: a late writer fills its own place, which nobody reads.
3. `result.json`, `spec.yaml` and `report.html` are the job's. They are written only over what an older
   epoch wrote, by a conditional write on the version that was read, so a late writer cannot undo a newer one's.

The pointer is looked at all the same, before the work and before each kind of output: that saves useless work and ends
a writer that was overtaken, with FENCED. What a writer stored that died stays until the job is deleted.
"""

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from hone.errors import IntegrityError, NotFound
from hone.job import EventType
from hone.run import ResumePoint, Run, TrainerExit, spec_hash
from hone.spec.outputs import output_kinds
from hone.storage import (
    JobLayout,
    Manifest,
    ManifestFile,
    WriterLayout,
    download_directory,
    files_of,
    holds_file,
    open_store,
    read_manifest,
    send_files,
    upload_directory,
)
from hone_trainer.failure import RunFailed
from hone_trainer.report import EventLog
from hone_trainer.scrub import Scrubber

OUTPUT_KINDS = ("adapter", "merged", "model")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What current.json holds: which writer the job belongs to."""

    attempt: int
    nonce: str
    epoch: int
    """One more than that of the claim before."""
    writer: str
    """Random, one for each trainer process."""
    pod: str = ""
    """Uid of the pod, for people."""
    is_first: bool = True
    """Whether it is the first claim of its attempt."""

    def to_json(self) -> bytes:
        """Every claim has other bytes than any before it, as conditional writes need it."""
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_json(data: bytes) -> "Claim":
        """The other way round; what an earlier version wrote has no epoch and counts as the first."""
        found = {"epoch": 1, "writer": "", **json.loads(data)}
        return Claim(**{name: found[name] for name in Claim.__dataclass_fields__ if name in found})


class Publisher:
    """The artefact store as one trainer may use it."""

    def __init__(self, run: Run, events: EventLog, *, environment: Mapping[str, str], pod: str = "") -> None:
        self._run, self._events, self._pod = run, events, pod
        self._writer = secrets.token_hex(8)
        self._scrubber = Scrubber(environment)
        self._job = JobLayout(run.namespace, run.job)
        self._claim: Claim | None = None
        self._result: dict[str, Any] = {}
        """What result.json holds, once it is written."""
        self._store = open_store(run.store)

    def finished(self) -> dict[str, Any] | None:
        """The record of complete results of this very request, when they are there; read back but for their bytes."""
        try:
            result = json.loads(self._store.get_bytes(self._job.result))
        except (NotFound, ValueError):
            return None
        if not isinstance(result, dict) or result.get("spec_hash") != spec_hash(self._run.spec):
            return None
        outputs = result.get("outputs", {})
        complete = set(output_kinds(self._run.spec)) <= outputs.keys() and all(map(self._is_there, outputs.values()))
        return result if complete else None

    def tell_finished(self, result: Mapping[str, Any]) -> None:
        """Report results that were there already, as if they had just been sent."""
        self._events.write(
            EventType.NOTE,
            f"Complete results of this request are in the store already (attempt {result['attempt']}, "
            f"{result['end_time']}): nothing is trained.",
        )
        for kind, described in result["outputs"].items():
            self._tell_output(kind, described)

    def claim(self) -> None:
        """Make this the job's writer, and prove that the store can be written. Raises FENCED or a StorageError."""
        key = self._job.current
        while True:
            current = self._store.get_versioned(key)
            before = Claim.from_json(current.data) if current else None
            if before and before.attempt > self._run.attempt:
                raise self._fenced(before)
            if before and before.writer == self._writer:  # the answer to our own write was lost
                self._claim = before
                break
            mine = Claim(
                attempt=self._run.attempt,
                nonce=self._run.nonce,
                epoch=before.epoch + 1 if before else 1,
                writer=self._writer,
                pod=self._pod,
                is_first=before is None or before.attempt < self._run.attempt,
            )
            done = (
                self._store.replace(key, mine.to_json(), version=current.version)
                if current
                else self._store.create(key, mine.to_json())
            )
            if done:
                self._claim = mine
                break
        self._write_spec()

    def publish(self, scratch: Path, *, seconds: float) -> None:
        """Send every output, read it back, then the record; nothing is called complete before its manifest was read."""
        self._events.write(EventType.PHASE, "uploading", fields={"phase": "uploading"})
        record = json.loads((scratch / "worker.json").read_text(encoding="utf-8"))
        outputs = {}
        for kind in OUTPUT_KINDS:
            if (directory := scratch / "outputs" / kind).is_dir():
                self._check_fence()
                outputs[kind] = self._send(kind, directory)
        self._check_fence()
        self._result = self._record(record, outputs, seconds)
        self._write_result()

    def files(self, kind: str) -> Sequence[ManifestFile]:
        """Files of an output that was published, as its manifest in the store lists them."""
        described = self._result["outputs"][kind]
        return read_manifest(self._store, self._job.output(described["place"]), digest=described["sha256"]).files

    def record_push(self, outcome: Mapping[str, Any]) -> None:
        """Add what became of the push to the record; what was published stays as it is."""
        self._result["hub"] = dict(outcome)
        self._write_result()

    def publish_checkpoint(
        self, directory: Path, *, step: int, removes: Sequence[str], elsewhere: Sequence[ManifestFile] = ()
    ) -> str:
        """Send a checkpoint, tell of it, and delete those that it replaces; the answer is its place.

        `elsewhere` are the files of other nodes, which are in the store already.
        """
        self._check_fence()
        key = self._layout.checkpoint(step)
        manifest = upload_directory(self._store, directory, key, elsewhere=elsewhere)
        place, uri = self._layout.place(key), self._store.url(key)
        fields = {
            "place": place,
            "uri": uri,
            "size_bytes": str(manifest.size_bytes),
            "sha256": manifest.digest,
            "removes": " ".join(removes),
        }
        self._events.write(EventType.CHECKPOINT, f"the checkpoint of step {step} is complete", step=step, fields=fields)
        for old in removes:
            self._store.delete(self._job.output(old))
        return place

    def has_shares(self, step: int, files: Sequence[ManifestFile]) -> bool:
        """Whether the files of other nodes are in the store."""
        return all(holds_file(self._store, self._layout.checkpoint(step), file) for file in files)

    def send_share(self, directory: Path, *, step: int) -> None:
        """Send this node's files of a checkpoint to where the first node's are; it makes the checkpoint complete."""
        current = self._store.get_versioned(self._job.current)
        self._claim = Claim.from_json(current.data) if current else None
        if self._claim is None or self._claim.nonce != self._run.nonce:
            owner, self._claim = self._claim, None
            raise self._fenced(owner)
        send_files(self._store, directory, self._layout.checkpoint(step), files_of(directory))

    def fetch_checkpoint(self, point: ResumePoint, directory: Path) -> None:
        """Bring a checkpoint of this job. Raises NotFound, or IntegrityError when it is not what was recorded."""
        download_directory(self._store, self._job.output(point.place), directory, digest=point.sha256)

    def keep_events(self, path: Path) -> None:
        """Store the attempt's events beside its outputs, however it ended."""
        self._store.put_bytes(self._layout.metrics, path.read_bytes())

    def keep_trackers(self, directory: Path) -> str:
        """Store what the trackers wrote; the answer is where it lies."""
        upload_directory(self._store, directory, self._layout.trackers)
        return self._store.url(self._layout.trackers)

    def earlier_events(self) -> list[list[bytes]]:
        """Lines of the events of each attempt before this one, as its first writer kept them; none where it did not."""
        found = []
        for number in range(1, self._run.attempt):
            try:
                found.append(self._store.get_bytes(self._job.attempt(number).metrics).splitlines())
            except NotFound:
                found.append([])
        return found

    def keep_report(self, page: str) -> str:
        """Store the page about the run, unless a newer writer has; the answer is where it lies."""
        assert self._claim is not None
        mark = f"<!-- attempt {self._claim.attempt}, epoch {self._claim.epoch} -->\n"
        self._write_over_older(self._job.report, (page + mark).encode(), epoch_of=_epoch_of_report)
        return self._store.url(self._job.report)

    @property
    def owns_job(self) -> bool:
        """Whether it has claimed the job."""
        return self._claim is not None

    def close(self) -> None:
        """Give connections back."""
        self._store.close()

    @property
    def _layout(self) -> WriterLayout:
        assert self._claim is not None
        return WriterLayout(self._job, self._claim.attempt, self._claim.epoch, self._claim.is_first)

    def _write_spec(self) -> None:
        assert self._claim is not None
        text = yaml.safe_dump(self._run.spec.to_mapping(), sort_keys=False, allow_unicode=True)
        head = f"# attempt {self._claim.attempt}, epoch {self._claim.epoch}\n"
        self._write_over_older(self._job.spec, (head + text).encode(), epoch_of=_epoch_of_spec)

    def _send(self, kind: str, directory: Path) -> dict[str, Any]:
        prefix = self._layout.output(kind)
        manifest = upload_directory(self._store, directory, prefix)
        described = self._describe(kind, manifest)
        self._tell_output(kind, described)
        return described

    def _describe(self, kind: str, manifest: Manifest) -> dict[str, Any]:
        return {
            "uri": self._store.url(self._layout.output(kind)),
            "place": self._layout.place(self._layout.output(kind)),
            "size_bytes": manifest.size_bytes,
            "sha256": manifest.digest,
        }

    def _tell_output(self, kind: str, described: Mapping[str, Any]) -> None:
        fields = {"kind": kind, **{name: str(value) for name, value in described.items()}}
        self._events.write(EventType.OUTPUT, f"{kind} is complete: {described['uri']}", fields=fields)

    def _is_there(self, described: Mapping[str, Any]) -> bool:
        prefix = self._job.output(described["place"])
        try:
            manifest = read_manifest(self._store, prefix, digest=described["sha256"])
        except (NotFound, IntegrityError):
            return False
        return all(holds_file(self._store, prefix, file) for file in manifest.files)

    def _write_result(self) -> None:
        text = json.dumps(self._scrubber.value(self._result), indent=2, ensure_ascii=False)
        self._write_over_older(self._job.result, text.encode(), epoch_of=_epoch_of_result)

    def _record(self, record: Mapping[str, Any], outputs: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        assert self._claim is not None
        head = {
            "job": self._run.job,
            "namespace": self._run.namespace,
            "attempt": self._run.attempt,
            "epoch": self._claim.epoch,
            "spec_hash": spec_hash(self._run.spec),
        }
        durations = {**record["durations_s"], "total": round(seconds, 3)}
        end = datetime.now(UTC).isoformat()
        return {**head, "end_time": end, **record, "durations_s": durations, "outputs": dict(outputs)}

    def _write_over_older(self, key: str, data: bytes, *, epoch_of: Callable[[bytes], int]) -> None:
        """Write one of the job's own objects unless a newer writer has; of two writers the newer one's stays."""
        assert self._claim is not None
        while True:
            there = self._store.get_versioned(key)
            if there is None:
                if self._store.create(key, data):
                    return
            elif there.data == data:
                return
            elif epoch_of(there.data) > self._claim.epoch:
                self._check_fence()
                raise self._fenced(None)
            elif self._store.replace(key, data, version=there.version):
                return

    def _check_fence(self) -> None:
        current = self._store.get_versioned(self._job.current)
        owner = Claim.from_json(current.data) if current else None
        if owner is None or owner.writer != self._writer:
            raise self._fenced(owner)

    def _fenced(self, owner: Claim | None) -> RunFailed:
        who = "Nobody"
        if owner:
            who = f"Attempt {owner.attempt}"
            if owner.attempt == self._run.attempt:
                who += f" of another pod ({owner.pod})" if owner.pod else " of another process"
        return RunFailed(
            TrainerExit.FENCED,
            f"{who} owns job {self._run.job} now; attempt {self._run.attempt} stops and writes nothing.",
        )


def _epoch_of_result(data: bytes) -> int:
    try:
        return int(json.loads(data)["epoch"])
    except (ValueError, KeyError, TypeError):
        return 0  # of an earlier version, or nobody's


def _epoch_of_report(data: bytes) -> int:
    found = re.search(rb"<!-- attempt \d+, epoch (\d+) -->\n$", data)
    return int(found[1]) if found else 0


def _epoch_of_spec(data: bytes) -> int:
    found = re.match(rb"# attempt \d+, epoch (\d+)\n", data)
    return int(found[1]) if found else 0
