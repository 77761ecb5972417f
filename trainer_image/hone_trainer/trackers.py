"""Trackers: what a run tells, handed on to TensorBoard, MLflow and Weights & Biases, each by its own library.

`python -m hone_trainer.trackers DIRECTORY` is a process beside the workers, started by the supervisor of the first
node where the request names trackers (reporting.trackers), so every method has them alike and none pays for them: what
such a library imports, prints, blocks or breaks is not the run's. It follows the events' file until its stdin closes.
What it writes lies in the directory of RunDirectory.trackers; where no server is named (MLFLOW_TRACKING_URI,
WANDB_API_KEY), all of it does, for `mlflow migrate-filestore` and `wandb sync`.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from hone.job import Event, EventType
from hone.run import Run, RunDirectory, TrainerExit
from hone_trainer.failure import RunFailed, first_line
from hone_trainer.process import die_with_parent
from hone_trainer.report import EventLog, Lines, parse_event
from hone_trainer.scrub import without_secrets

POLL_S = 0.5
FLUSH_S = 10
"""At least so often TensorBoard's file is written."""
PROJECT = "hone"
"""Where WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME do not name another."""
_NOT_TRACKED = frozenset({"max_steps", "eta_s"})
_OWN = ("WANDB_", "MLFLOW_")
_QUIET = {"DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"}
_MAX_PARAMETER = 500
"""Characters of one parameter; MLflow allows 6,000, some servers 500."""


class Tracker(Protocol):
    """One library, open for one run."""

    def log(self, step: int, wall_time: float, figures: Mapping[str, float]) -> None:
        """Figures of a step, by name."""

    def text(self, step: int, wall_time: float, name: str, text: str) -> None:
        """A text of a step."""

    def close(self, *, failed: bool) -> None:
        """The run is over."""


class TensorBoard:
    """Event files; `tensorboard --logdir` reads them."""

    def __init__(self, run: Run, directory: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as Record
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._record, self._summary, self._text_pb = Record, Summary, text_pb
        self._writer = EventFileWriter(str(directory), flush_secs=FLUSH_S)

    def log(self, step: int, wall_time: float, figures: Mapping[str, float]) -> None:
        """As scalars."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._write(step, wall_time, self._summary(value=values))

    def text(self, step: int, wall_time: float, name: str, text: str) -> None:
        """For its text page."""
        self._write(step, wall_time, self._text_pb(name, text))

    def close(self, *, failed: bool) -> None:
        """All is on the disk."""
        self._writer.close()

    def _write(self, step: int, wall_time: float, summary: Any) -> None:
        self._writer.add_event(self._record(wall_time=wall_time, step=step, summary=summary))


class MLflow:
    """A run of the server at MLFLOW_TRACKING_URI; else a file store in the directory."""

    def __init__(self, run: Run, directory: Path) -> None:
        offline = not os.environ.get("MLFLOW_TRACKING_URI")
        if offline:
            os.environ |= {"MLFLOW_TRACKING_URI": f"file://{directory}", "MLFLOW_ALLOW_FILE_STORE": "true"}
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param, RunTag

        self._metric, self._client = Metric, MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        identity = experiment.experiment_id if experiment else self._client.create_experiment(name)
        # A later attempt goes on in the run of the first.
        tag = f"{run.namespace}/{run.job}"
        [*found] = self._client.search_runs([identity], f"tags.`hone.job` = '{tag}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(identity, run_name=run.job, tags={"hone.job": tag}).info.run_id
        parameters = [Param(name, value) for name, value in parameters_of(run).items()]
        self._client.log_batch(self._id, params=parameters, tags=[RunTag("hone.method", run.spec.method.name)])
        if offline:  # a run without artefacts would lose their empty directory on its way, and not be read again
            self._client.log_dict(self._id, run.spec.to_mapping(), "request.yaml")

    def log(self, step: int, wall_time: float, figures: Mapping[str, float]) -> None:
        """As metrics."""
        at = int(wall_time * 1000)
        self._client.log_batch(
            self._id, metrics=[self._metric(name, value, at, step) for name, value in figures.items()]
        )

    def text(self, step: int, wall_time: float, name: str, text: str) -> None:
        """Texts would be artefacts, which need rights to a store of MLflow's own: report.html has them."""

    def close(self, *, failed: bool) -> None:
        """Say how it ended."""
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


class WeightsAndBiases:
    """A run of the project WANDB_PROJECT; without WANDB_API_KEY an offline one in the directory."""

    def __init__(self, run: Run, directory: Path) -> None:
        import wandb

        directory.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            id=f"{run.namespace}-{run.job}",
            name=run.job,
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=str(directory),
            mode=None if os.environ.get("WANDB_API_KEY") else "offline",
            resume="allow",  # a later attempt goes on in the run of the first
            config=parameters_of(run),
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
                x_disable_stats=True,
            ),
        )
        self._run.define_metric("*", step_metric="step")  # steps come again after a resume; its own must not

    def log(self, step: int, wall_time: float, figures: Mapping[str, float]) -> None:
        """Over `step`."""
        self._run.log({"step": step, **figures})

    def text(self, step: int, wall_time: float, name: str, text: str) -> None:
        """As it is."""
        self._run.log({"step": step, name: text})

    def close(self, *, failed: bool) -> None:
        """Send or write what is left."""
        self._run.finish(exit_code=1 if failed else 0)


