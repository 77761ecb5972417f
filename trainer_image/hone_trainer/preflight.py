"""A look at everything that a request names, before it runs: `python -m hone_trainer preflight FILE`.

Called in a subprocess by `hone plan`, and by a service that runs trainers on its own machine; loads no weights and
starts nothing. Prints one JSON object on stdout, whose `findings` are those of hone.findings: each thing is looked at
even where another one is at fault.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hone.errors import HoneError
from hone.findings import Finding, FindingState, not_checked, ok, to_json
from hone.hub import Target, look
from hone.modelinfo import read_adapter_directory
from hone.quantities import count, size
from hone.run import Run, TrainerExit
from hone.spec import Dataset, JobSpec, Model
from hone.spec.rewards import reward_models, scorers
from hone.spec.sources import bucket_and_prefix, sources
from hone.spec.splits import read_split
from hone.storage import open_store
from hone_trainer.failure import NothingLeft, classify
from hone_trainer.inputs import Inputs, Source, fetch_base, fetch_data, fetch_model, has_tokenizer
from hone_trainer.inspection import read_run, read_sets
from hone_trainer.push import TOKEN

ROWS = 64
"""Rows of each set that are read as training would."""
MOST_BYTES = 256 * 2**20
"""A data set in an object store that is larger is not fetched for a look."""
MANY = 0.1
"""From this share of rows on, being cut or dropped is a warning."""
_MAY_PASS = frozenset({TrainerExit.STORAGE})
"""What says nothing of the request: the Hub or the store cannot be reached at the moment."""


class _OutOfSight(HoneError):
    """What cannot be fetched here, where the run will be elsewhere and have rights of its own."""


def preflight_file(path: Path, *, elsewhere: bool = False) -> TrainerExit:
    """Print what was found, of a request or a run file; see findings_of."""
    try:
        run = read_run(path)
    except (HoneError, OSError) as error:
        failed = classify(error)
        finding = Finding(check="request", state=FindingState.FAILED, message=failed.message, fix=failed.fix)
        sys.stdout.write(json.dumps({"findings": to_json([finding])}) + "\n")
        return failed.code
    with tempfile.TemporaryDirectory(prefix="hone-preflight-") as scratch:
        found = findings_of(run, Path(scratch), elsewhere=elsewhere)
    sys.stdout.write(json.dumps({"findings": to_json(found)}, ensure_ascii=False) + "\n")
    return TrainerExit.SUCCEEDED


def findings_of(run: Run, scratch: Path, *, elsewhere: bool = False) -> list[Finding]:
    """What a look at the sources of a run finds; what has to be fetched for it is left in `scratch`.

    Where the run will be `elsewhere`, what cannot be fetched from here says nothing of it, and neither does a token.
    """
    return _Look(run, scratch, elsewhere).findings()


@dataclass
class _Look:
    """One look, into a directory of its own."""

    run: Run
    scratch: Path
    elsewhere: bool
    found: list[Finding] = field(default_factory=list)

    def findings(self) -> list[Finding]:
        """Everything, each on its own."""
        spec = self.run.spec
        model = self._model(spec)
        tokenizer = self._tokenizer(spec, model) if model else None
        if spec.dataset:
            self._data(spec, spec.dataset, tokenizer)
        self._rewards(spec)
        if spec.output.hub and not self.elsewhere:
            self._hub(spec)
        return self.found

    @contextmanager
    def _looking(self, check: str, path: str) -> Iterator[None]:
        """What goes wrong in the block is a finding."""
        try:
            yield
        except _OutOfSight as error:
            self.found.append(not_checked(check, f"It cannot be fetched from here: {error.message}", path=path))
        except (HoneError, OSError) as error:
            failed = classify(error)
            state = FindingState.NOT_CHECKED if failed.code in _MAY_PASS else FindingState.FAILED
            message = failed.message.removeprefix(f"{path}: ")
            self.found.append(Finding(check=check, state=state, path=path, message=message, fix=failed.fix))

    @contextmanager
    def _fetching(self) -> Iterator[None]:
        """What goes wrong in the block is about the way from here."""
        try:
            yield
        except (HoneError, OSError) as error:
            if self.elsewhere:
                raise _OutOfSight(classify(error).message) from error
            raise

    def _is_to_come(self, source: str) -> bool:
        """Whether it is the output of a job that has not ended, as far as is known."""
        return source.startswith("job://") and source not in self.run.inputs

    def _fetch(self, path: str, source: str, place: Path, *, weights: bool = False) -> Source:
        with self._fetching():
            return fetch_model(path, source, place, address=self.run.inputs.get(source, ""), weights=weights)

    def _model(self, spec: JobSpec) -> Source | None:
        """Where its config and tokenizer lie now; an adapter's directory where that has a tokenizer of its own."""
        path, source = "model.source", spec.model.source
        if self._is_to_come(source):
            self.found.append(_comes("model", source, path))
            return None
        tokenizer = None
        with self._looking("model", path):
            from hone_trainer.model import check_config, check_model

            named = self._fetch(path, source, self.scratch / "model")
            with self._fetching():
                base, _ = fetch_base(self.run, named, self.scratch, weights=False)
            tokenizer = named if has_tokenizer(named) else base
            is_whole = base.asked.startswith("file://")
            config = (check_model if is_whole else check_config)(base, scores=spec.method.reward is not None)
            what = "config and weights" if is_whole else "config"
            text = f"{source}: a {config['model_type']}, whose {what} can be read"
            self.found.append(ok("model", f"{text}.", path=path, how=_how(source)))
        return tokenizer

    def _tokenizer(self, spec: JobSpec, model: Source) -> Any:
        path = "model.tokenizer" if spec.model.tokenizer else "model.source"
        with self._looking("tokenizer", path):
            from hone_trainer.model import load_tokenizer

            source = model
            if asked := spec.model.tokenizer:
                source = self._fetch(path, asked, self.scratch / "tokenizer", weights=True)
            tokenizer = load_tokenizer(source, spec.model)
            template = "with" if tokenizer.chat_template else "without"
            text = f"{source.asked}: {count(len(tokenizer))} tokens, {template} a chat template."
            self.found.append(ok("tokenizer", text, path=path, how="loaded by transformers"))
            return tokenizer
        return None

    def _data(self, spec: JobSpec, dataset: Dataset, tokenizer: Any) -> None:
        path = "dataset.source"
        named = [source for place, source in sources(spec) if place.startswith("dataset.")]
        with self._looking("data", path):
            looked_at = spec.model_copy(update={"dataset": _whole_splits(dataset)})
            with self._fetching():
                if large := _too_large(named):
                    self.found.append(not_checked("data", large, path=path))
                    return
                parts = fetch_data(self.run, dataset, self.scratch, first=ROWS)
            nowhere = Source(asked="", path="")
            self._rows(looked_at, tokenizer, Inputs(model=nowhere, tokenizer=nowhere, **parts))

    def _rows(self, spec: JobSpec, tokenizer: Any, inputs: Inputs) -> None:
        from hone_trainer.data import open_sets

        path = "dataset.source"
        train, evaluation = open_sets(spec, inputs)
        asked = train.source
        if tokenizer is None:
            text = f"{asked} opens; its rows are read once the tokenizer is there."
            self.found.append(not_checked("data", text, path=path))
            return
        some = _some(train)
        try:
            prepared, told = read_sets(
                replace(self.run, spec=spec), tokenizer, some, _some(evaluation) if evaluation else None
            )
        except NothingLeft as error:
            if len(some) == len(train):
                raise
            text = f"{error.message} Others of its {count(len(train))} rows may."
            state = FindingState.WARNING
            self.found.append(Finding(check="data", state=state, message=text, fix=error.fix, path=path, how=_ROWS_HOW))
            return
        counts = prepared.train_counts
        lost = counts.rows_dropped + counts.rows_truncated
        losses = f", {count(counts.rows_dropped)} dropped and {count(counts.rows_truncated)} cut for their length"
        text = (
            f"{asked}: {told['format'].replace('_', ', ')}; {count(counts.rows)} rows looked at, the longest has "
            f"{count(counts.longest_row)} tokens{losses if lost else ''}."
        )
        state = FindingState.WARNING if lost >= MANY * counts.rows else FindingState.OK
        fix = "`hone data` shows the lengths of all rows." if state == FindingState.WARNING else ""
        self.found.append(Finding(check="data", state=state, message=text, fix=fix, path=path, how=_ROWS_HOW))

    def _rewards(self, spec: JobSpec) -> None:
        for number, path, part in reward_models(spec):
            check = f"reward {number}"
            if self._is_to_come(part.source):
                self.found.append(_comes(check, part.source, path))
                continue
            with self._looking(check, path):
                self._reward_model(check, path, part.source, self.scratch / check.replace(" ", "-"))
        for address in scorers(spec):
            text = f"{address} is asked first by the run: a question may do something there."
            self.found.append(not_checked("scorer", text))

    def _reward_model(self, check: str, path: str, source: str, place: Path) -> None:
        from hone_trainer.model import check_config, load_tokenizer

        named = self._fetch(path, source, place)
        saved = read_adapter_directory(Path(named.path), named.asked)
        model = self._fetch(path, saved.base, place / "base") if saved else named
        config = check_config(model, scores=True)
        load_tokenizer(named if has_tokenizer(named) else model, Model(source=source))
        text = f"{source}: a {config['model_type']}, with a tokenizer."
        self.found.append(ok(check, text, path=path, how=_how(source)))

    def _hub(self, spec: JobSpec) -> None:
        hub = spec.output.hub
        assert hub is not None
        path = "output.hub.repo"
        target = Target(repo=hub.repo, private=hub.private, **({"branch": hub.branch} if hub.branch else {}))
        with self._looking("hub", path):
            text = look(target, token=os.environ.get(TOKEN, ""))
            self.found.append(ok("hub", text, path=path, how="asked the Hub, changed nothing"))


