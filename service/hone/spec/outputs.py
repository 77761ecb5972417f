"""What a request leaves, and which of it goes to the Hub. Used by combinations.py, the trainer, and `hone push`."""

import re
from collections.abc import Iterator

from hone.errors import Violation
from hone.spec import JobSpec

MAX_REPO = 96
"""Characters of a repository's name on the Hub."""
_PUSHED_FIRST = ("merged", "model", "adapter")
"""What is used by itself comes before what needs its base."""


def output_kinds(spec: JobSpec) -> tuple[str, ...]:
    """Kinds of the outputs that a request promises."""
    if spec.method.merge:
        return ("merged",)
    if spec.adapter is None:
        return ("model",)
    return ("adapter", "merged") if spec.output.merged else ("adapter",)


def pushed_kind(kinds: tuple[str, ...], what: str | None) -> str:
    """Which of these outputs goes to the Hub: the one that is asked for, else the one that is used by itself."""
    return what or next(kind for kind in _PUSHED_FIRST if kind in kinds)


def hub_violations(spec: JobSpec) -> Iterator[Violation]:
    """What the Hub would refuse once the training is over."""
    hub, kinds = spec.output.hub, output_kinds(spec)
    if hub is None:
        return
    if message := repo_fault(hub.repo):
        yield Violation(path="output.hub.repo", value=hub.repo, message=message)
    if message := branch_fault(hub.branch or ""):
        yield Violation(path="output.hub.branch", value=hub.branch, message=message)
    if hub.what and hub.what not in kinds:
        fix = "set output.merged, or " if hub.what == "merged" and kinds == ("adapter",) else ""
        message = f"this request leaves no {hub.what}: {fix}write {' or '.join(kinds)}, or remove it."
        yield Violation(path="output.hub.what", value=hub.what, message=message)


def repo_fault(repo: str) -> str:
    """Why this is no name of a repository, as the Hub has them; empty when it is one."""
    parts = repo.split("/")
    well_formed = len(parts) == 2 and all(re.fullmatch(r"\w([\w.-]*\w)?", part, re.ASCII) for part in parts)
    if not well_formed or ".." in repo or "--" in repo or repo.endswith(".git") or len(repo) > MAX_REPO:
        return f"{repo!r} is no repository of the Hub: write organisation/name, of letters, digits, '_', '-' and '.'."
    return ""


def branch_fault(branch: str) -> str:
    """Why this is no name of a branch; empty when it is one, or empty."""
    names = branch.split("/") if branch else []
    well_formed = all(re.fullmatch(r"\w([\w.-]*\w)?", name, re.ASCII) for name in names)
    if not well_formed or ".." in branch or branch.endswith(".lock") or names[:1] == ["refs"]:
        return f"{branch!r} is no name of a branch: write one such as v1 or experiments/rank-16."
    return ""
