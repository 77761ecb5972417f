"""What `hone plan` looks at outside: everything that a request names, by the service that would run it and with this
person's own credentials and trainer."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from hone.cli.environment import read_settings
from hone.errors import HoneError
from hone.findings import Finding, FindingState, from_json, is_ready, not_checked, of_error, ok

if TYPE_CHECKING:
    from hone.settings import Settings
    from hone.spec import JobSpec

_WORDS = {FindingState.OK: "ok", FindingState.NOT_CHECKED: "not checked"}
_STYLES = {FindingState.WARNING: "yellow", FindingState.FAILED: "red", FindingState.NOT_CHECKED: "dim"}


def look_here(spec: "JobSpec") -> list[Finding]:
    """From this machine, for a run on it: its store, and what the trainer that is installed here sees."""
    return [store_finding(read_settings()), *trainer_findings(spec)]


def trainer_findings(spec: "JobSpec", *, elsewhere: bool = False) -> list[Finding]:
    """What the trainer that is installed here sees of model, tokenizer, data, reward models and Hub; where the run will
    be `elsewhere`, what cannot be reached from here stands against nothing."""
    from hone.trainer_process import CannotAsk, TrainerProcess

    try:
        answer = TrainerProcess(read_settings().trainer_python).ask(
            "preflight", json.dumps(spec.to_mapping()), *(["--elsewhere"] if elsewhere else [])
        )
    except CannotAsk as error:
        text = f"Model and data are looked at when it runs, first thing: {error.message}"
        return [not_checked("trainer", text, fix=error.fix)]
    return from_json(answer["findings"])


def store_finding(settings: "Settings") -> Finding:
    """Whether outputs could be kept."""
    from hone.storage import open_store

    if not settings.store and not settings.home.exists():
        return ok("store", f"{settings.store_uri} (made by the first run)")
    try:
        store = open_store(settings.store_uri, endpoint=settings.store_endpoint)
        try:
            store.probe()
        finally:
            store.close()
    except HoneError as error:
        [finding] = of_error("store", error)
        return finding
    return ok("store", f"{settings.store_uri}, written and read back", how="by this command")


def print_findings(console: Console, findings: Sequence[Finding], *, explain: bool = False) -> None:
    """One line for each, and what follows from them; with `explain` how it was looked at."""
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        if finding.check == "plan" and finding.state == FindingState.OK:
            continue  # the plan stands above
        words = _WORDS.get(finding.state, str(finding.state).lower())
        about = f"{finding.path}: " if finding.path and finding.state != FindingState.OK else ""
        how = f"({finding.how})" if explain and finding.how else ""
        text = " ".join(part for part in (f"{about}{finding.message}", finding.fix, how) if part)
        table.add_row("", finding.check, words, text, style=_STYLES.get(finding.state))
    console.print("\n  looked at:")
    console.print(table)
    faulty = dict.fromkeys(finding.check for finding in findings if finding.state == FindingState.FAILED)
    if not is_ready(findings):
        console.print(f"\n  As it stands it would not do what is asked: see {', '.join(faulty)}.")