_ROWS_HOW = "read by the trainer as it reads them"


def _how(source: str) -> str:
    return "fetched without weights" if source.partition("://")[0] in ("hf", "s3") else "read where it lies"


def _comes(check: str, source: str, path: str) -> Finding:
    return not_checked(check, f"{source} is looked at when that job has ended.", path=path)


def _too_large(named: list[str]) -> str:
    """Why an object store's data set is not fetched for a look; empty where all are small."""
    for source in named:
        if source.startswith("s3://"):
            bucket, prefix = bucket_and_prefix(source)
            total = sum(item.size_bytes for item in open_store(f"s3://{bucket}").list_objects(prefix))
            if total > MOST_BYTES:
                return f"{source} has {size(total)}, too much to fetch for a look: its rows are read by the run."
    return ""


def _whole_splits(dataset: Dataset) -> Dataset:
    """Of the Hub's sets only the first rows come, so that a slice of them would be another one."""

    def whole(source: str, split: str | None) -> str | None:
        if not source.startswith("hf://") or split is None:
            return split
        return "+".join(dict.fromkeys(part.name for part in read_split(split)))

    return dataset.model_copy(
        update={
            "split": whole(dataset.source, dataset.split),
            "eval_split": whole(dataset.eval_source or dataset.source, dataset.eval_split),
            "mix": tuple(part.model_copy(update={"split": whole(part.source, part.split)}) for part in dataset.mix),
        }
    )


def _some(rows: Any) -> Any:
    """The first rows of one file; of several files, rows of all of them."""
    if len(rows.parts) == 1 or len(rows) <= ROWS:
        return rows.head(ROWS)
    return rows.select(np.linspace(0, len(rows) - 1, ROWS).astype(np.int64))