TRACKERS: Mapping[str, Callable[[Run, Path], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
}
"""By the word of the request, which is the library's module too."""


class Tracking:
    """The process beside the run, as its supervisor sees it."""

    def __init__(self, run: Run, directory: RunDirectory, environment: Mapping[str, str]) -> None:
        """Raises RunFailed (USER) where a library is not installed."""
        if missing := [name for name in run.spec.reporting.trackers if find_spec(name) is None]:
            names = " and ".join(missing)
            raise RunFailed(
                TrainerExit.USER,
                f"reporting.trackers names {names}, which this trainer has not installed.",
                fix="Install hone-tuning[trackers] where it runs, or remove them from the request.",
            )
        self.directory = directory.trackers
        command = [sys.executable, "-m", "hone_trainer.trackers", str(directory.path)]
        log = directory.trackers_log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            own = environment_of(environment)
            self._child = subprocess.Popen(command, env=own, stdin=subprocess.PIPE, stdout=output, stderr=output)

    def close(self, *, timeout_s: float) -> bool:
        """Have it hand on what is left; whether it came to its end in time."""
        assert self._child.stdin
        with suppress(BrokenPipeError):
            self._child.stdin.close()
        try:
            return self._child.wait(timeout_s) == 0
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
            return False
        finally:
            for link in filter(Path.is_symlink, self.directory.rglob("*")):
                link.unlink()  # wandb's latest-run; a store holds files only


def hide() -> None:
    """Have this process find none of their libraries: TRL imports wandb and MLflow wherever it finds them, which costs
    every rank seconds and memory for what the process beside it does."""
    sys.modules.update(dict.fromkeys(TRACKERS))  # type: ignore[arg-type]  # None: as if it were not installed


def environment_of(inherited: Mapping[str, str]) -> dict[str, str]:
    """Secrets of the trackers, and how to get through a proxy; none of the others."""
    own = {name: value for name, value in inherited.items() if name.startswith(_OWN) or name.upper().endswith("_PROXY")}
    return {**without_secrets(inherited), **own, **_QUIET}


def main(path: Path) -> None:
    """Follow the events of the attempt in this directory until stdin closes, and hand them on."""
    die_with_parent()
    directory = RunDirectory(path)
    run = Run.from_yaml(directory.run_file.read_text(encoding="utf-8"))
    over = threading.Event()
    threading.Thread(target=_wait_for_end, args=(over,), name="stdin", daemon=True).start()
    events = EventLog(directory.events)
    opened: dict[str, Tracker] = {}
    for name in run.spec.reporting.trackers:
        with _told(name, events, opened):
            opened[name] = TRACKERS[name](run, directory.trackers / name)
    failed = True
    for event in _events(directory.events, over):
        if event.type in (EventType.FAILURE, EventType.OUTPUT):
            failed = event.type == EventType.FAILURE
        for name, tracker in list(opened.items()):
            with _told(name, events, opened):
                _hand_on(tracker, event)
    for name, tracker in list(opened.items()):
        with _told(name, events, opened):
            tracker.close(failed=failed)


def parameters_of(run: Run) -> dict[str, str]:
    """The resolved request as dotted names and texts, for a table of parameters."""
    return {name: str(value)[:_MAX_PARAMETER] for name, value in _flat(run.spec.to_mapping(), "")}


def figures_of(event: Event) -> dict[str, float]:
    """What is tracked of an event: train/loss, eval/loss, …; nothing of most kinds."""
    if event.type == EventType.PROGRESS:
        return {f"train/{name}": value for name, value in event.metrics.items() if name not in _NOT_TRACKED}
    if event.type == EventType.EVAL:
        return {f"eval/{name.removeprefix('eval_')}": value for name, value in event.metrics.items()}
    if event.type == EventType.DATA:
        return {f"data/{name}": value for name, value in event.metrics.items() if "/" not in name}
    return {}


def _hand_on(tracker: Tracker, event: Event) -> None:
    step, at = event.step or 0, event.time.timestamp()
    if figures := figures_of(event):
        tracker.log(step, at, figures)
    if event.type == EventType.SAMPLE:
        prompt, answer = event.fields.get("prompt", ""), event.fields.get("answer", "")
        tracker.text(step, at, f"samples/{event.fields.get('when', 'after')}", f"{prompt.strip()}\n\n{answer.strip()}")


@contextmanager
def _told(name: str, events: EventLog, opened: dict[str, Tracker]) -> Iterator[None]:
    """Whatever a library raises, the run goes on without it, and is told why."""
    try:
        yield
    except Exception as error:
        opened.pop(name, None)
        message = f"{name} takes no more of this run: {type(error).__name__}: {first_line(error)}"
        events.write(EventType.WARNING, message, fields={"tracker": name})


def _wait_for_end(over: threading.Event) -> None:
    sys.stdin.read()
    over.set()


def _events(path: Path, over: threading.Event) -> Iterator[Event]:
    lines, seq = Lines(path), 0
    while True:
        last, found = over.is_set(), lines.read(last=False)
        for line in found:
            seq += 1
            yield parse_event(line, seq)
        if last and not found:
            return
        if not found:
            over.wait(POLL_S)


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


if __name__ == "__main__":
    main(Path(sys.argv[1]))
