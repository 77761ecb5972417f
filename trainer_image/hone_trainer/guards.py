"""What goes wrong when a policy learns from rewards, noticed while it does: called by ppo and grpo at every step.

A rising reward proves nothing: the policy may have left the language (KL), lost its variety (entropy), run into the
length limit, or found what the reward overlooks while a measure that it does not learn from (weight 0) falls.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hone.job import EventType
from hone_trainer.context import RunContext

POLICY_FIGURES = (
    "reward", "kl", "kl_coef", "entropy", "policy_loss", "value_loss", "clip_fraction", "explained_variance",
    "ratio_deviation", "answer_tokens", "truncated", "generate_s", "score_s", "forward_s", "update_s",
)  # fmt: skip
"""What ppo and grpo report of a step beside `reward/<part>`: kl is the mean of an answer in nats, entropy that of a
token, truncated the share of answers that did not end by themselves."""
WINDOW = 5
"""Steps in a row before something is said: one odd batch is chance."""
COLLAPSED = 0.02
"""Share of the first entropy below which a policy always says the same."""


@dataclass
class Guards:
    """Watches the figures of a run; each notice is given once."""

    max_kl: float | None = None
    gold: Sequence[str] = ()
    """Rewards of weight 0: measured, not learned from."""
    _first_entropy: float | None = None
    _recent: deque[Mapping[str, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _best_gold: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Best evaluation of each, with the reward that went with it."""
    _said: set[str] = field(default_factory=set)

    def step(self, figures: Mapping[str, float]) -> Iterator[str]:
        """Notices after a step with these figures."""
        self._recent.append(figures)
        self._first_entropy = figures["entropy"] if self._first_entropy is None else self._first_entropy
        if len(self._recent) < WINDOW:
            return
        if all(one["truncated"] == 1.0 for one in self._recent):
            yield from self._once(
                "truncated",
                f"In {WINDOW} steps no answer has ended by itself: raise max_new_tokens, or look at the stop token of "
                "the template (model.eos_token).",
            )
        if all(one["distinct"] == 0.0 for one in self._recent):
            yield from self._once(
                "equal", f"In {WINDOW} steps all answers have been equal: there is nothing to learn from."
            )
        if all(one["entropy"] < COLLAPSED * self._first_entropy for one in self._recent):
            yield from self._once(
                "entropy",
                f"The entropy of a token has fallen from {self._first_entropy:.3f} to {figures['entropy']:.3f} nats: "
                "the policy always says the same. Raise the KL coefficient, or lower the learning rate.",
            )

    def exceeds(self, figures: Mapping[str, float]) -> str | None:
        """Why training has to stop; None while the policy is near enough to its reference."""
        if self.max_kl is None or figures["kl"] <= self.max_kl:
            return None
        return f"Stopping: the answers are {figures['kl']:.2f} nats from the reference, max_kl is {self.max_kl:g}."

    def tell_step(self, context: RunContext, figures: Mapping[str, float], *, step: int) -> bool:
        """Give the notices after a step; whether training may go on."""
        reason = self.exceeds(figures)
        for notice in (*self.step(figures), *([reason] if reason else [])):
            context.event(EventType.WARNING, notice, step=step)
        return reason is None

    def tell_evaluation(self, context: RunContext, metrics: Mapping[str, float], *, step: int) -> dict[str, float]:
        """Give the notices after an evaluation; its metrics, with the loss that the best checkpoint is chosen by."""
        for notice in self.evaluation(metrics):
            context.event(EventType.WARNING, notice, step=step)
        return {"eval_loss": -metrics["eval_reward"], **metrics}

    def evaluation(self, metrics: Mapping[str, float]) -> Iterator[str]:
        """Notices after an evaluation."""
        reward = metrics["eval_reward"]
        for name in self.gold:
            value = metrics[f"eval_reward/{name}"]
            best, then = self._best_gold.get(name, (value, reward))
            if value >= best:
                self._best_gold[name] = (value, reward)
            elif reward > then and value < best - 0.1 * abs(best):
                yield from self._once(
                    f"gold {name}",
                    f"The reward has risen from {then:.3f} to {reward:.3f} while {name}, which is not learned from, "
                    f"fell from {best:.3f} to {value:.3f}: the policy may be exploiting the reward. Raise the KL "
                    "coefficient, or set max_kl.",
                )

    def _once(self, what: str, text: str) -> Iterator[str]:
        if what not in self._said:
            self._said.add(what)
            yield text
