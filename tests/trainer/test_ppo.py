"""PPO: its losses and weights against the plain loop of reference_ppo.py, and a run against itself: resumed, on two
ranks, in smaller batches, with pad = EOS."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from hone.errors import InvalidRequest
from hone.spec.parse import parse
from hone_trainer import rollouts
from hone_trainer.context import RunContext, StopSignal
from hone_trainer.failure import RunFailed
from hone_trainer.inputs import fetch
from hone_trainer.methods import ppo
from hone_trainer.model import load_tokenizer
from hone_trainer.policy import Judged
from hone_trainer.preference import without_dropout
from hone_trainer.prompts import prepare_prompts
from hone_trainer.report import EventLog
from hone_trainer.rollouts import Drawn, Prompt, Rollouts, Sampling, draw
from hone_trainer.rows import open_rows
from hone_trainer.trained import trained_model

from . import reference_ppo
from .conftest import Attempt, MakeAttempt, RunHere, make_adapter, make_tokenizer, reversals, write_rows
from .test_checkpoints import going_on, merged, weights
from .test_sharding import saved
from .test_supervisor import Start, start

__all__ = ["start"]
FULL = {"adapter": None, "training": {"learning_rate": 1e-4}}
VARIED = {"regex": {"pattern": "[a-m]"}}
"""A reward that an untrained model gets now and then."""


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "prompts.jsonl", reversals(48))


def request(prompts: Path, *changes: Mapping[str, Any]) -> dict[str, Any]:
    settings = {
        "rewards": [VARIED],
        "batch_size": 8,
        "mini_batch_size": 4,
        "ppo_epochs": 2,
        "max_new_tokens": 6,
        "init_kl_coef": 0.05,
    }
    base = {
        "dataset": {"source": f"file://{prompts}", "eval_fraction": 0.2},
        "method": {"sft": None, "ppo": settings},
        "training": {"max_steps": 3, "learning_rate": 1e-3, "eval": {"at_start": True, "batch_size": 4}},
    }
    return merged(base, *changes)


def figures(attempt: Attempt) -> list[dict[str, float]]:
    names = {"tokens_per_second", "eta_s", "generate_s", "score_s", "forward_s", "update_s"}
    return [{k: v for k, v in event.metrics.items() if k not in names} for event in attempt.events("progress")]


def trainer_of(attempt: Attempt) -> tuple[Any, Any]:
    """The method's own trainer, not yet trained, and its tokenizer."""
    directory, spec = attempt.directory, attempt.run.spec
    directory.scratch.mkdir(exist_ok=True)
    inputs = fetch(attempt.run, directory.scratch / "inputs")
    events = EventLog(directory.events)
    context = RunContext(run=attempt.run, directory=directory, inputs=inputs, events=events, rank=0, world_size=1)
    tokenizer = load_tokenizer(inputs.tokenizer, spec.model)
    assert spec.dataset is not None and inputs.dataset is not None
    rows = open_rows(Path(inputs.dataset.path), source=spec.dataset.source, split="train")
    model, _ = trained_model(context, tokenizer)
    data = prepare_prompts(context.run.spec, tokenizer, rows, None)
    return ppo.Trainer(context, model=without_dropout(model), tokenizer=tokenizer, data=data), tokenizer


FROZEN = [
    reference_ppo.Told([0, *range(40, 40 + length)], [50 + length, *range(60, 60 + length % 4), 1], (length % 3) - 1.0)
    for length in range(3, 11)
]
"""Answers of unequal lengths to prompts of unequal lengths."""


def frozen() -> Rollouts:
    return Rollouts(
        answers=[
            Drawn(prompt_ids=told.prompt, ids=told.answer, ended=True, number=i + 1, score=told.score, parts={})
            for i, told in enumerate(FROZEN)
        ]
    )


