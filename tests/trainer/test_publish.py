"""The fence: a writer that is late, however late and wherever it stood still, touches nothing of a newer one's.

On the file store and on a real S3 server. A store that lets a newer writer come and finish, just before one of its own
writes goes out, stands for a machine that was paused between looking and writing.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hone.run import TrainerExit
from hone.storage import ArtifactStore, FileStore, JobLayout, open_store, verify_directory
from hone_trainer.failure import RunFailed
from hone_trainer.publish import Claim, Publisher
from hone_trainer.report import EventLog

from ..integration.servers import find_tool, run_s3
from .conftest import Attempt, MakeAttempt

LAYOUT = JobLayout("default", "tiny-1")


@pytest.fixture(scope="module")
def s3_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    program = find_tool("versitygw")
    if program is None:
        pytest.skip("versitygw is not built: make servers")
    with run_s3(program, tmp_path_factory.mktemp("s3")) as server:
        server.make_bucket("fences")
        yield {
            "AWS_ENDPOINT_URL_S3": server.endpoint,
            "AWS_ACCESS_KEY_ID": server.access_key,
            "AWS_SECRET_ACCESS_KEY": server.secret_key,
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@pytest.fixture(params=["file", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an empty store."""
    if request.param == "file":
        return f"file://{tmp_path}/fences"
    for name, value in request.getfixturevalue("s3_environment").items():
        monkeypatch.setenv(name, value)
    return f"s3://fences/{tmp_path.name}"


class Writer:
    """One trainer that has trained, and publishes."""

    def __init__(self, attempt: Attempt, *, weights: str, pod: str = "") -> None:
        self.attempt, self.weights = attempt, weights
        self.publisher = Publisher(attempt.run, EventLog(attempt.directory.events), environment={}, pod=pod)

    def finish_training(self) -> "Writer":
        output = self.attempt.directory.scratch / "outputs" / "adapter"
        output.mkdir(parents=True)
        (output / "weights").write_text(self.weights)
        (self.attempt.directory.scratch / "worker.json").write_text('{"durations_s": {}}')
        return self

    def publish(self) -> None:
        self.publisher.publish(self.attempt.directory.scratch, seconds=1)
        self.publisher.keep_events(self.attempt.directory.events)

    def fences_itself(self) -> None:
        with pytest.raises(RunFailed) as caught:
            self.publish()
        assert caught.value.code == TrainerExit.FENCED


class Pausing:
    """A store that stands still before one call, while `meanwhile` runs, and then goes on as if nothing had been."""

    def __init__(self, store: ArtifactStore, call: str, key: str, meanwhile: Callable[[], None]) -> None:
        self._store, self._call, self._key = store, call, key
        self._meanwhile: Callable[[], None] | None = meanwhile

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name != self._call:
            return method

        def call(*arguments: Any, **options: Any) -> Any:
            if self._meanwhile and any(str(argument).endswith(self._key) for argument in arguments[:2]):
                meanwhile, self._meanwhile = self._meanwhile, None
                meanwhile()
            return method(*arguments, **options)

        return call


MakeWriter = Callable[..., Writer]


@pytest.fixture
def writer(make_attempt: MakeAttempt, root: str) -> Iterator[MakeWriter]:
    made: list[Writer] = []

    def make(attempt: int = 1, *, weights: str, pod: str = "", store: str = root) -> Writer:
        one = make_attempt(attempt=attempt)
        object.__setattr__(one.run, "store", store)
        made.append(Writer(one, weights=weights, pod=pod))
        return made[-1]

    yield make
    for one in made:
        one.publisher.close()


def result(store: ArtifactStore) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(store.get_bytes(LAYOUT.result))
    return data


def weights_of(store: ArtifactStore) -> str:
    """The outputs that the job's record names, read back byte by byte."""
    described = result(store)["outputs"]["adapter"]
    prefix = LAYOUT.output(described["place"])
    verify_directory(store, prefix, digest=described["sha256"])
    return store.get_bytes(f"{prefix}/weights").decode()


def stand_still(late: Writer, call: str, key: str, meanwhile: Callable[[], None]) -> None:
    late.publisher._store = Pausing(late.publisher._store, call, key, meanwhile)  # type: ignore[assignment]


def test_the_first_writer_leaves_its_outputs_where_people_look(writer: MakeWriter, root: str) -> None:
    one = writer(weights="one").finish_training()
    one.publisher.claim()
    one.publish()
    store = open_store(root)
    assert result(store)["outputs"]["adapter"]["place"] == "adapter"
    assert store.get_bytes(f"{LAYOUT.adapter}/weights") == b"one"
    assert store.get_bytes(LAYOUT.attempt(1).metrics) == one.attempt.directory.events.read_bytes()
    assert store.get_bytes(LAYOUT.spec).startswith(b"# attempt 1, epoch 1\nname: tiny")
    store.close()


@pytest.mark.parametrize(
    ("call", "key"),
    [
        ("put_file", "adapter/weights"),
        ("create", "adapter/MANIFEST.json"),
        ("get_versioned", "current.json"),
        ("create", "result.json"),
    ],
)
@pytest.mark.parametrize("attempts", [(1, 2), (1, 1), (2, 2)])
def test_a_writer_that_stood_still_before_a_write_undoes_nothing(
    writer: MakeWriter, root: str, call: str, key: str, attempts: tuple[int, int]
) -> None:
    late = writer(attempts[0], weights="late", pod="uid-1").finish_training()
    late.publisher.claim()

    def newer_one_finishes() -> None:
        newer = writer(attempts[1], weights="newer", pod="uid-2").finish_training()
        newer.publisher.claim()
        newer.publish()

    stand_still(late, call, key, newer_one_finishes)
    late.fences_itself()
    store = open_store(root)
    assert weights_of(store) == "newer"
    assert (result(store)["attempt"], result(store)["epoch"]) == (attempts[1], 2)
    late.publisher.keep_events(late.attempt.directory.events)
    assert weights_of(store) == "newer"
    store.close()


