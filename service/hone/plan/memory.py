"""Memory of one device, line by line, each with its formula.

docs/planning.md explains the answer.
P = parameters of the base, t = trained parameters, N = processes, s = sequence length, b = micro-batch, h = hidden,
kv = kv heads × head dim, f = MLP width, L = layers, V = vocabulary.
"""

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache

from hone.job import Launch, MemoryItem
from hone.plan.activations import activations, backward_pass
from hone.plan.coefficients import SHIPPED, Coefficients
from hone.plan.workload import Workload
from hone.spec import JobSpec

GIB = 1024**3

CUDA_CONTEXT_BYTES = int(0.9 * GIB)
"""CUDA context and libraries of one process; seen: 0.3 to 2 GiB."""
HOST_PROCESS_BYTES = GIB
"""A process on a CPU that trains next to nothing: Python with torch, transformers, trl and peft imported about 500 MB,
1,050 MiB at its peak with the demo's data, one row a step and one in an evaluation."""
NCCL_BYTES = int(0.4 * GIB)
"""Buffers of NCCL's communicator. Not measured: none of our machines had two GPUs."""
REDUCE_BUCKET_SIZE, MAX_LIVE_PARAMETERS = 50_000_000, 1_000_000_000
"""Numbers in DeepSpeed's bucket of gradients, and of gathered weights that it keeps under ZeRO-3; the trainer's
sharding.py sets both."""
UPDATED_AT_ONCE, UPDATE_BYTES = 1 << 23, 36
"""Weights that adamw_bf16_sr updates at once, and what each takes in fp32 for a moment. Whole, the embedding of Llama 3
would take 9 GiB. The trainer's optimizers.py updates by it."""
MERGE_TOKENS = 256
"""Tokens on which a merged model is held against its references."""
TILE_TOKENS, TILE_WORDS = 4096, 32_768
"""Logits that exist at once under TRL's fused head (trl/kernels/chunked_logprob.py)."""
ADAMW = (8, "8 B (two fp32 moments)")
STATES = {
    "adamw_bf16_sr": (4, "4 B (two bf16 moments)"),
    "adamw_8bit": (2, "2 B (8-bit moments)"),
    "paged_adamw_8bit": (2, "2 B (8-bit moments, paged)"),
}
"""Optimizer states of one trained weight."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Per weight, double quantisation (Dettmers et al. 2023): 4 bits, an 8-bit constant for 64, an fp32 for 64 × 256."""


@lru_cache(maxsize=4096)  # requests of a sweep differ in what is no matter of memory, and each is tried in many ways
def breakdown(load: Workload, launch: Launch, found: Coefficients = SHIPPED) -> tuple[MemoryItem, ...]:
    """The lines of one device; what trains, in order of what a person would check first."""
    items = _merging(load) if load.merges else _training(load, launch)
    device = CUDA_CONTEXT_BYTES if launch.device == "cuda" else HOST_PROCESS_BYTES
    items.append(_item("context", device, "libraries of one process, measured"))
    if launch.device == "cuda":
        items.append(
            _item(
                "fragmentation",
                sum(i.size_bytes for i in items) * found.fragmentation,
                f"{found.fragmentation:.1%} of the above",
            )
        )
    margin = found.margin if launch.device == "cuda" else SHIPPED.margin
    items.append(_item("margin", sum(i.size_bytes for i in items) * margin, f"{margin:.1%} of the above"))
    return tuple(item for item in items if item.size_bytes > 0)


def _merging(load: Workload) -> list[MemoryItem]:
    """One copy of the weights in fp32, and one as it is read or written beside it; after QLoRA the base once
    more, on its way into the 4 bits that the merged model is held against."""
    parameters = load.shape.parameters
    files = "files as they are on the disk" if load.shape.weight_bytes_on_disk else "P × 2 B (bf16 files)"
    items = [
        _item("weights", 4 * parameters, f"P × 4 B (fp32), P = {parameters:,}"),
        _item("files", _files(load), files),
        _item("logits", 3 * 4 * MERGE_TOKENS * load.shape.vocab_size, f"3 × {MERGE_TOKENS} tokens × V × 4 B"),
    ]
    if load.quantized:
        items.append(_item("base", 4 * parameters, "P × 4 B (fp32): the base once more, on its way into 4 bits"))
    return items