class Plain(torch.nn.Module):
    """A policy in float64: TRL's fused head adds up in fp32."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, ids: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, width: int) -> Judged:
        found = self.policy.model(ids, output_hidden_states=True)
        values = self.policy.value_head(found.hidden_states[-1])[..., 0]
        table = found.logits[:, :-1].log_softmax(-1)
        log_probs = table.gather(2, ids[:, 1:, None])[..., 0]
        index = starts[:, None] - 1 + torch.arange(width)
        inside = index < lengths[:, None] - 1
        index = index.clamp(max=ids.shape[1] - 2)
        entropy = -(table.exp() * table).sum(-1)
        return Judged(*(tensor.gather(1, index) * inside for tensor in (log_probs, entropy, values)))


@pytest.mark.parametrize(
    ("precision", "loss_error", "weight_error"), [("float32", 1e-5, 1e-3), ("float64", 1e-8, 1e-8)]
)
@pytest.mark.parametrize("changes", [{}, FULL], ids=["lora", "full"])
def test_an_update_is_that_of_a_plain_loop(
    make_attempt: MakeAttempt,
    prompts: Path,
    changes: dict[str, Any],
    precision: str,
    loss_error: float,
    weight_error: float,
) -> None:
    steady = {"training": {"scheduler": "constant", "warmup_ratio": None, "warmup_steps": 0, "max_grad_norm": 1.0}}
    trainer, _ = trainer_of(make_attempt(request(prompts, changes, steady), micro_batch_size=2))
    torch.manual_seed(5)
    for name, parameter in trainer.module.named_parameters():  # a fresh adapter and value head are zero
        if "lora_B" in name or "value_head" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    if precision == "float64":
        trainer.module.double()
        trainer.wrapped = Plain(trainer.module)
    trainer.reference.judge = alike(trainer)
    policy = deepcopy(trainer.module)
    base = policy.model.get_base_model() if hasattr(policy.model, "peft_config") else policy.model
    del base.forward  # TRL's, which holds on to the model that it was made for
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in parameters]
    order = [part.tolist() for epoch in range(2) for part in trainer._mini_batches(8, 1, epoch)]
    losses: list[float] = []
    update = trainer._update

    def noted(*arguments: Any) -> dict[str, float]:
        found: dict[str, float] = update(*arguments)
        losses.append(found["loss"])
        return found

    trainer._update = noted
    trainer.learn(frozen(), step=1)
    wanted = reference_ppo.update(
        policy.model,
        policy.value_head,
        parameters,
        FROZEN,
        order,
        rate=trainer.optimizer.param_groups[0]["lr"],
        kl_coef=0.05,
        gamma=1.0,
        lam=0.95,
        clip=0.2,
        clip_value=0.2,
        vf_coef=0.1,
    )
    assert losses == pytest.approx(wanted, rel=loss_error, abs=loss_error)
    found = [parameter for parameter in trainer.module.parameters() if parameter.requires_grad]
    moved = [
        torch.cat([(a.detach() - b).flatten() for a, b in zip(one, before, strict=True)]) for one in (found, parameters)
    ]
    assert float((moved[0] - moved[1]).norm() / moved[1].norm()) < weight_error


def alike(trainer: Any) -> Any:
    """The reference is the policy as it is now, whatever its adapter holds."""
    from contextlib import contextmanager

    copy = deepcopy(trainer.wrapped)

    @contextmanager
    def judge(_policy: Any) -> Any:
        with torch.no_grad():
            yield copy

    return judge


@pytest.mark.parametrize("changes", [{}, FULL, {"quantization": "nf4"}], ids=["lora", "full", "qlora"])
def test_the_policy_starts_at_its_reference_and_the_first_ratio_is_one(
    make_attempt: MakeAttempt, run_here: RunHere, prompts: Path, changes: dict[str, Any]
) -> None:
    ran = run_here(make_attempt(request(prompts, changes), micro_batch_size=2))
    told = figures(ran)
    assert told[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert [one["ratio_deviation"] for one in told] == [0.0, 0.0, 0.0]
    assert told[-1]["kl"] != 0 and 0 < told[0]["reward/regex"] < 1
    before, after = (event.metrics for event in ran.events("eval"))
    assert before["eval_kl"] == pytest.approx(0, abs=1e-6)
    assert after["eval_loss"] == -after["eval_reward"] and after["eval_kl"] != 0


@pytest.mark.parametrize(
    "changes", [{}, FULL, {"method": {"ppo": {"kl_target": 0.1}}}], ids=["lora", "full", "adaptive"]
)
def test_a_run_that_goes_on_is_bitwise_the_run_that_never_stopped(
    make_attempt: MakeAttempt, run_here: RunHere, prompts: Path, changes: dict[str, Any]
) -> None:
    asked = request(prompts, changes, {"training": {"max_steps": 4, "checkpoint": {"steps": 2}}})
    whole = run_here(make_attempt(asked))
    made = whole.directory.checkpoints
    assert sorted(path.name for path in made.iterdir()) == ["step-000002", "step-000004"]
    again = run_here(going_on(make_attempt(asked), made / "step-000002"))
    assert figures(again) == figures(whole)[2:]
    assert weights(again) == weights(whole)


def test_a_stop_inside_a_step_keeps_what_was_before_it(
    make_attempt: MakeAttempt, run_here: RunHere, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(prompts, {"training": {"max_steps": 4, "eval": {"at_start": False}}})
    whole, cut = run_here(make_attempt(asked)), make_attempt(asked)
    drawn = iter(range(1, 9))

    def stopped(*arguments: Any, stop: StopSignal, **options: Any) -> list[Drawn]:
        """The third step's answers end after one token: so does the longest step soon after it is asked to."""
        stop.asked = stop.asked or next(drawn) == 3
        answers = draw(*arguments, stop=stop, **options)
        assert not stop.asked or {len(answer.ids) for answer in answers} == {1}
        return answers

    with monkeypatch.context() as patch, pytest.raises(RunFailed, match="asked to stop"):
        patch.setattr(rollouts, "draw", stopped)
        run_here(cut)
    assert figures(cut) == figures(whole)[:2]
    [made] = cut.directory.checkpoints.iterdir()
    again = run_here(going_on(make_attempt(asked), made))
    assert figures(again) == figures(whole)[2:]
    assert weights(again) == weights(whole)


