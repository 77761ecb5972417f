"""What happened in a run, gathered from its events; and each event as a sentence. Pure: run.py and watch show it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from hone import quantities as q
from hone.job import Event, EventType

PHASES: Mapping[str, str] = {
    "loading": "starting the trainer, fetching its inputs",
    "data": "reading, checking and tokenizing the rows",
    "model": "loading the model",
    "saving": "writing the outputs and checking them",
    "uploading": "storing the outputs under their manifests",
    "pushing": "sending an output to the Hub",
}
"""What the trainer does in each phase, for people."""
_SEEN_BY_STEPS = ("training", "evaluation")


@dataclass
class Sample:
    """One prompt and its answers before and after training."""

    prompt: str
    answers: dict[str, str] = field(default_factory=dict)
    """before or after → the answer."""
    expected: str = ""


@dataclass
class Story:
    """A run so far; `add` every event in order."""

    state: str = "PENDING"
    phase: str = ""
    step: int = 0
    max_steps: int = 0
    last: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the last step."""
    losses: list[float] = field(default_factory=list)
    """Training loss of the current attempt, step by step."""
    eval_losses: list[float] = field(default_factory=list)
    eval_rewards: list[float] = field(default_factory=list)
    """Of ppo and grpo, whose evaluation loss is minus these."""
    eval_accuracy: float | None = None
    """Share of held-out pairs in the right order, of dpo and reward."""
    samples: dict[str, Sample] = field(default_factory=dict)
    """By prompt, in order of the data set."""
    attempt: int = 0

    def add(self, event: Event) -> None:
        """Take one event in."""
        if event.attempt > self.attempt:
            self._begin(event.attempt)
        if event.type == EventType.STATE:
            self.state = event.fields.get("state", self.state)
        elif event.type == EventType.PHASE:
            self.phase = event.fields.get("phase", self.phase)
        elif event.type == EventType.PROGRESS:
            self._progress(event)
        elif event.type == EventType.EVAL and "eval_loss" in event.metrics:
            self.eval_losses.append(event.metrics["eval_loss"])
            self.eval_accuracy = event.metrics.get("eval_rewards/accuracies")
            if "eval_reward" in event.metrics:
                self.eval_rewards.append(event.metrics["eval_reward"])
        elif event.type == EventType.SAMPLE:
            self._sample(event.fields)

    @property
    def what(self) -> str:
        """One word for what goes on: the phase while it runs, else the state."""
        return self.phase if self.state == "RUNNING" and self.phase else _words(self.state)

    def progress(self) -> str:
        """`step 20/1,200 · loss 1.92 · lr 1.4e-4 · 41,300 tok/s · 1:05 left`."""
        steps = f"step {q.count(self.step)}" + (f"/{q.count(self.max_steps)}" if self.max_steps else "")
        return " · ".join([steps, *_figures(self.last)])

    def figures(self) -> str:
        """The same without the step, for the end of a bar."""
        return "  ".join(_figures(self.last))

    def _begin(self, attempt: int) -> None:
        self.attempt, self.phase, self.step = attempt, "", 0
        self.last, self.losses, self.eval_losses, self.eval_accuracy = {}, [], [], None
        self.eval_rewards = []
        self.samples = {}

    def _progress(self, event: Event) -> None:
        self.last = event.metrics
        self.step = event.step or self.step
        self.max_steps = int(event.metrics.get("max_steps", self.max_steps))
        if "loss" in event.metrics:
            self.losses.append(event.metrics["loss"])

    def _sample(self, fields: Mapping[str, str]) -> None:
        prompt = fields.get("prompt", "")
        sample = self.samples.setdefault(prompt, Sample(prompt))
        sample.answers[fields.get("when", "after")] = fields.get("answer", "")
        sample.expected = fields.get("expected", sample.expected)


def told(event: Event, *, samples: bool = False) -> tuple[str, str] | None:
    """What a line says of an event: a word and a sentence; None for what is shown otherwise (steps), and for samples
    where they are not asked for."""
    if event.type == EventType.SAMPLE and samples:
        return "sample", _answered(event)
    if event.type in (EventType.PROGRESS, EventType.SAMPLE) or event.fields.get("phase") in _SEEN_BY_STEPS:
        return None
    if event.type == EventType.STATE:
        return _words(event.fields.get("state", "")), event.message or event.fields.get("reason", "")
    if event.type == EventType.PHASE:
        phase = event.fields.get("phase", "phase")
        return phase, PHASES.get(phase, "") if event.message in ("", phase) else event.message
    if event.type == EventType.EVAL:
        return "evaluation", _evaluation(event)
    if event.type == EventType.OUTPUT:
        return "output", _output(event.fields)
    if event.type == EventType.CHECKPOINT:
        return "checkpoint", f"step {q.count(event.step or 0)} is stored{_size(event.fields)}"
    return event.type, event.message


def _figures(metrics: Mapping[str, float]) -> list[str]:
    figures = []
    if "loss" in metrics:
        figures.append(f"loss {q.loss(metrics['loss'])}")
    if "reward" in metrics:
        figures.append(f"reward {metrics['reward']:.3g}")
    if "kl" in metrics:
        figures.append(f"KL {metrics['kl']:.3g}")
    if "rewards/accuracies" in metrics:
        figures.append(f"{metrics['rewards/accuracies']:.0%} of pairs right")
    if "learning_rate" in metrics:
        figures.append(f"lr {q.rate(metrics['learning_rate'])}")
    if metrics.get("tokens_per_second"):
        figures.append(f"{q.count(metrics['tokens_per_second'])} tok/s")
    if "eta_s" in metrics:
        figures.append(f"{q.clock(metrics['eta_s'])} left")
    return figures


def _evaluation(event: Event) -> str:
    where = f" at step {q.count(event.step)}" if event.step is not None else ""
    if "eval_loss" not in event.metrics:
        return f"{event.message}{where}"
    right = ""
    if event.metrics.get("eval_rewards/margins"):  # 0 before dpo's first step: nothing is preferred yet
        right = f", {event.metrics['eval_rewards/accuracies']:.1%} of the pairs in the right order"
    if "eval_reward" in event.metrics:
        parts = [f"{name.partition('/')[2]} {value:.3g}" for name, value in event.metrics.items() if "reward/" in name]
        return f"eval reward {event.metrics['eval_reward']:.3g} ({', '.join(parts)}){where}"
    return f"eval loss {q.loss(event.metrics['eval_loss'])}{right}{where}"


def _answered(event: Event) -> str:
    when, prompt, answer = (event.fields.get(name, "") for name in ("when", "prompt", "answer"))
    at = when if when in ("before", "after") else f"step {q.count(event.step or 0)}"
    return f"{at} · {' '.join(prompt.split())} → {' '.join(answer.split())}"


def _output(fields: Mapping[str, str]) -> str:
    return f"{fields.get('kind', '')} is complete{_size(fields)}"


def _size(fields: Mapping[str, str]) -> str:
    return f", {q.size(int(fields['size_bytes']))}" if fields.get("size_bytes", "").isdigit() else ""


def _words(state: str) -> str:
    return state.lower() or "state"
