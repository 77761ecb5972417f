"""The example scripts, run as a person runs them, on a library of a few files."""

import json
import subprocess
import sys
from pathlib import Path
from zlib import crc32

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SHARED = "Return the answer that both modules promise."
COUNTS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, EXAMPLES / script, *arguments], capture_output=True, text=True, timeout=240, check=False
    )


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def is_held_out(module: str) -> bool:
    return crc32(module.encode()) % 10 == 0


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty modules of twelve functions; each also repeats one answer, and one stands among tests."""
    source = tmp_path_factory.mktemp("library")
    for number in range(40):
        body = [f'"""Module number {number} of the little library."""']
        body += [
            f"def take_{count}(self, size: int = 3) -> int:\n"
            f'    """Take {count} things out of box {number}.\n\n    More."""'
            for count in COUNTS
        ]
        body.append(f'class Box:\n    def promise(self, *, twice=False):\n        """{SHARED}"""')
        (source / f"box{number}.py").write_text("\n".join(body))
    (source / "test").mkdir()
    (source / "test" / "box.py").write_text('def hidden():\n    """This one belongs to the tests only."""')
    (source / "broken.py").write_text("def (")
    return source


@pytest.fixture(scope="module")
def data(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("examples") / "data"
    done = run("make_dataset.py", "--source", library, "--output", output)
    assert done.returncode == 0, done.stderr
    return output


def test_no_module_stands_in_both_splits_and_none_is_lost(data: Path) -> None:
    modules = {
        split: {row["prompt"].split("box")[1].split(".")[0].split("?")[0] for row in rows(data / f"{split}.jsonl")}
        for split in ("train", "eval")
    }
    assert modules["eval"] == {str(n) for n in range(40) if is_held_out(f"box{n}")}
    assert modules["train"] == {str(n) for n in range(40)} - modules["eval"]


def test_no_answer_is_given_twice_or_known_before_eval(data: Path) -> None:
    answers = [row["completion"] for split in ("train", "eval") for row in rows(data / f"{split}.jsonl")]
    assert len(answers) == len(set(answers))
    assert answers.count(SHARED) == 1
    documentation = (data / "documentation.jsonl").read_text()
    assert not [row["completion"] for row in rows(data / "eval.jsonl") if row["completion"] in documentation]


def test_rows_hold_a_signature_and_the_first_paragraph_only(data: Path) -> None:
    expected = {"prompt": "What does box1.take_two(self, size=3) do?\n", "completion": "Take two things out of box 1."}
    assert expected in rows(data / "train.jsonl") + rows(data / "eval.jsonl")


def test_methods_are_named_with_their_class_and_without_self(data: Path) -> None:
    assert "What does box0.Box.promise(*, twice=False) do?\n" in [
        row["prompt"] for split in ("train", "eval") for row in rows(data / f"{split}.jsonl")
    ]


def test_tests_of_the_library_are_left_out(data: Path) -> None:
    assert "tests only" not in "".join(path.read_text() for path in data.iterdir())


def test_complete_data_is_kept_and_damaged_data_is_made_again(library: Path, tmp_path: Path) -> None:
    arguments = ("make_dataset.py", "--source", library, "--output", tmp_path / "data")
    run(*arguments)
    whole = (tmp_path / "data" / "train.jsonl").read_bytes()
    assert "nothing to do" in run(*arguments).stdout
    (tmp_path / "data" / "train.jsonl").write_bytes(whole[:-20])
    assert "nothing to do" not in run(*arguments).stdout
    assert (tmp_path / "data" / "train.jsonl").read_bytes() == whole


def test_a_library_without_both_splits_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = run("make_dataset.py", "--source", tmp_path / "empty", "--output", tmp_path / "data")
    assert done.returncode == 1
    assert "--source" in done.stderr
    assert not (tmp_path / "data").exists()


def test_the_base_without_data_names_the_command_that_makes_it(tmp_path: Path) -> None:
    done = run("make_base.py", "--data", tmp_path / "none.jsonl", "--output", tmp_path / "base")
    assert done.returncode == 2
    assert "make_dataset.py" in done.stderr


@pytest.fixture(scope="module")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("base") / "small"
    done = run("make_base.py", "--data", data / "documentation.jsonl", "--output", output, "--steps", "3", "--small")
    assert done.returncode == 0, done.stderr
    return output


def test_a_small_base_is_saved_as_safetensors_and_loads(base: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert (base / "model.safetensors").is_file()
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_a_finished_base_is_kept_and_another_request_is_not_taken_for_it(data: Path, base: Path) -> None:
    arguments = ("make_base.py", "--data", data / "documentation.jsonl", "--output", base, "--small")
    written = (base / "model.safetensors").stat().st_mtime_ns
    assert "nothing to do" in run(*arguments, "--steps", "3").stdout
    assert (base / "model.safetensors").stat().st_mtime_ns == written
    assert "nothing to do" not in run(*arguments, "--steps", "2").stdout


def test_the_chat_template_learns_the_answer_with_its_end_and_nothing_else(base: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    chat = [{"role": "user", "content": "take two?"}, {"role": "assistant", "content": "Take two things."}]
    encoded = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    marked = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    learned = [token for token, mask in marked if mask]
    assert tokenizer.decode(learned) == f"Take two things.{tokenizer.eos_token}"
