"""`python -m hone_trainer pod` as its container starts it: what it prints, leaves, refuses and survives."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hone.job import Event
from hone.modelinfo import load_shape
from hone.plan import Hardware, make_plan
from hone.run import ResumePoint, Run, RunDirectory, TrainerExit, is_retried
from hone.spec.parse import parse
from hone.storage import FileStore, JobLayout, verify_directory
from hone_trainer.failure import failure_from_json
from hone_trainer.report import parse_event

from ..integration.servers import find_tool, free_port, run_s3
from .conftest import merge

LONG = {"training": {"max_steps": 100_000}}
UID = 12345
"""Known to no passwd file."""


class Pod:
    """A container of one node, and what became of it."""

    def __init__(self, place: Path, run: Run, *, environment: Mapping[str, str], prefix: tuple[str, ...] = ()) -> None:
        self.place, self.run = place, run
        self.work = place / "work"
        self.work.mkdir(parents=True)
        (place / "run.yaml").write_text(run.to_yaml(), encoding="utf-8")
        base = {
            "PATH": os.environ["PATH"],
            "HONE_SPEC_FILE": str(place / "run.yaml"),
            "HONE_WORK": str(self.work),
            "HONE_TERMINATION_FILE": str(self.work / "termination-log"),
            "HONE_GPUS": "0",
            "HONE_CPU_LIMIT": "1",
            "HONE_MEMORY_LIMIT_BYTES": str(4 << 30),
            "POD_UID": f"uid-{place.name}",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        self.environment = {**base, **environment}
        self._prefix = prefix
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, stdout: Any = None) -> "Pod":
        command = [*self._prefix, sys.executable, "-m", "hone_trainer", "pod"]
        with (self.place / "output").open("wb") as log:
            out = log if stdout is None else stdout
            self.process = subprocess.Popen(command, stdout=out, stderr=out, env=self.environment, cwd="/")
        return self

    def wait(self, timeout_s: float = 240) -> int:
        assert self.process is not None
        return self.process.wait(timeout_s)

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.work / "pods" / self.environment["POD_UID"])

    def output(self) -> list[str]:
        return (self.place / "output").read_text(encoding="utf-8").splitlines()

    def events(self, kind: str = "") -> list[Event]:
        """As whoever has nothing but the pod's log reads them."""
        found = []
        for line in self.output():
            if line.startswith('{"seq"'):
                seq = json.loads(line)["seq"]
                found.append(parse_event(line.encode(), seq))
        return [event for event in found if not kind or event.type == kind]

    def losses(self) -> list[float]:
        return [event.metrics["loss"] for event in self.events("progress")]

    def message(self) -> dict[str, Any]:
        data = (self.work / "termination-log").read_bytes()
        assert len(data) <= 4096
        record: dict[str, Any] = json.loads(data)
        return record

    def has_stepped(self) -> bool:
        return self.directory.events.exists() and b'"progress"' in self.directory.events.read_bytes()


MakePod = Callable[..., Pod]


@pytest.fixture
def make_run(tmp_path: Path, tiny_model: Path, rows_file: Path) -> Callable[..., Run]:
    """A planned request, as the service or `hone render` writes it."""

    def make(changes: Mapping[str, Any] | None = None, *, job: str = "tiny-1") -> Run:
        request = {
            "name": "tiny",
            "model": {"source": f"file://{tiny_model}"},
            "dataset": {"source": f"file://{rows_file}"},
            "method": {"sft": {"max_length": 64}},
            "adapter": {"lora": {"rank": 4}},
            "training": {"max_steps": 4, "learning_rate": 1e-2, "micro_batch_size": 4, "global_batch_size": 8},
            "compute": {"gpus_per_node": 0},
        }
        spec = parse(merge(request, changes or {}))
        planned = make_plan(
            spec, load_shape(spec.model.source), Hardware(profiles={}, cpu_cores=2, memory_bytes=8 << 30)
        )
        return Run(
            namespace="default",
            job=job,
            attempt=1,
            nonce="nonce",
            spec=planned.spec,
            launch=planned.plan.launch,
            store=f"file://{tmp_path}/store",
            inputs={},
        )

    return make


