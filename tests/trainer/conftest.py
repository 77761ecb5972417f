"""A tiny Llama with a byte tokenizer, run directories, and golden losses: what every test of the trainer starts
from."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from hone.job import Event, Launch
from hone.run import Run, RunDirectory
from hone.spec.parse import parse
from hone_trainer.report import parse_event
from hone_trainer.trackers import hide

hide()  # as in a worker
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # read when the libraries are imported
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache" / "torch_extensions"))
"""What DeepSpeed compiles takes minutes, and all tests share it."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "A:{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['role'][0] | upper }}:{{ message['content'] }};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
GOLDEN = Path(__file__).parent.parent / "golden" / "losses.json"


def make_tokenizer() -> Any:
    """One token for each byte, BOS in front of every text, and a chat template that marks the answers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>"]
    alphabet = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=4096
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(path: Path, *, dtype: str = "float32", seed: int = 0, **changes: Any) -> Path:
    """A Llama of about 100,000 parameters, with its tokenizer, as a directory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = {"vocab_size": 264, "num_key_value_heads": 2, "max_position_embeddings": 512, **sizes, **changes}
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2, **settings))
    model.to(getattr(torch, dtype)).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def make_adapter(path: Path, base: Path, *, seed: int, bias: Literal["none", "all"] = "none", **identity: str) -> Path:
    """An adapter of random weights on a model, as a run leaves one; `identity` replaces what it says of its base."""
    import torch
    from transformers import AutoModelForCausalLM

    from hone.spec import Lora
    from hone_trainer.base_identity import base_identity
    from hone_trainer.inputs import Source
    from hone_trainer.lora import add_lora

    model = add_lora(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), Lora(rank=4, bias=bias))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path, save_embedding_layers=False)
    make_tokenizer().save_pretrained(path)
    known = base_identity(Source(asked=f"file://{base}", path=str(base)))
    (path / "hone_base.json").write_text(json.dumps(known | {"dtype": "float32", "quantization": ""} | identity))
    return path


def reversals(count: int, *, start: int = 0) -> list[dict[str, str]]:
    """Small tasks of unequal lengths: reverse some letters."""
    words = ["".join(chr(97 + (i * 7 + k * 3) % 16) for k in range(2 + i % 9)) for i in range(start, start + count)]
    return [{"prompt": f"reverse {word} = ", "completion": word[::-1]} for word in words]


def preferences(count: int, *, start: int = 0) -> list[dict[str, str]]:
    """The same tasks with a wrong answer beside the right one, of another length."""
    rows = reversals(count, start=start)
    return [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["completion"][::-1] + "ab"[: i % 3]}
        for i, row in enumerate(rows)
    ]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "train.jsonl", reversals(64))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


def merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes laid over a mapping, level by level; None takes a key away, and stays where there is none."""
    merged = dict(base)
    for key, value in changes.items():
        inner = merged.get(key)
        if value is None and key in merged:
            del merged[key]
        else:
            merged[key] = (
                merge(inner if isinstance(inner, dict) else {}, value) if isinstance(value, Mapping) else value
            )
    return merged


class Attempt:
    """A run directory that is ready to be run, and what became of it."""

    def __init__(self, path: Path, run: Run) -> None:
        self.directory = RunDirectory(path)
        self.run = run
        path.mkdir(parents=True)
        self.directory.run_file.write_text(run.to_yaml(), encoding="utf-8")

    @property
    def store(self) -> Path:
        return Path(self.run.store.removeprefix("file://")) / self.run.namespace / self.run.job

    def events(self, kind: str = "") -> list[Event]:
        lines = self.directory.events.read_bytes().splitlines()
        events = [parse_event(line, seq) for seq, line in enumerate(lines, start=1)]
        return [event for event in events if not kind or event.type == kind]

    def losses(self) -> list[float]:
        return [event.metrics["loss"] for event in self.events("progress")]

    def exit(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(self.directory.exit.read_text(encoding="utf-8"))
        return data

    def result(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads((self.store / "result.json").read_text(encoding="utf-8"))
        return data


MakeAttempt = Callable[..., Attempt]


@pytest.fixture
def make_attempt(tmp_path: Path, tiny_model: Path, rows_file: Path) -> MakeAttempt:
    """Makes a run directory: four steps of LoRA on the tiny model, with changes of the request and the launch."""
    made = 0

    def make(
        changes: Mapping[str, Any] | None = None, *, attempt: int = 1, job: str = "tiny-1", **launch: Any
    ) -> Attempt:
        nonlocal made
        made += 1
        request = {
            "name": "tiny",
            "model": {"source": f"file://{tiny_model}"},
            "dataset": {"source": f"file://{rows_file}"},
            "method": {"sft": {"max_length": 64}},
            "adapter": {"lora": {"rank": 4}},
            "training": {"max_steps": 4, "learning_rate": 1e-2, "warmup_ratio": 0.1, "precision": "fp32"},
        }
        processes, resume = launch.pop("processes", 1), launch.pop("resume", ())
        defaults: dict[str, Any] = {
            "launcher": "direct" if processes == 1 else "accelerate",
            "strategy": "none" if processes == 1 else "ddp",
            "device": "cpu",
            "nodes": 1,
            "processes_per_node": processes,
            "gpus_per_node": 0,
            "precision": "fp32",
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "activation_checkpointing": False,
            "threads_per_process": 1,
        }
        run = Run(
            namespace="default",
            job=job,
            attempt=attempt,
            nonce=f"nonce-{attempt}",
            spec=parse(merge(request, changes or {})),
            launch=Launch(**(defaults | launch)),
            store=f"file://{tmp_path}/store",
            inputs={},
            resume=resume,
        )
        return Attempt(tmp_path / f"run-{made}", run)

    return make


Golden = Callable[[str, Sequence[float]], None]


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Iterator[Golden]:
    """Compares losses with the stored ones, step by step; with --update-golden it stores them."""
    stored: dict[str, list[float]] = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}

    def check(name: str, losses: Sequence[float]) -> None:
        if request.config.getoption("--update-golden"):
            stored[name] = [round(loss, 6) for loss in losses]
            GOLDEN.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
        assert losses == pytest.approx(stored[name], abs=1e-4)

    yield check


RunHere = Callable[[Attempt], Attempt]


@pytest.fixture
def run_here() -> RunHere:
    """Runs the method in this process, as the worker of rank 0 would: without locks, store and supervisor."""
    import torch

    from hone_trainer.context import RunContext
    from hone_trainer.inputs import fetch
    from hone_trainer.report import EventLog
    from hone_trainer.worker import METHODS

    torch.set_num_threads(1)  # the model is tiny, and other tests run beside this one

    def run(attempt: Attempt) -> Attempt:
        directory = attempt.directory
        directory.scratch.mkdir(exist_ok=True)
        inputs = fetch(attempt.run, directory.scratch / "inputs")
        events = EventLog(directory.events)
        context = RunContext(run=attempt.run, directory=directory, inputs=inputs, events=events, rank=0, world_size=1)
        METHODS[attempt.run.spec.method.name](context)
        events.close()
        return attempt

    return run


def pytest_configure(config: pytest.Config) -> None:
    # What the libraries below say of their own use of each other.
    for line in (
        "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
        "ignore:`gradient_checkpointing_(dis|en)able` is deprecated:FutureWarning",
        "ignore:.*pin_memory:UserWarning:torch",
        "ignore:builtin type (SwigPy|swigvar):DeprecationWarning",
    ):
        config.addinivalue_line("filterwarnings", line)
