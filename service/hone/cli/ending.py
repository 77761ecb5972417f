"""The last words on a run: losses, answers before and after, what was saved or what went wrong, and the next step."""

from urllib.parse import unquote, urlsplit

from rich.console import Console
from rich.table import Table

from hone import quantities as q
from hone.cli.failure import ExitCode
from hone.cli.story import Story
from hone.job import Failure, FailureClass, Job, Output, State

FAILURE_WORDS = {
    FailureClass.USER: "the request cannot work",
    FailureClass.DATA: "the data set is at fault",
    FailureClass.OOM: "out of memory",
    FailureClass.PREEMPTED: "interrupted",
    FailureClass.INFRA: "the machine, the network or the store failed",
    FailureClass.INTERNAL: "a bug of Hone's",
}
LONGEST_ANSWER = 300
"""Characters of a prompt or an answer that are shown."""


def print_end(console: Console, job: Job, story: Story) -> None:
    """The last words."""
    console.print()
    if job.state == State.SUCCEEDED:
        _print_done(console, job, story)
    elif job.state == State.FAILED:
        print_failure(console, job)
    else:
        console.print(f"{job.id}  {job.state} {_after(job)}{_at_step(job)}. {job.state_reason}".rstrip())


def exit_code(job: Job) -> ExitCode:
    """0 when it succeeded."""
    return ExitCode.DONE if job.state == State.SUCCEEDED else ExitCode.FAILED


def print_failure(console: Console, job: Job) -> None:
    """Which class of failure, what happened, where, and what to do."""
    failure = job.failure
    if failure is None:
        console.print(f"{job.id}  FAILED {_after(job)}{_at_step(job)}. {job.state_reason}".rstrip())
        return
    where = f" ({', '.join(_where(job, failure))})"
    console.print(f"{job.id}  FAILED {_after(job)}{_at_step(job)} · {FAILURE_WORDS[failure.failure_class]}{where}")
    console.print(f"  {failure.message}")
    if failure.log_tail:
        console.print("  Last lines of its log:")
        for line in failure.log_tail:
            console.print(f"    {line}", style="dim")
    steps = [failure.next_step.rstrip(". ")] if failure.next_step else []
    console.print(f"  Next: {' · '.join([*steps, f'hone logs {job.id}'])}")


def outputs_table(outputs: tuple[Output, ...], *, with_digest: bool = False) -> Table:
    """Kind, size and place of each output, and the sha256 of its manifest."""
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column()
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    for output in outputs:
        table.add_row("  ", f"{output.kind}/", q.size(output.size_bytes), place(output.uri))
        if with_digest:
            table.add_row("", "", "", f"sha256 of its manifest {output.sha256}")
    return table


def place(uri: str) -> str:
    """A path for what lies on this machine, else the URI."""
    parts = urlsplit(uri)
    return unquote(parts.path) if parts.scheme == "file" else uri


def _print_done(console: Console, job: Job, story: Story) -> None:
    if story.eval_rewards:
        change = " → ".join(
            f"{reward:.3g}" for reward in dict.fromkeys((story.eval_rewards[0], story.eval_rewards[-1]))
        )
        what = "reward"
    else:
        change, what = _change(story.eval_losses), "loss"
    right = ""
    if story.eval_accuracy is not None:
        right = f" {story.eval_accuracy:.1%} of the held-out pairs are in the right order."
    console.print(f"Done in {_took(job)}.{f' Eval {what} {change}.' if change else ''}{right}")
    if story.losses:
        curve = q.spark(story.losses) or "→"
        console.print(f"  training loss  {q.loss(story.losses[0])} {curve} {q.loss(story.losses[-1])}")
    if story.samples:
        console.print()
        console.print(_samples(story))
    console.print("\n  saved, each with the sha256 of its files in MANIFEST.json")
    console.print(outputs_table(job.outputs))
    trial = "" if job.method == "reward" else f"hone try {job.id} · "  # that one scores and does not answer
    console.print(f"\n  Next: {trial}hone get {job.id} · hone download {job.id} DIRECTORY")


def _samples(story: Story) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column()
    table.add_column(overflow="fold")
    for sample in story.samples.values():
        table.add_row("", "prompt", _short(sample.prompt))
        for when in ("before", "after"):
            if when in sample.answers:
                table.add_row("", f"  {when}", _short(sample.answers[when]))
        if sample.expected:
            table.add_row("", "  expected", _short(sample.expected))
    return table


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_ANSWER else f"{line[: LONGEST_ANSWER - 1]}…"


def _change(losses: list[float]) -> str:
    if not losses:
        return ""
    last = q.loss(losses[-1])
    return last if len(losses) == 1 else f"{q.loss(losses[0])} → {last}"


def _took(job: Job) -> str:
    begin = job.start_time or job.create_time
    return q.duration(((job.end_time or job.update_time) - begin).total_seconds())


def _after(job: Job) -> str:
    return f"after {_took(job)}" if job.start_time else "before it ran"


def _at_step(job: Job) -> str:
    if job.progress is None or not job.progress.max_steps:
        return ""
    return f" at step {q.count(job.progress.step)} of {q.count(job.progress.max_steps)}"


def _where(job: Job, failure: Failure) -> list[str]:
    rank = [f"rank {failure.rank}"] if failure.rank is not None else []
    return [*rank, f"attempt {len(job.attempts) or 1} of {job.resolved_spec.scheduling.max_attempts}"]
