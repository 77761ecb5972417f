"""What a look at everything that a request names found: one finding for each thing, whoever looked.

Made by jobs.py (what the service sees), the backends, and the trainer's preflight.py; shown by cli/preflight.py.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum

from hone.errors import HoneError, InvalidRequest, TemporaryError
from hone.job import Plan


class FindingState(StrEnum):
    """What is known of one thing."""

    OK = "OK"
    WARNING = "WARNING"
    """It would run, and perhaps not as it is meant."""
    FAILED = "FAILED"
    """It would not run, or not do all that is asked."""
    NOT_CHECKED = "NOT_CHECKED"
    """It cannot be looked at from here; the message says why, and when it will be."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    check: str
    """plan, machine, cluster, store, inputs, model, tokenizer, data, reward 0, …, scorer, hub."""
    state: FindingState
    message: str
    """What was found, in one sentence."""
    fix: str = ""
    path: str = ""
    """The field that it is about; empty for the request as a whole."""
    how: str = ""
    """How it was looked at; empty where it was not."""


def ok(check: str, message: str, *, path: str = "", how: str = "") -> Finding:
    """Something that is well."""
    return Finding(check=check, state=FindingState.OK, message=message, path=path, how=how)


def not_checked(check: str, message: str, *, path: str = "", fix: str = "") -> Finding:
    """Something that cannot be looked at from here."""
    return Finding(check=check, state=FindingState.NOT_CHECKED, message=message, path=path, fix=fix)


def of_error(check: str, error: HoneError, *, path: str = "", how: str = "") -> Iterator[Finding]:
    """What an error says: each violation is a finding, and what may pass by itself is not known."""
    if isinstance(error, InvalidRequest):
        for violation in error.violations:
            yield Finding(
                check=check, state=FindingState.FAILED, message=violation.message, path=violation.path, how=how
            )
        return
    state = FindingState.NOT_CHECKED if isinstance(error, TemporaryError) else FindingState.FAILED
    yield Finding(check=check, state=state, message=error.message, fix=error.fix, path=path, how=how)


def plan_finding(plan: Plan) -> Finding:
    """Whether it fits."""
    state = FindingState.OK if plan.fits else FindingState.FAILED
    return Finding(check="plan", state=state, message=plan.sentence, how="planned from the model's shape")


def is_ready(findings: Iterable[Finding]) -> bool:
    """Whether nothing stands against it."""
    return all(finding.state != FindingState.FAILED for finding in findings)


def together(first: Sequence[Finding], second: Sequence[Finding]) -> list[Finding]:
    """Two looks at one request: what the first could not check is replaced by what the second found of it."""
    known = {finding.check for finding in second if finding.state != FindingState.NOT_CHECKED}
    open_checks = {finding.check for finding in first if finding.state == FindingState.NOT_CHECKED}
    kept = [one for one in first if not (one.state == FindingState.NOT_CHECKED and one.check in known)]
    seen = {finding.check for finding in first}
    return kept + [one for one in second if one.check not in seen or (one.check in open_checks and one.check in known)]


def to_json(findings: Iterable[Finding]) -> list[dict[str, str]]:
    """As the trainer prints them."""
    return [{**asdict(finding), "state": str(finding.state)} for finding in findings]


def from_json(data: Iterable[Mapping[str, str]]) -> list[Finding]:
    """The other way round."""
    return [Finding(**{**one, "state": FindingState(one["state"])}) for one in data]  # type: ignore[arg-type]
