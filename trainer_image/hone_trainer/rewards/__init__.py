"""The reward layer of PPO and GRPO: any number of signals, each with a weight, each told on its own.

`Rewards.load(context, parts, device=…)` opens the signals of a request, `score` asks them all. What a signal is stands
in texts.py (rules on the answer's text), scorer.py (a service over HTTP), judge.py (a reward model) and function.py (a
function of the user's).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hone.job import EventType
from hone.spec.methods import RewardPart
from hone_trainer.context import RunContext
from hone_trainer.failure import RunFailed
from hone_trainer.rewards.answers import Answer, SignalFailed

__all__ = ["Answer", "Rewards", "Scores"]
KINDS = ("model", "answer", "regex", "json_schema", "length", "http", "python")
Floats = npt.NDArray[np.float64]
Signal = Callable[[Sequence[Answer]], Sequence[float]]
"""One number for each answer. Raises SignalFailed."""
WARM_UP_CALLS, WARM_UP_ANSWERS = 5, 32
"""After so many a signal that has always said the same is named."""


@dataclass(frozen=True)
class Scores:
    """What the signals say of some answers."""

    total: Floats
    """(answers,): Σ weight × part."""
    parts: Mapping[str, Floats]
    """Name → (answers,), without the weight."""


@dataclass(kw_only=True)
class _Part:
    """A signal at work."""

    name: str
    field: str
    """Where the request says it."""
    spec: RewardPart
    signal: Signal
    close: Callable[[], None]
    calls: int = 0
    answers: int = 0
    lowest: float = math.inf
    highest: float = -math.inf


class Rewards:
    """The signals of a request."""

    def __init__(self, context: RunContext, parts: Sequence[_Part]) -> None:
        self._context, self._parts = context, parts
        self._said: set[str] = set()

    @property
    def names(self) -> tuple[str, ...]:
        """Of all parts: the kind, with a number where there are several of one kind."""
        return tuple(part.name for part in self._parts)

    @property
    def gold(self) -> tuple[str, ...]:
        """Of the parts with weight 0: measured, not learned from."""
        return tuple(part.name for part in self._parts if not part.spec.weight)

    @staticmethod
    def load(context: RunContext, parts: Sequence[RewardPart], *, device: Any) -> "Rewards":
        """Open every signal. Raises RunFailed for the first that cannot be."""
        method = context.run.spec.method.name
        kinds = [next(kind for kind in KINDS if getattr(part, kind) is not None) for part in parts]
        made = []
        for number, (kind, part) in enumerate(zip(kinds, parts, strict=True)):
            earlier = kinds[:number].count(kind)
            field = f"method.{method}.rewards.{number}.{kind}"
            signal, close = _open(context, kind, part, number=number, field=field, device=device)
            name = f"{kind}_{earlier + 1}" if earlier else kind
            made.append(_Part(name=name, field=field, spec=part, signal=signal, close=close))
        return Rewards(context, made)

    def score(self, answers: Sequence[Answer], *, step: int) -> Scores:
        """Ask every signal. Raises RunFailed where one fails that may not."""
        parts = {part.name: self._ask(part, answers, step) for part in self._parts}
        total = np.zeros(len(answers))
        for part in self._parts:
            total += part.spec.weight * parts[part.name]
        return Scores(total, parts)

    def close(self) -> None:
        """Give back what the signals hold."""
        for part in self._parts:
            part.close()

    def _ask(self, part: _Part, answers: Sequence[Answer], step: int) -> Floats:
        try:
            found = np.asarray(list(part.signal(answers)), dtype=np.float64)
            if found.shape != (len(answers),):
                raise SignalFailed(f"gave {found.size} scores for {len(answers)} answers")
            if not np.isfinite(found).all():
                raise SignalFailed(f"gave a score that is no finite number ({found[~np.isfinite(found)][0]})")
        except SignalFailed as error:
            return self._failed(part, error, answers, step)
        self._watch(part, found, step)
        return found

    def _failed(self, part: _Part, error: SignalFailed, answers: Sequence[Answer], step: int) -> Floats:
        if part.spec.on_error == "fail":
            raise RunFailed(
                error.code,
                f"{part.field} {error}.",
                fix=error.fix or "Look at the signal, or set on_error: zero to go on without it.",
            ) from error
        self._once(f"{part.name} {error.kind}", f"{part.field} {error}: it counts 0 for these answers.", step)
        return np.zeros(len(answers))

    def _watch(self, part: _Part, found: Floats, step: int) -> None:
        part.calls, part.answers = part.calls + 1, part.answers + len(found)
        part.lowest, part.highest = min(part.lowest, found.min()), max(part.highest, found.max())
        if part.lowest == part.highest and part.calls >= WARM_UP_CALLS and part.answers >= WARM_UP_ANSWERS:
            self._once(
                f"{part.name} constant",
                f"{part.field} has given every one of {part.answers} answers {part.lowest:g}: nothing is learned from "
                "it.",
                step,
            )

    def _once(self, what: str, text: str, step: int) -> None:
        if what not in self._said:
            self._said.add(what)
            self._context.event(EventType.WARNING, text, step=step)


def _open(
    context: RunContext, kind: str, part: RewardPart, *, number: int, field: str, device: Any
) -> tuple[Signal, Callable[[], None]]:
    from hone_trainer.rewards import function, judge, scorer, texts

    setting = getattr(part, kind)
    if kind == "model":
        return judge.open_judge(context, setting, number=number, field=field, device=device), _nothing
    if kind == "http":
        asked = scorer.Scorer(setting)
        return asked, asked.close
    if kind == "python":
        path = Path(context.inputs.reward_functions[str(number)].path)
        return function.open_function(setting, path, field=field), _nothing
    return texts.RULES[kind](setting, field), _nothing


def _nothing() -> None:
    """There is nothing to give back."""
