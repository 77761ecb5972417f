"""What the data set of a request becomes, without a model: `python -m hone_trainer inspect FILE`.

Called by the service in a subprocess where the trainer's libraries are installed, and by people. One JSON object on
stdout:
counts of rows and tokens, what is dropped and cut, and the first row as it is trained on, with the learned part marked.
"""

import json
import sys
import tempfile
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from hone.errors import HoneError
from hone.job import Launch
from hone.run import Run, TrainerExit
from hone.spec.parse import load
from hone_trainer.failure import classify, failure_of, failure_to_json

_ONE_PROCESS = Launch(
    launcher="direct",
    strategy="none",
    device="cpu",
    nodes=1,
    processes_per_node=1,
    gpus_per_node=0,
    precision="fp32",
    micro_batch_size=1,
    gradient_accumulation_steps=1,
    activation_checkpointing=False,
)


def inspect_file(path: Path) -> TrainerExit:
    """Print what becomes of the data; a failure is printed in the same form as in exit.json."""
    try:
        report: dict[str, Any] = _inspect(read_run(path))
        code = TrainerExit.SUCCEEDED
    except (HoneError, OSError) as error:
        failed = classify(error)
        report, code = {"failure": failure_to_json(failure_of(failed))}, failed.code
    sys.stdout.write(json.dumps(report, ensure_ascii=False) + "\n")
    return code


def read_run(path: Path) -> Run:
    """A run file as it is; a request as the run that it would become."""
    text = path.read_text(encoding="utf-8")
    data = yaml.safe_load(text)
    if isinstance(data, dict) and "launch" in data:
        return Run.from_yaml(text)
    return Run(
        namespace="default",
        job="inspect",
        attempt=1,
        nonce="",
        spec=load(path),
        launch=_ONE_PROCESS,
        store="file:///nowhere",
        inputs={},
    )


def _inspect(run: Run) -> dict[str, Any]:
    from hone_trainer.data import open_sets, temporary_files_in
    from hone_trainer.inputs import fetch
    from hone_trainer.model import load_tokenizer

    spec = run.spec
    assert spec.dataset is not None
    with tempfile.TemporaryDirectory(prefix="hone-inspect-") as scratch, temporary_files_in(Path(scratch)):
        inputs = fetch(run, Path(scratch), weights=False)
        tokenizer = load_tokenizer(inputs.tokenizer, spec.model)
        train, evaluation = open_sets(spec, inputs)
        prepared, found = read_sets(run, tokenizer, train, evaluation)
    counts = {"train": asdict(prepared.train_counts)}
    if prepared.eval_counts:
        counts["eval"] = asdict(prepared.eval_counts)
    return {
        "fingerprint": prepared.fingerprint,
        "counts": counts,
        "longest_row_tokens": prepared.train_counts.longest_row,
        **found,
    }


def read_sets(run: Run, tokenizer: Any, train: Any, evaluation: Any) -> tuple[Any, dict[str, Any]]:
    """The rows as they are trained on, and the first of them for people. Raises RunFailed."""
    method = run.spec.method
    read = _read_rows if method.sft else _read_prompts if method.rewarded else _read_pairs
    return read(run, tokenizer, train, evaluation)


def _read_rows(run: Run, tokenizer: Any, train: Any, evaluation: Any) -> tuple[Any, dict[str, Any]]:
    from hone_trainer.data import build
    from hone_trainer.encoding import make_encoder

    spec = run.spec
    assert spec.dataset is not None and spec.method.sft is not None
    encoder = make_encoder(tokenizer, spec.model, spec.dataset, spec.method.sft, train)
    prepared = build(encoder, train, evaluation, sft=spec.method.sft, questions=0)
    [first] = encoder.encode([train.first()])
    return prepared, {"format": encoder.format, "first_row": _pieces(tokenizer, first.ids, first.learned)}


def _read_prompts(run: Run, tokenizer: Any, train: Any, evaluation: Any) -> tuple[Any, dict[str, Any]]:
    from hone_trainer.prompts import prepare_prompts, prompt_encoder

    encoder = prompt_encoder(run.spec, tokenizer, train)
    prepared = prepare_prompts(run.spec, tokenizer, train, evaluation)
    ids = encoder.encode(encoder.prompt(train.first()))
    columns = [name for name in train.first() if name != encoder.column]
    first = _pieces(tokenizer, ids, [False] * len(ids))
    return prepared, {"format": "prompts", "first_row": first, "columns": columns}


def _read_pairs(run: Run, tokenizer: Any, train: Any, evaluation: Any) -> tuple[Any, dict[str, Any]]:
    from hone_trainer.pairs import SIDES, pairs_for, prepare_pairs

    encoder, limit = pairs_for(run.spec, tokenizer, train)
    prepared = prepare_pairs(encoder, limit, train, evaluation)
    [first] = encoder.encode([train.first()])
    rows = {
        side: _pieces(tokenizer, ids.tolist(), [place >= start for place in range(len(ids))])
        for side, ids, start in zip(SIDES, first.ids, first.starts, strict=True)
    }
    return prepared, {"format": "preference", "first_row": rows}


def _pieces(tokenizer: Any, ids: list[int], learned: list[bool]) -> list[dict[str, Any]]:
    return [{"learned": mark, "text": tokenizer.decode(tokens)} for mark, tokens in _runs(ids, learned)]


def _runs(ids: list[int], learned: list[bool]) -> list[tuple[bool, list[int]]]:
    """Neighbouring tokens that are alike in being learned or not."""
    pairs = zip(ids, learned, strict=True)
    return [(mark, [token for token, _ in group]) for mark, group in groupby(pairs, key=lambda pair: pair[1])]
