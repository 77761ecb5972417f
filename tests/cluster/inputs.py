"""What a real training run on the cluster reads: a tiny model and some rows, in a bucket of the S3 server."""

from pathlib import Path
from typing import Any

import boto3

from ..trainer.conftest import make_model, reversals, write_rows
from .harness.access import S3


def upload_inputs(s3: S3, bucket: str, directory: Path) -> dict[str, Any]:
    """Fill a bucket that exists; the part of a request that names what is in it, and four steps of LoRA on a CPU."""
    make_model(directory / "tiny")
    write_rows(directory / "rows" / "train.jsonl", reversals(64))
    client = boto3.client(
        "s3",
        endpoint_url=s3.endpoint,
        aws_access_key_id=s3.access_key,
        aws_secret_access_key=s3.secret_key,
        region_name="us-east-1",
    )
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        client.upload_file(str(path), bucket, f"inputs/{path.relative_to(directory)}")
    client.close()
    return {
        "name": "tiny",
        "model": {"source": f"s3://{bucket}/inputs/tiny"},
        "dataset": {"source": f"s3://{bucket}/inputs/rows"},
        "method": {"sft": {"max_length": 64}},
        "adapter": {"lora": {"rank": 4}},
        "training": {"max_steps": 4, "learning_rate": 1e-2, "precision": "fp32", "micro_batch_size": 4},
        "compute": {"gpus_per_node": 0, "processes_per_node": 1},
        "output": {"merged": True},
    }