def _training(load: Workload, launch: Launch) -> list[MemoryItem]:
    step = _step_or_evaluation(load, launch)
    return [*_state(load, launch), *_gradients(load, launch, step), *step]


def _state(load: Workload, launch: Launch) -> list[MemoryItem]:
    """What is there between two steps: weights, optimizer."""
    t = load.trained
    whole = launch.world_size if launch.strategy == "zero3" else 1
    split = launch.world_size if launch.is_sharded else 1
    items = [*_weights(load, launch, whole)]
    if load.reward_models:
        size = load.reward_models * load.shape.parameters * _width(launch)
        text = f"{load.reward_models} × P × {_width(launch)} B, where they are as large as the policy"
        items.append(_item("reward models", size, text))
    if load.keeps_reference:
        width = 2 if load.optimizer == "adamw_bf16_sr" else 4
        items.append(_item("reference model", load.shape.parameters * width / whole, f"P × {width} B / {whole}"))
    if load.adapted:
        items.append(_item("adapter", 4 * t / whole, f"t × 4 B (fp32) / {whole}, t = {t:,}"))
        if launch.precision == "bf16":
            items.append(_item("bf16 copies", 2 * t / whole, f"t × 2 B / {whole} (autocast's copies of the adapter)"))
    states, text = STATES.get(load.optimizer, ADAMW)
    master = 4 if launch.is_sharded and not load.adapted and launch.precision == "bf16" else 0
    formula = f"t × {text}{' + 4 B (fp32 master)' if master else ''} / {split}"
    items.append(_item("optimizer", (states + master) * t / split, formula))
    return items


def _gradients(load: Workload, launch: Launch, step: list[MemoryItem]) -> list[MemoryItem]:
    """Gradients, and what they are exchanged through.

    Where one micro-batch makes a step they come as activations go, and the peak is where the backward pass begins, or
    ends: then there are all gradients, the first layer, and the embedding's gradient again where the head has it too.
    """
    t, during = load.trained, sum(item.size_bytes for item in step)
    split = launch.world_size if launch.is_sharded else 1
    width = 2 if load.optimizer == "adamw_bf16_sr" else 4
    size, text = width * t / split, f"t × {width} B / {split}"
    if not (load.adapted or split > 1 or load.generated_tokens or launch.gradient_accumulation_steps > 1):
        layers = sum(item.size_bytes for item in step if item.name not in ("layer inputs", "logits", "backward"))
        first = layers if launch.activation_checkpointing else layers / load.shape.num_layers
        first += backward_pass(load, launch).size_bytes
        embedding = width * load.shape.vocab_size * load.shape.hidden_size
        update = UPDATE_BYTES * min(t, UPDATED_AT_ONCE) if load.optimizer == "adamw_bf16_sr" else 0
        end = size + max(first + embedding * load.shape.tied_embeddings, update)
        size = max(embedding, end - during)
        text = f"of {text} what comes before activations are gone (one micro-batch a step)"
    items = [_item("gradients", size, text)]
    if launch.world_size > 1:
        items.append(_communication(load, launch, width))
    return items


def _communication(load: Workload, launch: Launch, width: int) -> MemoryItem:
    """PyTorch's DDP copies every gradient into buckets; DeepSpeed has one bucket, or two that take turns (stage 2)."""
    if launch.is_sharded:
        count, width = (2 if launch.strategy == "zero2" else 1), _width(launch)
        size = count * REDUCE_BUCKET_SIZE * width
        text = f"{count} × {REDUCE_BUCKET_SIZE:,} × {width} B (buckets)"
    else:
        size, text = width * load.trained, f"t × {width} B (buckets)"
    if launch.device == "cuda":
        size, text = size + NCCL_BYTES, f"{text} + {NCCL_BYTES / GIB:.1f} GiB (NCCL)"
    return _item("communication", size, text)