def test_a_writer_that_stood_still_in_its_claim_does_not_take_the_job_back(writer: MakeWriter, root: str) -> None:
    late = writer(1, weights="late").finish_training()

    def newer_one_claims() -> None:
        writer(2, weights="newer").publisher.claim()

    stand_still(late, "create", "current.json", newer_one_claims)
    with pytest.raises(RunFailed, match="Attempt 2 owns job tiny-1 now"):
        late.publisher.claim()


def test_of_two_pods_of_one_attempt_the_later_one_owns_the_job(writer: MakeWriter, root: str) -> None:
    first, second = (writer(1, weights=pod, pod=pod).finish_training() for pod in ("uid-1", "uid-2"))
    first.publisher.claim()
    second.publisher.claim()
    with pytest.raises(RunFailed, match=r"Attempt 1 of another pod \(uid-2\) owns job tiny-1 now"):
        first.publish()
    second.publish()
    store = open_store(root)
    assert weights_of(store) == "uid-2"
    assert result(store)["outputs"]["adapter"]["place"] == "attempt-1/claim-2/adapter"
    store.close()


def test_an_overtaken_writer_that_was_complete_is_overwritten_in_the_record_only(writer: MakeWriter, root: str) -> None:
    old = writer(1, weights="old").finish_training()
    old.publisher.claim()
    old.publish()
    new = writer(2, weights="new").finish_training()
    new.publisher.claim()
    new.publish()
    store = open_store(root)
    assert weights_of(store) == "new"
    verify_directory(store, LAYOUT.adapter)
    assert store.get_bytes(f"{LAYOUT.adapter}/weights") == b"old"
    store.close()


def test_results_count_as_finished_only_for_their_own_request_and_while_all_of_them_is_there(
    writer: MakeWriter, root: str
) -> None:
    one, again, other = writer(1, weights="one").finish_training(), writer(2, weights="again"), writer(2, weights="x")
    training = other.attempt.run.spec.training.model_copy(update={"seed": 7})
    object.__setattr__(other.attempt.run, "spec", other.attempt.run.spec.model_copy(update={"training": training}))
    assert again.publisher.finished() is None
    one.publisher.claim()
    one.publish()
    found = again.publisher.finished()
    assert found is not None and found["attempt"] == 1
    assert other.publisher.finished() is None
    store = open_store(root)
    store.put_bytes(f"{LAYOUT.adapter}/weights", b"shorter than it was" if root.startswith("file") else b"")
    assert again.publisher.finished() is None
    store.delete(f"{LAYOUT.adapter}/MANIFEST.json")
    assert again.publisher.finished() is None
    store.close()


def test_a_pointer_of_an_earlier_version_is_understood(tmp_path: Path, writer: MakeWriter) -> None:
    store = FileStore(tmp_path / "older")
    store.create(LAYOUT.current, b'{"attempt": 1, "nonce": "n"}')
    newer = writer(2, weights="x", store=store.uri)
    newer.publisher.claim()
    claim = Claim.from_json(store.get_bytes(LAYOUT.current))
    assert (claim.attempt, claim.epoch, claim.is_first) == (2, 2, True)


def test_a_lost_answer_to_a_claim_is_not_taken_for_another_writer(writer: MakeWriter, root: str) -> None:
    one = writer(1, weights="one")
    one.publisher.claim()
    one.publisher.claim()
    store = open_store(root)
    assert Claim.from_json(store.get_bytes(LAYOUT.current)).epoch == 1
    store.close()


def test_the_record_holds_no_secret(make_attempt: MakeAttempt) -> None:
    attempt = make_attempt()
    publisher = Publisher(attempt.run, EventLog(attempt.directory.events), environment={"HF_TOKEN": "canary-hub-token"})
    scratch = attempt.directory.scratch
    (scratch / "outputs" / "adapter").mkdir(parents=True)
    (scratch / "outputs" / "adapter" / "weights").write_text("x")
    (scratch / "worker.json").write_text('{"durations_s": {}, "base": {"source": "said canary-hub-token"}}')
    publisher.claim()
    publisher.publish(scratch, seconds=1)
    assert attempt.result()["base"] == {"source": "said ***"}
    assert "canary" not in (attempt.store / "result.json").read_text()


def test_a_late_writer_does_not_put_its_page_over_a_newer_one_s(writer: MakeWriter, root: str) -> None:
    late, newer = writer(1, weights="late"), writer(2, weights="newer")
    late.publisher.claim()
    late.publisher.keep_report("<p>first</p>\n")
    stand_still(
        late, "replace", "report.html", lambda: (newer.publisher.claim(), newer.publisher.keep_report("<p>newer</p>\n"))
    )
    with pytest.raises(RunFailed) as caught:
        late.publisher.keep_report("<p>late</p>\n")
    assert caught.value.code == TrainerExit.FENCED
    store = open_store(root)
    assert store.get_bytes(LAYOUT.report) == b"<p>newer</p>\n<!-- attempt 2, epoch 2 -->\n"
    store.close()
