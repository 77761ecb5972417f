from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hone.run import TrainerExit
from hone.spec import Columns, Dataset, Model
from hone.spec.methods import Sft
from hone.spec.parse import parse
from hone_trainer.data import build
from hone_trainer.encoding import Encoded, Encoder, make_encoder, problem
from hone_trainer.failure import RunFailed
from hone_trainer.pairs import pairs_for, prepare_pairs
from hone_trainer.prompts import prepare_prompts
from hone_trainer.rows import Rows, open_rows

from .conftest import CHAT_TEMPLATE, write_rows

CHAT = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long"},
]
BOS, EOS = 0, 1


def rows_of(tmp_path: Path, *rows: Mapping[str, Any]) -> Rows:
    import json

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return open_rows(path, source="file:///rows.jsonl", split="train")


def encoder_for(
    tokenizer: Any, rows: Rows, *, model: Mapping[str, Any] | None = None, loss_on: str = "auto", **dataset: Any
) -> Encoder:
    return make_encoder(
        tokenizer,
        Model(source="file:///base", **(model or {})),
        Dataset(source="file:///rows.jsonl", **dataset),
        Sft(loss_on=loss_on),  # type: ignore[arg-type]
        rows,
    )


def learned_text(tokenizer: Any, row: Encoded) -> str:
    text: str = tokenizer.decode([token for token, mark in zip(row.ids, row.learned, strict=True) if mark])
    return text


def encode_one(tokenizer: Any, tmp_path: Path, row: Mapping[str, Any], **options: Any) -> Encoded:
    rows = rows_of(tmp_path, row)
    [encoded] = encoder_for(tokenizer, rows, **options).encode([row])
    return encoded


@pytest.fixture
def fresh_tokenizer(tokenizer: Any) -> Any:
    """A copy whose template and stop token a test may change."""
    import copy

    return copy.deepcopy(tokenizer)


def test_chat_learns_the_answers_and_their_stop_tokens_only(tokenizer: Any, tmp_path: Path) -> None:
    row = encode_one(tokenizer, tmp_path, {"messages": CHAT})
    assert learned_text(tokenizer, row) == "yo</s>so long</s>"
    assert row.ids.count(BOS) == 1


def test_chat_learns_everything_when_asked(tokenizer: Any, tmp_path: Path) -> None:
    row = encode_one(tokenizer, tmp_path, {"messages": CHAT}, loss_on="all")
    assert all(row.learned)
    assert row.ids[-1] == EOS


def test_completion_is_learned_with_its_stop_token(tokenizer: Any, tmp_path: Path) -> None:
    row = encode_one(tokenizer, tmp_path, {"prompt": "2+2=", "completion": "4"})
    assert learned_text(tokenizer, row) == "4</s>"
    assert tokenizer.decode(row.ids) == "<s>2+2=4</s>"


def test_prompt_and_completion_are_learned_when_asked(tokenizer: Any, tmp_path: Path) -> None:
    row = encode_one(tokenizer, tmp_path, {"prompt": "2+2=", "completion": "4"}, loss_on="all")
    assert all(row.learned)


def test_prompt_and_completion_may_be_messages(tokenizer: Any, tmp_path: Path) -> None:
    row = encode_one(tokenizer, tmp_path, {"prompt": CHAT[:4], "completion": CHAT[4:]})
    assert learned_text(tokenizer, row) == "so long</s>"


def test_text_is_learned_whole_and_ends_with_the_stop_token(tokenizer: Any, tmp_path: Path) -> None:
    row = encode_one(tokenizer, tmp_path, {"text": "once upon"})
    assert tokenizer.decode(row.ids) == "<s>once upon</s>"
    assert all(row.learned)


@pytest.mark.parametrize("row", [{"text": "<s>doubled"}, {"prompt": "<s>doubled", "completion": "x"}])
def test_there_is_exactly_one_beginning_of_sequence(tokenizer: Any, tmp_path: Path, row: dict[str, str]) -> None:
    assert encode_one(tokenizer, tmp_path, row).ids.count(BOS) == 1


def test_a_stop_token_in_the_text_is_not_doubled(tokenizer: Any, tmp_path: Path) -> None:
    assert encode_one(tokenizer, tmp_path, {"prompt": "a", "completion": "b</s>"}).ids.count(EOS) == 1


def test_columns_are_found_by_the_names_they_have(tokenizer: Any, tmp_path: Path) -> None:
    row = {"question": "q", "answer": "a"}
    columns = Columns(prompt="question", completion="answer")
    assert learned_text(tokenizer, encode_one(tokenizer, tmp_path, row, columns=columns)) == "a</s>"


