"""Fetch splits of a Hub data set as parquet files, in a process that may go online. Called by inputs.py.

It prints the revision; when it fails, a JSON object with message and fix, and ends with the TrainerExit code.
"""

import json
import sys
from pathlib import Path

from hone.run import TrainerExit
from hone_trainer.hub import hub_failure


def main(field: str, source: str, config: str, target: str, first: str, *splits: str) -> int:
    """Write `<target>/<split>.parquet` for every split; of each only so many rows, where `first` is a number."""
    from datasets import Dataset, load_dataset

    repository, _, revision = source.removeprefix("hf://").partition("@")
    try:
        for name in splits:
            rows = load_dataset(
                repository, config or None, split=name, revision=revision or None, streaming=bool(first)
            )
            if first:
                rows = Dataset.from_list(list(rows.take(int(first))))
            rows.to_parquet(Path(target) / f"{name}.parquet")
    except Exception as error:
        failed = hub_failure(error, field=field, source=source, otherwise=TrainerExit.DATA)
        sys.stdout.write(json.dumps({"message": failed.message, "fix": failed.fix}))
        return int(failed.code)
    sys.stdout.write(revision)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