@pytest.fixture
def make_pod(tmp_path: Path) -> Iterator[MakePod]:
    made: list[Pod] = []

    def make(run: Run, *, prefix: tuple[str, ...] = (), **environment: str) -> Pod:
        made.append(Pod(tmp_path / f"pod-{len(made)}", run, environment=environment, prefix=prefix))
        return made[-1]

    yield make
    for pod in made:
        if pod.process and pod.process.poll() is None:
            pod.process.kill()
            pod.process.wait()


def nodes(make_pod: MakePod, run: Run, **environment: str) -> list[Pod]:
    """One pod for each node, all on this machine."""
    port = str(free_port())
    return [
        make_pod(
            run, JOB_COMPLETION_INDEX=str(rank), HONE_MAIN_ADDRESS="127.0.0.1", HONE_MAIN_PORT=port, **environment
        ).start()
        for rank in range(run.launch.nodes)
    ]


def wait_for(found: Callable[[], Any], *, timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not found():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def container(work: Path) -> tuple[str, ...]:
    """A user without a name, as process 1 of a file system that is read-only but for one directory."""
    if (
        not shutil.which("unshare")
        or subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "true"], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("this user may not make namespaces (unshare)")
    script = (
        f"mount --make-rprivate / && mount --bind {work} {work} && mount -t proc proc /proc && "
        "mount -o remount,bind,ro / && "
        f'exec unshare --user --map-user={UID} --map-group={UID} "$@"'
    )
    return ("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script, "sh")


def test_a_pod_trains_under_any_user_on_a_read_only_root_and_tells_all_of_it(
    make_run: Callable[..., Run], make_pod: MakePod, tmp_path: Path
) -> None:
    run = make_run({"output": {"merged": True}})
    work = tmp_path / "pod-0" / "work"
    run = replace(run, store=f"file://{work}/store")
    pod = make_pod(run, prefix=container(work), HOME="/", TMPDIR="/no/such/place").start()
    assert pod.wait() == TrainerExit.SUCCEEDED, pod.output()[-20:]
    events = pod.events()
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [event.step for event in events if event.type == "progress"] == [1, 2, 3, 4]
    store = FileStore(work / "store")
    for event in pod.events("output"):
        key = JobLayout("default", "tiny-1").output(event.fields["place"])
        verify_directory(store, key, digest=event.fields["sha256"])
    assert [event.fields["kind"] for event in pod.events("output")] == ["adapter", "merged"]
    assert any(line.startswith("[rank 0] trainable params: 8,192") for line in pod.output())
    assert not (work / "termination-log").exists()
    # The same pod again, as a GitOps tool would apply it: nothing is trained twice.
    again = make_pod(run, HONE_WORK=str(tmp_path / "again")).start()
    assert again.wait() == TrainerExit.SUCCEEDED
    assert [event.type for event in again.events()] == ["note", "output", "output"]
    assert any("Complete results of this request are in the store already" in line for line in again.output())


def test_sigterm_is_passed_on_and_the_reason_is_left_for_kubernetes(
    make_run: Callable[..., Run], make_pod: MakePod
) -> None:
    pod = make_pod(make_run(LONG)).start()
    wait_for(pod.has_stepped)
    assert pod.process is not None
    pod.process.send_signal(signal.SIGTERM)
    assert pod.wait(120) == TrainerExit.INTERRUPTED
    assert pod.message()["failure_class"] == "PREEMPTED"
    told = pod.events("checkpoint")[-1]
    assert parse_event(json.dumps(pod.message()["checkpoint"]).encode(), pod.message()["checkpoint"]["seq"]) == told
    assert [event.type for event in pod.events()].count("failure") == 1


def supervisor_of(pod: Pod) -> int:
    """The child of the container's first process."""
    return int(json.loads(pod.directory.process.read_text())["pid"])


def test_a_supervisor_that_is_killed_is_spoken_for(make_run: Callable[..., Run], make_pod: MakePod) -> None:
    pod = make_pod(make_run(LONG)).start()
    wait_for(pod.has_stepped)
    worker = int((pod.directory.scratch / "worker-0.pid").read_text())
    os.kill(supervisor_of(pod), signal.SIGKILL)
    assert pod.wait(120) == 128 + signal.SIGKILL
    assert pod.message()["message"] == "The trainer's supervisor was killed by SIGKILL."
    wait_for(lambda: not Path(f"/proc/{worker}").exists(), timeout_s=10)


def test_nobody_reading_its_output_costs_nothing(make_run: Callable[..., Run], make_pod: MakePod) -> None:
    out, into = os.pipe()
    os.close(out)
    pod = make_pod(make_run()).start(stdout=into)
    os.close(into)
    assert pod.wait() == TrainerExit.SUCCEEDED
    assert b'"output"' in pod.directory.events.read_bytes()


def test_orphans_of_a_container_are_reaped() -> None:
    script = """
import os, sys, time
from hone_trainer.process import run_as_first, unblock_stop_signals

def body():
    unblock_stop_signals()
    for _ in range(3):
        if os.fork() == 0:
            if os.fork() == 0:
                time.sleep(0.2)  # an orphan by now
            os._exit(0)
        os.wait()
    time.sleep(0.8)
    first = os.getppid()
    states = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == first:
            states.append(fields[0])
    return 3 if "Z" in states else 7

sys.exit(run_as_first(body))
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 7


def test_a_stop_that_comes_before_anybody_listens_is_heard() -> None:
    script = """
import os, signal, sys, time
from hone_trainer.process import run_as_first
from hone_trainer.stop import stop_signals

def body():
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(0.3)  # the imports of a busy machine
    with stop_signals() as stop:
        return 5 if stop.asked_at else 6

sys.exit(run_as_first(body))
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 5


REFUSED: dict[str, tuple[Callable[[str], str], dict[str, str], str]] = {
    "a batch that the plan does not have": (
        lambda text: text.replace("micro_batch_size: 4", "micro_batch_size: 64", 1),
        {},
        "training.micro_batch_size is 64 in the request, and the launch plan beside it has 4",
    ),
    "rows that need more memory than the Job asks for": (
        lambda text: text.replace("max_length: 64", "max_length: 400000"),
        {},
        "GiB of memory on each node, and the Job's container may use 4.0 GiB",
    ),
    "a Job with less memory than planned": (
        lambda text: text,
        {"HONE_MEMORY_LIMIT_BYTES": str(100 << 20)},
        "and the Job's container may use 0.1 GiB",
    ),
    "more nodes than the Job has": (
        lambda text: text.replace("nodes: 1", "nodes: 3"),
        {},
        "the request has 3 nodes, and the Job has one",
    ),
    "GPUs that the request does not know of": (lambda text: text, {"HONE_GPUS": "8"}, "and the Job asks for 8"),
    "a field that nobody knows": (
        lambda text: text.replace("max_steps: 4", "max_stebs: 4"),
        {},
        "spec.training.max_stebs",
    ),
    "no YAML": (lambda text: "{", {}, "not valid"),
    "a schema of the future": (
        lambda text: text.replace("schema_version: 1", "schema_version: 99"),
        {},
        "use its image",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_was_edited_by_hand_is_refused_before_anything_is_touched(
    make_run: Callable[..., Run], make_pod: MakePod, tmp_path: Path, name: str
) -> None:
    edit, environment, expected = REFUSED[name]
    pod = make_pod(make_run(), **environment)
    file = pod.place / "run.yaml"
    file.write_text(edit(file.read_text()))
    assert pod.start().wait(120) == TrainerExit.USER, pod.output()
    assert expected in pod.message()["message"]
    assert pod.message()["failure_class"] == "USER"
    assert not (tmp_path / "store").exists()
    assert not pod.directory.log(0).exists()


def test_a_pod_without_its_request_says_where_it_looked(make_run: Callable[..., Run], make_pod: MakePod) -> None:
    pod = make_pod(make_run(), HONE_SPEC_FILE="/no/such/file")
    assert pod.start().wait(120) == TrainerExit.USER
    assert "The request cannot be read from /no/such/file" in pod.message()["message"]


def test_two_nodes_train_as_one_machine_with_as_many_processes(
    make_run: Callable[..., Run], make_pod: MakePod, tmp_path: Path
) -> None:
    changes = {
        "dataset": {"eval_fraction": 0.125},
        "training": {"max_steps": 6, "eval": {"steps": 2, "at_start": True, "keep_best": True}},
    }
    one = make_pod(make_run(merge(changes, {"compute": {"processes_per_node": 2}}), job="tiny-2"), HONE_CPU_LIMIT="2")
    assert one.start().wait() == 0, one.output()[-20:]
    run = make_run(merge(changes, {"compute": {"nodes": 2, "processes_per_node": 1}}))
    pods = nodes(make_pod, run)
    assert [pod.wait() for pod in pods] == [0, 0], [pod.output()[-20:] for pod in pods]
    assert len(one.losses()) == 6
    assert pods[0].losses() == pytest.approx(one.losses(), rel=1e-5)
    figures = [[event.metrics["eval_loss"] for event in pod.events("eval")] for pod in (one, pods[0])]
    assert figures[1] == pytest.approx(figures[0], rel=1e-5)
    result = json.loads((tmp_path / "store" / "default" / "tiny-1" / "result.json").read_text())
    assert (result["launch"]["nodes"], result["launch"]["processes_per_node"]) == (2, 1)
    # Only the first node reports and publishes; each prints what its own rank wrote.
    assert pods[1].events() == []
    assert (result["attempt"], result["epoch"]) == (1, 1)
    for rank, pod in enumerate(pods):
        assert any(line.startswith(f"[rank {rank}] trainable params") for line in pod.output())
        assert not any(line.startswith(f"[rank {1 - rank}]") for line in pod.output())


def test_a_node_alone_gives_back_what_it_holds(make_run: Callable[..., Run], make_pod: MakePod) -> None:
    run = make_run({"compute": {"nodes": 2, "processes_per_node": 1}})
    pods = [
        make_pod(
            run, JOB_COMPLETION_INDEX=rank, HONE_MAIN_ADDRESS="127.0.0.1", HONE_MAIN_PORT=str(free_port()),
            HONE_RENDEZVOUS_S="1",
        ).start()
        for rank in ("0", "1")
    ]  # fmt: skip
    assert [pod.wait(120) for pod in pods] == [TrainerExit.PEERS_MISSING] * 2
    assert pods[0].message()["message"].startswith("1 of 2 nodes did not come (node 1) within 1 s")
    assert pods[1].message()["message"].startswith("Node 0 cannot be reached")
    assert not pods[0].directory.log(0).exists()


def test_the_reason_of_the_node_that_failed_first_is_the_run_s(make_run: Callable[..., Run], make_pod: MakePod) -> None:
    pods = nodes(make_pod, make_run(merge(LONG, {"compute": {"nodes": 2, "processes_per_node": 1}})))
    wait_for(pods[0].has_stepped)
    os.kill(int((pods[1].directory.scratch / "worker-1.pid").read_text()), signal.SIGKILL)
    assert [pod.wait(120) for pod in pods] == [TrainerExit.WORKER_DIED] * 2
    for pod in pods:
        assert pod.message()["message"] == "The worker of rank 1 was killed by SIGKILL."
        assert pod.message()["rank"] == 1
    failures = [event.message for event in pods[0].events() if event.type == "failure"]
    assert failures == ["The worker of rank 1 was killed by SIGKILL."]


def test_a_node_that_goes_without_a_word_ends_the_run_at_once(make_run: Callable[..., Run], make_pod: MakePod) -> None:
    pods = nodes(make_pod, make_run(merge(LONG, {"compute": {"nodes": 2, "processes_per_node": 1}})))
    wait_for(pods[0].has_stepped)
    assert pods[1].process is not None
    pods[1].process.kill()
    began = time.monotonic()
    assert pods[0].wait(120) == TrainerExit.PEER_LOST
    assert time.monotonic() - began < 30
    assert pods[0].message()["message"].startswith("Node 1 went away without a word")


def test_a_node_that_is_drained_stops_all(make_run: Callable[..., Run], make_pod: MakePod) -> None:
    pods = nodes(make_pod, make_run(merge(LONG, {"compute": {"nodes": 2, "processes_per_node": 1}})))
    wait_for(pods[0].has_stepped)
    assert pods[1].process is not None
    pods[1].process.send_signal(signal.SIGTERM)
    codes = [pod.wait(120) for pod in pods]
    assert codes[0] == TrainerExit.INTERRUPTED
    assert codes[1] in (TrainerExit.INTERRUPTED, TrainerExit.PEER_LOST)
    assert pods[0].message()["failure_class"] == "PREEMPTED"


@pytest.mark.slow
@pytest.mark.xdist_group("sharding")
@pytest.mark.timeout(900)  # DeepSpeed compiles where nobody did
def test_nodes_that_split_the_weights_go_on_from_what_each_of_them_sent(
    make_run: Callable[..., Run], make_pod: MakePod, tmp_path: Path
) -> None:
    changes = {"training": {"max_steps": 40}, "compute": {"nodes": 2, "processes_per_node": 1, "strategy": "zero3"}}
    compiled = {"TORCH_EXTENSIONS_DIR": os.environ["TORCH_EXTENSIONS_DIR"]}
    first = make_run(changes)
    pods = nodes(make_pod, first, **compiled)
    wait_for(pods[0].has_stepped, timeout_s=600)
    assert pods[1].process is not None
    pods[1].process.send_signal(signal.SIGTERM)
    assert pods[0].wait() == TrainerExit.INTERRUPTED, pods[0].output()[-20:]
    [told] = pods[0].events("checkpoint")
    manifest = verify_directory(FileStore(tmp_path / "store" / "default" / "tiny-1"), told.fields["place"])
    assert {name for file in manifest.files for name in (Path(file.path).name,) if name.startswith("zero_pp_rank")} == {
        f"zero_pp_rank_{rank}_mp_rank_00_{what}_states.pt" for rank in (0, 1) for what in ("model", "optim")
    }
    point = ResumePoint(step=told.step or 0, place=told.fields["place"], sha256=told.fields["sha256"])
    again = nodes(make_pod, replace(first, attempt=2, nonce="again", resume=(point,)), **compiled)
    assert [pod.wait() for pod in again] == [0, 0], again[0].output()[-20:]
    assert again[0].events("progress")[0].step == point.step + 1
    one = {"compute": {"nodes": 1, "processes_per_node": 2, "strategy": "ddp"}}
    whole = make_pod(make_run(merge(changes, one), job="whole"), HONE_CPU_LIMIT="2")
    assert whole.start().wait() == 0, whole.output()[-20:]
    assert pods[0].losses() + again[0].losses() == pytest.approx(whole.losses(), rel=1e-4)


def test_nodes_that_read_different_data_do_not_train_together(
    make_run: Callable[..., Run], make_pod: MakePod, tmp_path: Path, rows_file: Path
) -> None:
    """As an unpinned source gives it that changes while a run starts: here each node has its own file of that name."""
    run = make_run({"compute": {"nodes": 2, "processes_per_node": 1}})
    source, lines = run.spec.dataset and run.spec.dataset.source, rows_file.read_text().splitlines()
    assert source
    for name, rows in (("one", lines), ("two", lines[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    run = replace(run, inputs={source: f"file://{tmp_path}/shared.jsonl"})
    prefix = container_with(tmp_path / "shared.jsonl")
    (tmp_path / "shared.jsonl").touch()
    port = str(free_port())
    pods = [
        make_pod(
            run, prefix=(*prefix, str(tmp_path / f"{name}.jsonl")), JOB_COMPLETION_INDEX=str(rank),
            HONE_MAIN_ADDRESS="127.0.0.1", HONE_MAIN_PORT=port,
        ).start()
        for rank, name in enumerate(("one", "two"))
    ]  # fmt: skip
    codes = [pod.wait() for pod in pods]
    assert codes[0] == TrainerExit.DATA, [pod.output()[-20:] for pod in pods]
    assert codes[1] in (TrainerExit.DATA, TrainerExit.PEER_LOST)  # both see it; who is first is chance
    assert "Rank 1 read another version of the data set than rank 0" in pods[0].message()["message"]


def container_with(path: Path) -> tuple[str, ...]:
    """A mount namespace in which the file that follows is seen at a path."""
    container(path)  # skips where there are none
    return ("unshare", "--mount", "--kill-child", "--fork", "sh", "-c",
            f'file=$1; shift; mount --make-rprivate / && mount --bind "$file" {path} && exec "$@"', "sh")  # fmt: skip


def test_a_disk_that_is_full_is_said_with_its_place_and_is_not_tried_again(
    make_run: Callable[..., Run], make_pod: MakePod, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    container(disk)  # skips where there are no namespaces
    script = f'mount --make-rprivate / && mount -t tmpfs -o size=64k tmpfs {disk} && exec "$@"'
    prefix = ("unshare", "--mount", "--kill-child", "--fork", "sh", "-c", script, "sh")
    pod = make_pod(replace(make_run(), store=f"file://{disk}/store"), prefix=prefix)
    assert pod.start().wait() == TrainerExit.DISK_FULL, pod.output()[-20:]
    assert f"The disk of {disk}/store" in pod.message()["message"]
    assert not is_retried(failure_from_json(pod.message()))


CANARIES = {
    "HF_TOKEN": "canary-hub-token",
    "AWS_ACCESS_KEY_ID": "canary-key-id",
    "AWS_SECRET_ACCESS_KEY": "canary-secret-key",
    "AWS_SESSION_TOKEN": "canary-session",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_ENDPOINT_URL_S3": "http://user:canary-user-info@127.0.0.1:9",
    "HF_ENDPOINT": "http://user:canary-endpoint@127.0.0.1:9",
    "HTTPS_PROXY": "http://user:canary-proxy@127.0.0.1:9",
    "NO_PROXY": "127.0.0.1",
}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"store": "s3://bucket/prefix"}, TrainerExit.STORAGE),
        ({"inputs": {"model": "hf://org/name"}}, TrainerExit.STORAGE),
        ({}, TrainerExit.SUCCEEDED),
    ],
    ids=["store", "hub", "trained"],
)
def test_no_secret_is_written_anywhere(
    make_run: Callable[..., Run],
    make_pod: MakePod,
    tmp_path: Path,
    changes: dict[str, Any],
    code: TrainerExit,
) -> None:
    run = make_run()
    if "inputs" in changes:
        changes = {"inputs": {run.spec.model.source: "hf://org/name"}}
    pod = make_pod(replace(run, **changes), **CANARIES).start()
    assert pod.wait() == code, pod.output()[-20:]
    found = [path for path in tmp_path.rglob("*") if path.is_file() and b"canary" in path.read_bytes()]
    assert found == []


def test_a_store_that_refuses_is_told_without_the_key(
    make_run: Callable[..., Run], make_pod: MakePod, tmp_path: Path
) -> None:
    program = find_tool("versitygw")
    if program is None:
        pytest.skip("versitygw is not built: make servers")
    (tmp_path / "s3").mkdir()
    with run_s3(program, tmp_path / "s3") as server:
        server.make_bucket("bucket")
        secrets = {**CANARIES, "AWS_ENDPOINT_URL_S3": server.endpoint}
        pod = make_pod(replace(make_run(), store="s3://bucket/prefix"), **secrets)
        assert pod.start().wait() == TrainerExit.STORAGE_REFUSED, pod.output()[-20:]
    assert "access key 'cana***'" in pod.message()["message"]
    assert not is_retried(failure_from_json(pod.message()))
    assert not [path for path in pod.place.rglob("*") if path.is_file() and b"canary" in path.read_bytes()]