def _weights(load: Workload, launch: Launch, whole: int) -> list[MemoryItem]:
    shape, width = load.shape, _width(launch)
    parameters = shape.parameters
    if load.quantized:
        dense = parameters - shape.quantizable_weights
        largest = max(layer.weights for layer in shape.linear_layers if layer.role != "head")
        return [
            _item("weights nf4", (shape.quantizable_weights * NF4_BYTES + dense * width) / whole,
                  f"({shape.quantizable_weights:,} × {NF4_BYTES:.5f} B + {dense:,} × {width} B) / {whole}"),
            _item("dequantization", largest * width, f"largest layer in 4 bits, {largest:,} × {width} B"),
        ]  # fmt: skip
    if load.adapted or launch.is_sharded:
        items = [_item("weights", parameters * width / whole, f"P × {width} B / {whole}, P = {parameters:,}")]
    elif load.optimizer == "adamw_bf16_sr":
        items = [_item("weights", parameters * 2, f"P × 2 B (bf16, rounded stochastically), P = {parameters:,}")]
    else:
        items = [_item("weights", parameters * 4, f"P × 4 B (fp32: what trains), P = {parameters:,}")]
        if launch.precision == "bf16":
            items.append(_item("bf16 copies", parameters * 2, "P × 2 B (autocast's copies of the weights)"))
    if whole > 1:
        layer = shape.parameters_of("attention", "mlp", "experts", "norm") // shape.num_layers
        live = max(2 * layer, min(parameters, MAX_LIVE_PARAMETERS))
        most = f"{MAX_LIVE_PARAMETERS:,}"
        text = f"{live:,} × {width} B: 2 layers of {layer:,}, or what DeepSpeed keeps for reuse (up to {most})"
        items.append(_item("gathered layers", live * width, text))
    return items


def _step_or_evaluation(load: Workload, launch: Launch) -> list[MemoryItem]:
    """A step, and what an evaluation in larger batches takes beyond it: its logits, and the layer that it is in."""
    step = _step(load, launch)
    if load.eval_rows <= launch.micro_batch_size or load.scores or load.generated_tokens:
        return step
    shape, width = load.shape, _width(launch)
    tokens = load.eval_rows * load.rows_factor * load.sequence_length
    layer = tokens * (4 * shape.hidden_size + 3 * shape.intermediate_size) * width
    logits = _logits(load, launch, load.eval_rows)
    beyond = layer + logits.size_bytes - sum(item.size_bytes for item in step)
    formula = f"{load.eval_rows} rows: s·b·(4h + 3f) × {width} B + logits ({logits.formula}), beyond a step"
    return [*step, _item("evaluation", max(0, beyond), formula)]


def _step(load: Workload, launch: Launch) -> list[MemoryItem]:
    """What exists during a step only: saved activations, masks, logits, generation."""
    shape, s, width = load.shape, load.sequence_length, _width(launch)
    rows, layers = launch.micro_batch_size * load.rows_factor, shape.num_layers
    items = activations(load, launch)
    logits = None if load.scores else _logits(load, launch, launch.micro_batch_size)
    again = launch.activation_checkpointing and not launch.is_sharded  # what ZeRO does meanwhile was not measured
    items += _moments(items, logits, backward_pass(load, launch), again=again)
    if load.generated_tokens:
        answers = math.ceil(load.answers / launch.world_size) or rows
        kv = shape.num_key_value_heads * shape.head_dim
        cache = 2 * layers * kv * s * answers * width
        items.append(_item("generation cache", cache, f"2·L·kv·s × {answers} answers × {width} B"))
        words = 2 * 4 * answers * shape.vocab_size
        items.append(_item("generation logits", words, f"2 × {answers} answers × V × 4 B"))
    return items


def _moments(
    kept: list[MemoryItem], logits: MemoryItem | None, backward: MemoryItem, *, again: bool
) -> Iterator[MemoryItem]:
    """What comes and goes beside what is kept: logits, and later, when they are gone, the backward pass of the last
    layer. Where layers are computed `again`, that layer comes after the logits, too, and what its frames hold is gone
    before the backward pass. Each is what there is beyond the other."""
    sizes = {item.name: item.size_bytes for item in kept}
    gone = sizes.get("recomputation", 0) if again else logits.size_bytes if logits else 0
    beyond = max(0, backward.size_bytes - gone)
    yield _item(backward.name, beyond, f"{backward.formula}{f', less {gone:,} B that are gone then' if gone else ''}")
    if logits:
        layer = sum(sizes.values()) - sizes["layer inputs"] + beyond if again else 0
        less = f", less {layer:,} B of the layer that is computed again when they are gone" if again else ""
        yield _item(logits.name, max(0, logits.size_bytes - layer), logits.formula + less)


