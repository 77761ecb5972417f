"""The push to the Hub that a request asks for (output.hub), as the last thing of a run.

Called by the supervisor of the first node, once every output is in the store and was read back. Whatever becomes of
the push, the run has succeeded: a push that fails, or that is stopped, is a warning, which says how to do it again.
The outcome stands in result.json and, by the event, with the job.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hone import __version__
from hone.errors import HoneError
from hone.hub import Pushed, Target, push
from hone.job import EventType
from hone.run import Run
from hone.spec import Hub
from hone.spec.outputs import output_kinds, pushed_kind
from hone_trainer.failure import first_line
from hone_trainer.publish import Publisher
from hone_trainer.report import EventLog, say
from hone_trainer.stop import Stop

TOKEN = "HF_TOKEN"


def warn_without_token(run: Run, events: EventLog) -> None:
    """Say before the training what else would be known after it."""
    hub = run.spec.output.hub
    if hub and not os.environ.get(TOKEN):
        message = f"output.hub: {TOKEN} is not set here, so nothing will be pushed to {hub.repo}."
        events.write(EventType.WARNING, f"{message} The outputs are kept in the store: hone push {run.job} sends them.")


def push_output(run: Run, publisher: Publisher, events: EventLog, outputs: Path, stop: Stop) -> None:
    """Push where it is asked for, and tell what became of it. Never raises."""
    hub = run.spec.output.hub
    if hub is None:
        return
    events.write(EventType.PHASE, "pushing", fields={"phase": "pushing"})
    kind = pushed_kind(output_kinds(run.spec), hub.what)
    try:
        with stop.at_once():
            pushed = _push(run, hub, publisher, outputs / kind, kind)
        outcome = _outcome(pushed, kind)
    except Exception as error:  # the outputs are in the store: nothing that happens here may fail the run
        outcome = {"repo": hub.repo, "what": kind, "error": str(error) if isinstance(error, HoneError) else _odd(error)}
    _tell(run, outcome, events)
    try:
        publisher.record_push(outcome)
    except HoneError as error:
        say(f"result.json does not say what became of the push: {error}")


def tell_pushed(run: Run, result: Mapping[str, Any], events: EventLog) -> None:
    """Say what became of the push of results that were there already."""
    if hub := run.spec.output.hub:
        unknown = {"repo": hub.repo, "error": "The attempt that made the outputs ended before it said so."}
        _tell(run, result.get("hub") or unknown, events)


def _push(run: Run, hub: Hub, publisher: Publisher, directory: Path, kind: str) -> Pushed:
    return push(
        directory,
        publisher.files(kind),
        Target(repo=hub.repo, private=hub.private, **({"branch": hub.branch} if hub.branch else {})),
        token=os.environ.get(TOKEN, ""),
        message=f"Upload {kind} of {run.job} with Hone {__version__}",
        tell=say,
    )


def _outcome(pushed: Pushed, kind: str) -> dict[str, Any]:
    return {
        "repo": pushed.repo,
        "what": kind,
        "branch": pushed.branch,
        "private": pushed.private,
        "url": pushed.url,
        "commit": pushed.commit,
    }


def _tell(run: Run, outcome: Mapping[str, Any], events: EventLog) -> None:
    """`fields.hub` is what the service knows the event by."""
    fields = {"hub": str(outcome["repo"]), **{name: str(value) for name, value in outcome.items() if name != "repo"}}
    if "error" in outcome:
        message = f"It was not pushed to {outcome['repo']}: {outcome['error']}"
        events.write(EventType.WARNING, f"{message} Next: hone push {run.job}", fields=fields)
    else:
        message = f"Its {outcome['what']} is on the Hub: {outcome['url']} (commit {outcome['commit'][:7]})."
        events.write(EventType.NOTE, message, fields=fields)


def _odd(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}. That is a bug of Hone's."