def test_a_system_prompt_stands_before_conversations_that_have_none(tokenizer: Any, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"messages": CHAT})
    encoder = encoder_for(tokenizer, rows, model={"system_prompt": "be kind"})
    with_system, without = encoder.encode([{"messages": CHAT}, {"messages": CHAT[1:]}])
    assert "be kind" not in tokenizer.decode(with_system.ids)
    assert tokenizer.decode(without.ids).startswith("<s>S:be kind;")


def test_a_template_that_leaves_out_the_stop_token_learns_it_all_the_same(fresh_tokenizer: Any, tmp_path: Path) -> None:
    fresh_tokenizer.chat_template = fresh_tokenizer.chat_template.replace(
        "{{ eos_token }}{% endgeneration %}", "{% endgeneration %}{{ eos_token }}"
    )
    row = encode_one(fresh_tokenizer, tmp_path, {"messages": CHAT})
    assert learned_text(fresh_tokenizer, row) == "yo</s>so long</s>"


def test_a_template_without_any_stop_token_gets_one(fresh_tokenizer: Any, tmp_path: Path) -> None:
    fresh_tokenizer.chat_template = fresh_tokenizer.chat_template.replace("{{ eos_token }}", "")
    row = encode_one(fresh_tokenizer, tmp_path, {"messages": CHAT})
    assert learned_text(fresh_tokenizer, row).endswith("so long</s>")
    assert row.ids[-1] == EOS


def test_white_space_after_the_stop_token_is_not_learned(fresh_tokenizer: Any, tmp_path: Path) -> None:
    fresh_tokenizer.chat_template = fresh_tokenizer.chat_template.replace(
        "{{ eos_token }}{% endgen", "{{ eos_token + '\\n' }}{% endgen"
    )
    row = encode_one(fresh_tokenizer, tmp_path, {"messages": CHAT})
    assert learned_text(fresh_tokenizer, row).endswith("so long</s>")


def test_an_end_of_turn_that_generation_does_not_stop_at_is_refused_with_the_fix(
    fresh_tokenizer: Any, tmp_path: Path
) -> None:
    fresh_tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    fresh_tokenizer.chat_template = fresh_tokenizer.chat_template.replace("{{ eos_token }}", "<|end|>")
    with pytest.raises(RunFailed, match=r"Set model\.eos_token to '<\|end\|>'") as caught:
        encode_one(fresh_tokenizer, tmp_path, {"messages": CHAT})
    assert caught.value.code == TrainerExit.USER
    fresh_tokenizer.eos_token = "<|end|>"
    row = encode_one(fresh_tokenizer, tmp_path, {"messages": CHAT})
    assert learned_text(fresh_tokenizer, row).endswith("so long<|end|>")


def test_a_template_that_does_not_mark_the_answers_is_refused_with_the_fix(
    fresh_tokenizer: Any, tmp_path: Path
) -> None:
    fresh_tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    with pytest.raises(RunFailed, match=r"\{% generation %\}.*loss_on to all"):
        encode_one(fresh_tokenizer, tmp_path, {"messages": CHAT})
    assert all(encode_one(fresh_tokenizer, tmp_path, {"messages": CHAT}, loss_on="all").learned)


def test_a_known_familys_template_is_marked_for_training(fresh_tokenizer: Any, tmp_path: Path) -> None:
    from trl import chat_template_utils

    fresh_tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    fresh_tokenizer.chat_template = chat_template_utils.qwen2_5_chat_template
    fresh_tokenizer.eos_token = "<|im_end|>"
    row = encode_one(fresh_tokenizer, tmp_path, {"messages": CHAT})
    # TRL's marks begin at the line break after the role; what matters is the answers and their ends.
    assert learned_text(fresh_tokenizer, row).split() == ["yo<|im_end|>", "so", "long<|im_end|>"]


def test_conversations_without_a_template_are_refused(fresh_tokenizer: Any, tmp_path: Path) -> None:
    fresh_tokenizer.chat_template = None
    with pytest.raises(RunFailed, match=r"Set model\.chat_template"):
        encode_one(fresh_tokenizer, tmp_path, {"messages": CHAT})


def test_loss_on_the_response_of_plain_text_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="loss_on: response needs a response"):
        encode_one(tokenizer, tmp_path, {"text": "x"}, loss_on="response")


@pytest.mark.parametrize("row", [{"text": "x"}, {"prompt": "x", "completion": "y"}])
def test_a_system_prompt_without_conversations_is_refused(tokenizer: Any, tmp_path: Path, row: dict[str, str]) -> None:
    with pytest.raises(RunFailed, match="system_prompt needs conversations"):
        encode_one(tokenizer, tmp_path, row, model={"system_prompt": "be kind"})