def _logits(load: Workload, launch: Launch, batch: int) -> MemoryItem:
    """A tile of logits, the head's weights cast to its precision, and the gradients of the head's input and weights in
    fp32. Without Triton, which is on a CPU, about six fp32 copies of the tile, too."""
    shape, width = load.shape, _width(launch)
    tokens = batch * load.rows_factor * load.sequence_length
    rows, words = min(tokens, TILE_TOKENS), min(shape.vocab_size, TILE_WORDS)
    size, text = (
        rows * TILE_WORDS * width + 4 * tokens * shape.hidden_size,
        f"{rows} × {TILE_WORDS} × {width} B + s·b·h × 4 B",
    )
    if load.trains_in_fp32(launch) and launch.precision == "bf16":
        size, text = size + words * shape.hidden_size * width, f"{text} + {words} × h × {width} B"
    if not load.adapted:
        size, text = size + 4 * shape.vocab_size * shape.hidden_size, f"{text} + V × h × 4 B"
    if launch.device == "cpu":
        size, text = size + 6 * 4 * rows * words, f"{text} + 6 × {rows} × {words} × 4 B"
    return _item("logits", size, text)


def _width(launch: Launch) -> int:
    return 2 if launch.precision == "bf16" else 4


def _item(name: str, size: float, formula: str) -> MemoryItem:
    return MemoryItem(name=name, size_bytes=int(size), formula=formula)


def host_memory(load: Workload, launch: Launch, spec: JobSpec, device_peak: int) -> int:
    """Memory of one machine: its processes, loading, and merging when the training is done.

    Processes that load weights as they are in the files share them; each converts its own to fp32 before they go to its
    GPU. On one H200 full fine-tuning of 1.2e9 parameters took 7.9 GiB, 4.6 of them these.
    """
    weights = load.shape.parameters * _width(launch)
    if not load.adapted and load.optimizer != "adamw_bf16_sr" and not launch.is_sharded:
        weights = 4 * load.shape.parameters * launch.processes_per_node
    merging = sum(item.size_bytes for item in _merging(load)) if spec.output.merged else 0
    if launch.device == "cpu":
        return device_peak * launch.processes_per_node + merging
    return launch.processes_per_node * 3 * GIB + max(weights, merging)


def output_sizes(load: Workload, spec: JobSpec) -> dict[str, int]:
    """Bytes of each output; adapters are fp32, models have the precision of the base's files."""
    whole = _files(load)
    if load.merges:
        return {"merged": whole}
    if not load.adapted:
        return {"model": whole}
    return {"adapter": 4 * load.trained} | ({"merged": whole} if spec.output.merged else {})


def disk(load: Workload, launch: Launch, spec: JobSpec, outputs: Mapping[str, int]) -> int:
    """Scratch space of one machine, without its data: the base where it is fetched, and what it leaves or its
    checkpoints, if these take more.

    A checkpoint has what trains and its optimizer states, of which a machine writes its own under ZeRO. There is the
    one that an attempt goes on from and the one that it leaves when it has to stop; where some are taken in between,
    one more on its way to the store.
    """
    fetched = 0 if spec.model.source.startswith("file://") else _files(load)
    weights: float = 2 if load.optimizer == "adamw_bf16_sr" else 4
    states: float = STATES.get(load.optimizer, ADAMW)[0]
    if launch.is_sharded:
        states /= launch.nodes
    if launch.strategy == "zero3":
        weights /= launch.nodes
    checkpoint = int((weights + states) * load.trained)
    left = sum(outputs.values())
    often = spec.training.checkpoint.steps is not None
    return fetched + (max(3 * checkpoint, left + 2 * checkpoint) if often else max(2 * checkpoint, left))


def _files(load: Workload) -> int:
    """Size of the base's files; bf16 where it is not known."""
    return load.shape.weight_bytes_on_disk or 2 * load.shape.parameters