def test_the_size_of_a_forward_pass_changes_nothing(
    make_attempt: MakeAttempt, run_here: RunHere, prompts: Path
) -> None:
    runs = [figures(run_here(make_attempt(request(prompts), micro_batch_size=size))) for size in (4, 1)]
    for one, other in zip(*runs, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_two_ranks_do_what_one_does(make_attempt: MakeAttempt, start: Start, prompts: Path) -> None:
    asked = request(prompts, {"training": {"eval": {"max_rows": 9}}})  # in the last batch one rank has nothing
    one, two = make_attempt(asked, job="one"), make_attempt(asked, job="two", processes=2, micro_batch_size=2)
    assert start(one).wait(240) == 0, one.exit()
    assert start(two).wait(240) == 0, two.exit()
    for left, right in zip(figures(one), figures(two), strict=True):
        assert right == pytest.approx(left, rel=1e-3, abs=1e-5)
    evaluations = [[event.metrics for event in run.events("eval")] for run in (one, two)]
    assert evaluations[1][-1] == pytest.approx(evaluations[0][-1], rel=1e-3, abs=1e-5)
    expected, found = saved(one), saved(two)
    assert all(torch.allclose(found[name], tensor, atol=1e-4) for name, tensor in expected.items())


def test_an_adapter_that_training_goes_on_from_is_its_own_reference(
    make_attempt: MakeAttempt, run_here: RunHere, prompts: Path, tiny_model: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_model, seed=1)
    changes = {
        "model": {"source": f"file://{adapter}"},
        "adapter": {"lora": {"rank": 4, "target_modules": "all-linear"}},
    }
    ran = run_here(make_attempt(request(prompts, changes)))
    told = figures(ran)
    assert told[0]["kl"] == pytest.approx(0, abs=1e-6) and told[-1]["kl"] != 0
    files = list((ran.directory.scratch / "outputs" / "adapter").rglob("*.safetensors"))
    assert [file.name for file in files] == ["adapter_model.safetensors"]  # and no copy of the reference


def test_a_policy_that_leaves_its_reference_stops(make_attempt: MakeAttempt, run_here: RunHere, prompts: Path) -> None:
    changes = {
        "method": {"ppo": {"max_kl": 0.01, "init_kl_coef": 0.0}},
        "training": {"max_steps": 40, "learning_rate": 1e-2},
    }
    ran = run_here(make_attempt(request(prompts, changes)))
    assert 1 < len(figures(ran)) < 40
    assert "nats from the reference, max_kl is 0.01" in ran.events("warning")[-1].message


def test_sampling_is_that_of_the_softmax_and_depends_on_the_seed_alone(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), make_tokenizer()
    sampling = Sampling(max_new_tokens=1, temperature=0.7, pad=2, stops=(1,))
    prompt = Prompt(ids=tokenizer("ab")["input_ids"], text="ab", row={}, number=1)
    drawn = draw(model, [prompt] * 4000, sampling, seeds=range(4000), stop=StopSignal())
    with torch.no_grad():
        wanted = (model(torch.tensor([prompt.ids])).logits[0, -1] / 0.7).softmax(-1)
    found = torch.bincount(torch.tensor([one.ids[0] for one in drawn]), minlength=264) / 4000
    assert float((found - wanted).abs().sum()) / 2 < 0.12  # total variation of 4,000 draws from 264 tokens
    part = draw(model, [prompt] * 3, sampling, seeds=range(7, 10), stop=StopSignal())
    assert [one.ids for one in part] == [one.ids for one in drawn[7:10]]


def test_sampling_takes_nothing_from_the_models_own_files(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM, GenerationConfig

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), make_tokenizer()
    own = GenerationConfig(do_sample=True, top_k=1, repetition_penalty=5.0, suppress_tokens=list(range(3, 200)))
    model.generation_config = own
    sampling = Sampling(max_new_tokens=1, temperature=1.0, pad=2, stops=(1,))
    prompt = Prompt(ids=tokenizer("ab")["input_ids"], text="ab", row={}, number=1)
    drawn = draw(model, [prompt] * 200, sampling, seeds=range(200), stop=StopSignal())
    assert len({one.ids[0] for one in drawn}) > 50
    assert model.generation_config is own


def test_an_answer_ends_with_its_first_stop_token_where_that_is_the_padding_too(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), make_tokenizer()
    sampling = Sampling(max_new_tokens=8, temperature=5.0, pad=1, stops=(1, 70))
    prompts = [Prompt(ids=tokenizer("ab" * (i % 5 + 1))["input_ids"], text="", row={}, number=i) for i in range(400)]
    drawn = draw(model, prompts, sampling, seeds=range(400), stop=StopSignal())
    assert {one.ended for one in drawn} == {True, False}
    for one in drawn:
        stops = [token in (1, 70) for token in one.ids]
        assert stops == [False] * (len(one.ids) - 1) + [one.ended]
        assert one.ended or len(one.ids) == 8


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"method": {"ppo": {"mini_batch_size": 3}}}, "method.ppo.mini_batch_size"),
        ({"training": {"global_batch_size": 16}}, "training.global_batch_size"),
        ({"compute": {"strategy": "zero3"}}, "compute.strategy"),
        ({"adapter": {"lora": {"dropout": 0.1}}}, "adapter.lora.dropout"),
        ({"method": {"ppo": {"rewards": [{**VARIED, "weight": 0.0}]}}}, "method.ppo.rewards"),
        ({"method": {"ppo": {"rewards": [{"regex": {"pattern": "(a"}}]}}}, "method.ppo.rewards.0.regex.pattern"),
        (
            {"method": {"ppo": {"rewards": [{"json_schema": {"schema_text": "{"}}]}}},
            "method.ppo.rewards.0.json_schema.schema_text",
        ),
        (
            {"method": {"ppo": {"rewards": [{"answer": {"column": "a", "tolerance": 0.1}}]}}},
            "method.ppo.rewards.0.answer.tolerance",
        ),
    ],
)
def test_sizes_and_signals_that_do_not_fit_are_refused_with_their_field(
    prompts: Path, tiny_model: Path, changes: dict[str, Any], path: str
) -> None:
    whole = merged(
        {"name": "p", "model": {"source": f"file://{tiny_model}"}, "adapter": {"lora": {}}}, request(prompts)
    )
    del whole["method"]["sft"]
    with pytest.raises(InvalidRequest) as caught:
        parse(merged(whole, changes))
    assert [found.path for found in caught.value.violations] == [path]
