"""The process that answers: what each model says is what plain PEFT says, and what cannot be answered is said."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hone.cli.answering import Answering, Sampling
from hone.errors import PermanentError, UserError
from hone_trainer.answering import Pieces, Request, prompt_ids
from hone_trainer.failure import RunFailed
from hone_trainer.trial import Candidate, Wanted, gather
from hone_trainer.voices import Voice, load

from .conftest import make_adapter, make_model, make_tokenizer

pytestmark = pytest.mark.xdist_group("answering")
PROMPT = "reverse abcd = "
SHORT = Sampling(max_new_tokens=12)


def candidate(name: str, path: Path, *, base: Path | None = None) -> Candidate:
    kind = "adapter" if (path / "adapter_config.json").exists() else "model"
    return Candidate(
        name=name, kind=kind, asked=f"job://{name}/{kind}", path=str(path), base=f"file://{base}" if base else ""
    )


def wanted(scratch: Path, *jobs: Candidate, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Wanted(jobs=jobs, scratch=str(scratch), **changes).to_json())
    return found


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Sequence[Path]:
    place = tmp_path_factory.mktemp("adapters")
    return [make_adapter(place / name, tiny_model, seed=seed) for seed, name in enumerate(("first", "second"))]


@pytest.fixture(scope="module")
def answering(adapters: Sequence[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Answering]:
    """The base, an adapter with a dot in its name, and another."""
    scratch = tmp_path_factory.mktemp("scratch")
    jobs = [candidate(name, path) for name, path in zip(("v1.5", "second-1"), adapters, strict=True)]
    with Answering(sys.executable, wanted(scratch, *jobs), log=scratch / "log") as found:
        yield found


def plain_peft(base: Path, adapter: Path | None, *, max_new_tokens: int) -> str:
    """The likeliest tokens by nothing but the libraries."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    ids = make_tokenizer().apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**ids, do_sample=False, max_new_tokens=max_new_tokens)
    text: str = make_tokenizer().decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def test_every_model_answers_as_plain_peft_does(
    answering: Answering, tiny_model: Path, adapters: Sequence[Path]
) -> None:
    assert [(one.name, one.kind, one.chat) for one in answering.models] == [
        ("base", "base", True),
        ("v1.5", "adapter", True),
        ("second-1", "adapter", True),
    ]
    expected = [plain_peft(tiny_model, adapter, max_new_tokens=12) for adapter in (None, *adapters)]
    assert len(set(expected)) == 3
    for _ in range(2):  # whoever answered before leaves nothing behind
        found = [answering.ask(one.name, PROMPT, system=None, sampling=SHORT).text for one in answering.models]
        assert found == expected


def test_pieces_are_the_answer(answering: Answering) -> None:
    pieces: list[str] = []
    answer = answering.ask("base", PROMPT, system=None, sampling=SHORT, tell=pieces.append)
    assert "".join(pieces) == answer.text
    assert (answer.tokens, answer.ended_by) == (12, "length")


def test_a_seed_draws_the_same_again_and_another_does_not(answering: Answering) -> None:
    def draw(seed: int | None) -> str:
        sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=seed)
        return answering.ask("v1.5", PROMPT, system=None, sampling=sampling).text

    assert draw(1) == draw(1) != draw(2)
    assert len({draw(None), draw(None), answering.ask("v1.5", PROMPT, system=None, sampling=SHORT).text}) == 3


def test_ctrl_c_stops_the_answer_and_nothing_else(answering: Answering) -> None:
    def interrupt(_piece: str) -> None:
        signal.raise_signal(signal.SIGINT)

    with answering.stopped_by_interrupts():
        sampling = Sampling(max_new_tokens=480)
        answer = answering.ask("base", PROMPT, system=None, sampling=sampling, tell=interrupt)
    assert (answer.ended_by, answer.tokens < 480) == ("interrupt", True)
    assert answering.ask("base", PROMPT, system=None, sampling=SHORT).ended_by == "length"


def test_a_prompt_without_room_is_refused_and_the_next_is_answered(answering: Answering) -> None:
    with pytest.raises(UserError, match=r"The prompt has 60\d tokens, and base has 512 places in all"):
        answering.ask("base", "x" * 600, system=None, sampling=SHORT)
    assert answering.ask("base", "x" * 500, system=None, sampling=SHORT).ended_by == "length"


def test_a_killed_process_is_told(adapters: Sequence[Path], tmp_path: Path) -> None:
    with Answering(sys.executable, wanted(tmp_path, candidate("first-1", adapters[0])), log=tmp_path / "log") as found:
        os.kill(found._process.pid, signal.SIGKILL)
        with pytest.raises(PermanentError, match=r"was killed by SIGKILL\. SIGKILL without a word is often"):
            found.ask("base", PROMPT, system=None, sampling=SHORT)
        assert not found.is_alive