def test_missing_columns_are_named_beside_those_that_are_there(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(
        RunFailed, match="has the columns question, answer; messages or prompt and completion or text"
    ) as e:
        encode_one(tokenizer, tmp_path, {"question": "q", "answer": "a"})
    assert e.value.code == TrainerExit.DATA


def test_a_token_across_the_boundary_is_learned_and_counted(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "a", "b", "ab"])}
    merging = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")])), bos_token="<s>", eos_token="</s>"
    )
    rows = rows_of(tmp_path, {"prompt": "aa", "completion": "bb"})
    encoder = encoder_for(merging, rows)
    [row] = encoder.encode([rows.first()])
    assert merging.convert_ids_to_tokens(row.ids) == ["a", "ab", "b", "</s>"]
    assert row.learned == [False, True, True, True]
    assert encoder.merged_boundaries == 1


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": "hi"}, "messages is of type str where a list of messages is expected"),
        ({"messages": []}, "messages is empty (list) where a list"),
        ({"messages": None}, "messages is absent"),
        (
            {"messages": [{"from": "human", "value": "x"}]},
            "message 1 of messages has no role and content, but from, value",
        ),
        ({"messages": [{"role": "user", "content": ""}]}, "message 1 of messages (user) has no text"),
        ({"messages": [{"role": "user", "content": 7}]}, "message 1 of messages (user) has no text"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages has no assistant turn to learn"),
        ({"other": 1}, "has no column messages, only other"),
    ],
)
def test_what_is_wrong_with_a_conversation_is_said(tokenizer: Any, row: dict[str, Any], expected: str) -> None:
    encoder = Encoder(tokenizer=tokenizer, format="messages", columns=Columns(), respond_only=True)
    assert (problem(encoder, row) or "").startswith(expected)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "x", "completion": "  "}, "completion is empty"),
        ({"prompt": "x", "completion": None}, "completion is absent where a text is expected"),
        ({"prompt": 3, "completion": "x"}, "prompt is of type int where a text is expected"),
        (
            {"prompt": "x", "completion": [{"role": "assistant", "content": "y"}]},
            "prompt and completion are not both texts",
        ),
    ],
)
def test_what_is_wrong_with_a_completion_is_said(tokenizer: Any, row: dict[str, Any], expected: str) -> None:
    encoder = Encoder(tokenizer=tokenizer, format="prompt_completion", columns=Columns(), respond_only=True)
    assert (problem(encoder, row) or "").startswith(expected)


def test_a_good_row_has_no_problem(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer=tokenizer, format="messages", columns=Columns(), respond_only=True)
    assert problem(encoder, {"messages": CHAT}) is None


STRICT = CHAT_TEMPLATE.replace(
    "{% for message in messages %}",
    "{% for message in messages %}{% if message['role'] == 'tool' %}{{ raise_exception('No role tool') }}{% endif %}",
)
ASK, TOLD, YES = ({"role": role, "content": "x"} for role in ("user", "tool", "assistant"))


@pytest.mark.parametrize("method", ["sft", "dpo", "ppo"])
def test_a_template_without_the_roles_of_the_data_is_said_with_the_row(
    fresh_tokenizer: Any, tmp_path: Path, method: str
) -> None:
    fresh_tokenizer.chat_template = STRICT
    good, bad = [ASK, YES], [ASK, TOLD, YES]
    rows: list[dict[str, Any]] = {
        "sft": [{"messages": good}, {"messages": bad}],
        "dpo": [{"chosen": one, "rejected": [*one[:-1], {**YES, "content": "no"}]} for one in (good, bad)],
        "ppo": [{"messages": good}, {"messages": bad}],
    }[method]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    settings = {"sft": {}, "dpo": {}, "ppo": {"rewards": [{"length": {"max_tokens": 3}}]}}[method]
    spec = parse(
        {
            "name": "roles",
            "model": {"source": "file:///base"},
            "dataset": {"source": f"file://{file}"},
            "method": {method: settings},
            "adapter": {"lora": {}},
        }
    )
    train = open_rows(file, source="rows", split="train")
    assert spec.dataset is not None
    with pytest.raises(RunFailed, match=r"does not take row 2 \(rows\.jsonl line 2\) of rows: No role tool") as caught:
        if method == "sft":
            sft = Sft()
            build(
                make_encoder(fresh_tokenizer, spec.model, spec.dataset, sft, train), train, None, sft=sft, questions=0
            )
        elif method == "dpo":
            prepare_pairs(*pairs_for(spec, fresh_tokenizer, train), train, None)
        else:
            prepare_prompts(spec, fresh_tokenizer, train, None)
    assert caught.value.code == TrainerExit.DATA and "model.chat_template" in caught.value.fix
