"""Keys of the artefact store: every key that Hone writes is built here.

No text of a caller becomes a key unescaped: what is not a letter, digit, `.`, `_` or `-` is percent-encoded, and what
could leave its place (empty, `.`, `..`, absolute, control characters) is refused.
"""

import re
from dataclasses import dataclass
from urllib.parse import quote

from hone.errors import UserError

MAX_SEGMENT_BYTES = 255
"""What file systems allow in one name."""
MAX_KEY_BYTES = 1024
"""What S3 allows in one key."""
RESERVED = ".hone-"
"""Names that begin so belong to the stores themselves: temporary files, locks, probes."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_ESCAPED = re.compile(r"(?:[A-Za-z0-9._-]|%[0-9A-F]{2})+")


def join_key(key: str, *segments: str) -> str:
    """Append segments, escaped, to a key that is one already; the empty key is the root.

    A slash inside a segment is escaped too: `join_key("", "a/b")` is one level, `join_key("", "a", "b")` two.
    Raises UserError for a segment that names no place of its own.
    """
    joined = "/".join([*([key] if key else []), *(_escape(segment) for segment in segments)])
    return check_key(joined) if joined else ""


def join_path(key: str, path: str) -> str:
    """Append a relative path with `/` between its names, as a manifest writes it."""
    return join_key(key, *path.split("/"))


def check_key(key: str) -> str:
    """The key itself, when it is one that `join_key` could have built. Raises UserError otherwise."""
    for segment in key.split("/"):
        if not _ESCAPED.fullmatch(segment) or segment in {".", ".."}:
            raise _refused(key, f"its part {segment!r} is not an escaped name")
        if len(segment) > MAX_SEGMENT_BYTES:
            raise _refused(key, f"its part {segment[:40]!r}… is longer than {MAX_SEGMENT_BYTES} bytes")
    if len(key) > MAX_KEY_BYTES:
        raise _refused(key, f"it is longer than {MAX_KEY_BYTES} bytes")
    return key


def _escape(segment: str) -> str:
    if segment in {"", ".", ".."}:
        raise _refused(segment, "it names no place of its own")
    if segment.startswith("/"):
        raise _refused(segment, "it is an absolute path")
    if _CONTROL.search(segment):
        raise _refused(segment, "it holds control characters")
    if segment.startswith(RESERVED):
        raise _refused(segment, f"names that begin with {RESERVED!r} are the store's own")
    try:
        return quote(segment, safe="").replace("~", "%7E")
    except UnicodeEncodeError as error:
        raise _refused(segment, "it is not valid Unicode") from error


def _refused(text: str, why: str) -> UserError:
    shown = text if len(text) <= 80 else f"{text[:80]}…"
    return UserError(f"{shown!r} cannot be part of a storage key: {why}.", fix="Use a plain relative name.")


@dataclass(frozen=True)
class JobLayout:
    """Where everything of one job lies: `<namespace>/<job>/…`."""

    namespace: str
    job: str

    @property
    def root(self) -> str:
        """All of the job."""
        return join_key("", self.namespace, self.job)

    @property
    def spec(self) -> str:
        """The resolved request."""
        return join_key(self.root, "spec.yaml")

    @property
    def result(self) -> str:
        """What the run was: versions, seed, fingerprints, counts."""
        return join_key(self.root, "result.json")

    @property
    def report(self) -> str:
        """The page for people about the run."""
        return join_key(self.root, "report.html")

    @property
    def current(self) -> str:
        """The pointer that says which attempt owns the job; written by `create` and `replace` only."""
        return join_key(self.root, "current.json")

    @property
    def adapter(self) -> str:
        """Directory of the trained adapter."""
        return join_key(self.root, "adapter")

    @property
    def merged(self) -> str:
        """Directory of the model with the adapter merged in."""
        return join_key(self.root, "merged")

    @property
    def model(self) -> str:
        """Directory of the model that full fine-tuning leaves."""
        return join_key(self.root, "model")

    def output(self, place: str) -> str:
        """Directory of an output by its place below the root: `adapter`, or `attempt-2/adapter` of a later writer."""
        return join_path(self.root, place)

    def attempt(self, number: int) -> "AttemptLayout":
        """What belongs to attempt `number`, from 1."""
        return AttemptLayout(self, number)


@dataclass(frozen=True)
class AttemptLayout:
    """Where everything of one attempt lies: `…/attempt-N/…`; attempts never write over each other."""

    job: JobLayout
    number: int

    @property
    def root(self) -> str:
        """All of the attempt."""
        return join_key(self.job.root, f"attempt-{self.number}")

    @property
    def metrics(self) -> str:
        """Events of the attempt, one JSON object a line."""
        return join_key(self.root, "metrics.jsonl")


@dataclass(frozen=True)
class WriterLayout:
    """Where one writer of a job may write, and nobody else ever does: writers are fenced by having no key in common.

    A writer is one trainer that has claimed the job; `epoch` is the number of its claim, from 1, and `is_first` tells
    whether it was the first of its attempt (a pod that is started again, or a Job that is applied again, claims the
    same attempt anew). The first writer of all leaves its outputs where people look for them, `<job>/adapter`.
    """

    job: JobLayout
    attempt: int
    epoch: int
    is_first: bool

    @property
    def root(self) -> str:
        """All that is this writer's alone, but for the outputs of the first one of all."""
        attempt = self.job.attempt(self.attempt).root
        return attempt if self.is_first else join_key(attempt, f"claim-{self.epoch}")

    @property
    def metrics(self) -> str:
        """Events of the attempt, one JSON object a line."""
        return join_key(self.root, "metrics.jsonl")

    @property
    def trackers(self) -> str:
        """Directory of what TensorBoard, MLflow and Weights & Biases wrote."""
        return join_key(self.root, "trackers")

    def checkpoint(self, step: int) -> str:
        """Directory of the checkpoint after optimizer step `step`; names sort by step up to 999,999."""
        return join_key(self.root, "checkpoints", f"step-{step:06d}")

    def output(self, kind: str) -> str:
        """Directory of an output: adapter, merged or model."""
        return join_key(self.job.root if self.epoch == 1 else self.root, kind)

    def place(self, key: str) -> str:
        """A key of these below the job's root, as an event tells it: `JobLayout.output` gives the key again."""
        return key.removeprefix(f"{self.job.root}/")