def test_a_python_without_the_trainer_is_told_what_to_install(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text('#!/bin/sh\necho "No module named hone_trainer" >&2; exit 1\n')
    bare.chmod(0o755)
    for python in (bare, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"cannot run the trainer.*Install the extra \[trainer\]"):
            Answering(str(python), {}, log=tmp_path / "log")


def answers_here(asked: Wanted) -> dict[str, str]:
    """Everybody's answer, in this process."""
    from hone_trainer.answering import answer

    request = Request(id=1, model="", prompt=PROMPT, max_new_tokens=12)
    voices = load(gather(asked))
    return {
        name: str(answer(voice, request, is_stopped=lambda: False, tell=lambda _: None)["text"])
        for name, voice in voices.by_name.items()
    }


def test_a_whole_model_answers_beside_the_base(tiny_model: Path, tmp_path: Path) -> None:
    whole = make_model(tmp_path / "whole", seed=7)
    found = answers_here(Wanted(jobs=(candidate("whole-1", whole, base=tiny_model),), scratch=str(tmp_path)))
    expected = {"base": tiny_model, "whole-1": whole}
    assert found == {name: plain_peft(path, None, max_new_tokens=12) for name, path in expected.items()}


def test_without_the_base_a_whole_model_needs_none(tmp_path: Path) -> None:
    whole = candidate("whole-1", make_model(tmp_path / "whole"), base=Path("/gone"))
    found = answers_here(Wanted(jobs=(whole,), scratch=str(tmp_path), asks_base=False))
    assert list(found) == ["whole-1"]


def test_a_base_that_is_another_one_by_now_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    adapter = make_adapter(tmp_path / "adapter", base, seed=1)
    make_model(base, seed=5)
    with pytest.raises(RunFailed, match=r"job://one-1/adapter was trained on .*, and .* is another model"):
        answers_here(Wanted(jobs=(candidate("one-1", adapter),), scratch=str(tmp_path)))


def test_jobs_of_two_bases_are_refused_with_both_names(adapters: Sequence[Path], tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=3)
    jobs = (candidate("one-1", adapters[0]), candidate("two-1", make_adapter(tmp_path / "two", other, seed=1)))
    with pytest.raises(RunFailed, match=r"one-1 was trained on file://\S+/tiny and two-1 on file://\S+/other: "):
        gather(Wanted(jobs=jobs, scratch=str(tmp_path)))
    jobs = (jobs[0], candidate("two-1", make_model(tmp_path / "whole"), base=other))
    with pytest.raises(RunFailed, match=r"/tiny and two-1 on file://\S+/other: "):
        gather(Wanted(jobs=jobs, scratch=str(tmp_path)))


def test_one_base_at_two_addresses_is_one(tiny_model: Path, adapters: Sequence[Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    jobs = (candidate("one-1", adapters[0]), candidate("two-1", make_adapter(tmp_path / "two", copy, seed=1)))
    assert gather(Wanted(jobs=jobs, scratch=str(tmp_path))).base


def test_trained_biases_keep_everybody_else_from_their_base(tiny_model: Path, tmp_path: Path) -> None:
    job = candidate("one-1", make_adapter(tmp_path / "adapter", tiny_model, seed=1, bias="all"))
    with pytest.raises(RunFailed, match="one-1 trained biases of its base"):
        answers_here(Wanted(jobs=(job,), scratch=str(tmp_path)))
    assert list(answers_here(Wanted(jobs=(job,), scratch=str(tmp_path), asks_base=False))) == ["one-1"]


@pytest.mark.parametrize(
    ("identities", "has_gpu", "dtype", "quantization", "note"),
    [
        (["bfloat16 "], True, torch.bfloat16, "", ""),
        (["bfloat16 ", "float32 "], True, torch.float32, "", ""),
        (["bfloat16 nf4", "bfloat16 nf4"], True, torch.bfloat16, "nf4", ""),
        (["bfloat16 nf4", "bfloat16 "], True, torch.bfloat16, "", "job-0 was trained on the base in 4 bits; not every"),
        (["float32 nf4"], False, torch.float32, "", "in 4 bits; there is no GPU, so here the base is float32"),
    ],
)
def test_the_base_is_loaded_as_it_was_trained_on_where_one_copy_can_be_that(
    identities: list[str],
    has_gpu: bool,
    dtype: torch.dtype,
    quantization: str,
    note: str,
    adapters: Sequence[Path],
    tmp_path: Path,
) -> None:
    from hone_trainer.inputs import Source
    from hone_trainer.voices import choose_precision

    jobs = []
    for number, identity in enumerate(identities):
        path = Path(shutil.copytree(adapters[0], tmp_path / str(number)))
        file = path / "hone_base.json"
        words = dict(zip(("dtype", "quantization"), identity.split(" "), strict=True))
        file.write_text(json.dumps(json.loads(file.read_text()) | words))
        jobs.append(candidate(f"job-{number}", path))
    precision, notes = choose_precision(jobs, Source(asked="", path=""), has_gpu=has_gpu)
    assert (precision.dtype, precision.quantization) == (dtype, quantization)
    assert note in "".join(notes) and bool(note) == bool(notes)


def voice(tokenizer: Any, *, plain: bool = False) -> Voice:
    return Voice(name="base", kind="base", model=None, tokenizer=tokenizer, plain=plain)


def test_prompts_go_through_the_chat_template_or_stay_as_they_are(tokenizer: Any) -> None:
    def seen(request: Request, *, plain: bool = False) -> str:
        return str(tokenizer.decode(prompt_ids(voice(tokenizer, plain=plain), request)))

    request = Request(id=1, model="base", prompt="hi", system="be brief")
    assert seen(request) == "<s>S:be brief;U:hi;A:"
    assert seen(Request(id=1, model="base", prompt="hi")) == "<s>U:hi;A:"
    assert seen(Request(id=1, model="base", prompt="hi"), plain=True) == "<s>hi"
    with pytest.raises(RunFailed, match="no place for a system prompt"):
        seen(request, plain=True)


def test_what_a_template_refuses_is_said() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(RunFailed, match="The chat template of base does not take this: System role not supported"):
        prompt_ids(voice(tokenizer), Request(id=1, model="base", prompt="hi", system="x"))


def test_half_a_character_is_not_shown(tokenizer: Any) -> None:
    told: list[str] = []
    pieces = Pieces(tokenizer, told.append)
    pieces.put(torch.tensor([[0]]))  # the prompt
    for token in tokenizer("aé!", add_special_tokens=False)["input_ids"]:
        pieces.put(torch.tensor([token]))
    assert told == ["a", "é", "!"]
