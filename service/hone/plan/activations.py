"""What a forward pass keeps for the backward pass: by kind of layer, each line with its formula.

Called by memory.py. Which tensors a layer keeps was read off its autograd graph, family by family;
tests/trainer/test_held.py counts them again. Widths in elements a token: h = hidden, q = heads × head dim, kv =
kv heads × head dim, f = MLP width. Three precisions play a part: the residual stream's, that of matrix products, and
fp32, in which norms, softmax and log-sum-exp compute.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from hone.job import Launch, MemoryItem
from hone.modelinfo import Linear, ModelShape, Module
from hone.plan.workload import Workload

_INDICES = 40
"""Bytes for each expert of a token: five numbers that sort tokens by their experts, and back."""


@dataclass(frozen=True, kw_only=True)
class _Widths:
    """Bytes of one element."""

    stream: int
    """Of the residual stream: fp32 where fp32 weights train under autocast, else the weights'."""
    products: int
    dropped: int
    """Of a dropout's mask: one byte on a GPU, the dropped tensor's own width on a CPU."""

    @staticmethod
    def of(load: Workload, launch: Launch) -> "_Widths":
        products = 2 if launch.precision == "bf16" else 4
        stream = 4 if load.trains_in_fp32(launch) else products
        return _Widths(stream=stream, products=products, dropped=1 if launch.device == "cuda" else products)


@dataclass(frozen=True, slots=True)
class _Part:
    """A kind of tensors, in bytes a token of all layers together."""

    name: str
    size: float
    words: str


def activations(load: Workload, launch: Launch) -> list[MemoryItem]:
    """The lines of one forward pass with its backward pass to come; with checkpointing, those of one layer and the
    inputs of all."""
    widths = _Widths.of(load, launch)
    tokens = launch.micro_batch_size * load.rows_factor * load.sequence_length
    layers = load.shape.num_layers
    kept = 1 / layers if launch.activation_checkpointing else 1.0
    where = "one layer" if launch.activation_checkpointing else f"{layers} layers"
    items = []
    if launch.activation_checkpointing:
        more = 2 * any("embeddings.LayerNorm" in module.path for module in load.shape.modules)
        more += load.shape.layer.attention_dropout
        size = (layers + more) * tokens * load.shape.hidden_size * widths.stream
        text = f"(L{f' + {more} of the embeddings' if more else ''}) × {tokens:,} tokens × h × {widths.stream} B"
        items.append(_item("layer inputs", size, text))
    for name, parts in _by_name(_parts(load, launch, widths)).items():
        per_token = sum(part.size for part in parts) * kept
        words = " + ".join(dict.fromkeys(part.words for part in parts))
        items.append(_item(name, tokens * per_token, f"{where}, {tokens:,} tokens × {per_token:,.0f} B: {words}"))
    if launch.activation_checkpointing:
        items.append(_within_attention(load, launch, widths, tokens, items))
    if load.lora and load.lora.use_dora:
        size = max(4 * layer.in_features * (layer.in_features + 2 * layer.out_features) for layer in load.targets)
        items.append(_item("dora norm", size, "in × (in + 2 out) × 4 B of the largest adapted layer, for a moment"))
    if not launch.activation_checkpointing:  # else it is gone before the first layer is computed again
        items.append(_outside(load, widths, tokens))
    return items


def backward_pass(load: Workload, launch: Launch) -> MemoryItem:
    """What the backward pass of the last layer makes before what it kept is gone, or its forward pass before all of it
    is there: gradients at an MLP, at experts, at a norm that computes in fp32, at attention that keeps scores."""
    shape, widths = load.shape, _Widths.of(load, launch)
    h, tokens = shape.hidden_size, launch.micro_batch_size * load.rows_factor * load.sequence_length
    inner = [linear.in_features for linear in _in_layers(shape.linear_layers) if linear.role == "mlp"]
    copies = 1 if load.lora is None and shape.layer.mlp != "gated" else 2
    found = [((copies * inner[-1] + 2 * h) * widths.products, f"{copies}f + 2h of an MLP")] if inner else []
    if shape.num_experts:
        k = _experts_of_a_token(shape, inner[-1] if inner else 0)
        found.append((k * (2 * shape.intermediate_size + h) * widths.stream, f"{k} experts × (2f + h)"))
    if shape.layer.norm == "rms":
        found.append((5 * h * 4, "5h of a norm in fp32"))
    if load.attention == "eager":
        found.append((2 * shape.num_attention_heads * load.sequence_length * 4, "2 × heads × s of attention in fp32"))
    if load.lora and load.lora.use_dora:
        widest = max(linear.out_features for linear in load.targets)
        found.append(((3 * widest + 2 * h) * widths.products, "3 × the widest output + 2h (DoRA)"))
    size, words = max(found)
    return _item("backward", tokens * size, f"{tokens:,} tokens × {size:,} B: {words}, for a moment")


def _parts(load: Workload, launch: Launch, widths: _Widths) -> Iterator[_Part]:
    shape, layer = load.shape, load.shape.layer
    norms = [module for module in shape.modules if module.role == "norm" and "{}" in module.path]
    whole = shape.num_layers if launch.activation_checkpointing else 1  # the first layer may have fewer than others
    yield from _norms(load, norms, widths, whole=whole)
    yield from _attention(load, launch, widths)
    inner = [linear for linear in _in_layers(shape.linear_layers) if linear.role == "mlp"]
    if inner:
        *reading, last = inner
        yield from _read(load, reading, widths, width=reading[0].in_features, of_stream=True)
        f, count = last.in_features, last.count * widths.products
        copies = {"gated": 3, "gelu": 1, "gelu_new": 4, "relu": 1}[layer.mlp]
        yield _Part("mlp", copies * f * count, f"{copies}f")
        yield from _read(load, [last], widths, width=f, of_stream=False, is_kept=layer.mlp == "relu")
    yield from _experts(load, widths, shared=inner[-1].in_features if inner else 0)
    if launch.activation_checkpointing:
        yield from _left_behind(load, widths, inner=inner[-1].in_features if inner else 0)
    if layer.residual_dropout and load.learns_answers:
        size = 2 * shape.num_layers * shape.hidden_size * widths.dropped
        yield _Part("dropout", size, "masks of the model's own dropout, 2h")


def _norms(load: Workload, norms: Sequence[Module], widths: _Widths, *, whole: int) -> Iterator[_Part]:
    """RMSNorm keeps its input in fp32 and one number a row; what it multiplies by a weight that trains, too.
    LayerNorm keeps its input, mean and deviation."""
    layer = load.shape.layer
    for number, norm in enumerate(norms):
        width, rows = _sizes_of_norm(load, norm)
        if layer.norm == "layer":
            shares = layer.parallel and number > 0
            size = widths.stream * ((0 if shares else width) + 2)
        else:
            size = 4 * width + 4 * rows
            if load.lora is None:
                own = widths.products if norm.name in ("q_norm", "k_norm") else widths.stream
                size += (4 if layer.scales_in_fp32 else own) * width
        yield _Part(
            "norms",
            math.ceil(norm.count / whole) * whole * size,
            "inputs of the norms in fp32" if layer.norm == "rms" else "their inputs",
        )


def _sizes_of_norm(load: Workload, norm: Module) -> tuple[int, int]:
    """Width of all its rows for one token, and how many rows those are: norms of heads have one for each head."""
    shape = load.shape
    heads = {"q_norm": shape.num_attention_heads, "k_norm": shape.num_key_value_heads}.get(norm.name, 0)
    return (heads * norm.weights, heads) if heads and norm.weights == shape.head_dim else (norm.weights, 1)


def _attention(load: Workload, launch: Launch, widths: _Widths) -> Iterator[_Part]:
    shape, layer, layers = load.shape, load.shape.layer, load.shape.num_layers
    *reading, output = [linear for linear in _in_layers(shape.linear_layers) if linear.role == "attention"]
    yield from _read(load, reading, widths, width=reading[0].in_features, of_stream=True)
    heads, s, w = shape.num_attention_heads, load.sequence_length, widths.products
    q, kv = heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    scores = 0.0
    drops = layer.attention_dropout and load.learns_answers
    if load.attention == "eager":
        size, words = 3 * q * w, "3q"
        scores = heads * s * (4 + (0 if w == 4 else w) + (w if layer.softcap else 0))
        if launch.activation_checkpointing:
            scores += heads * s * w if load.lora and not layer.softcap else 0
            yield _Part("attention mask", layers * s * w, f"s × {w} B for each token, once")
    elif drops and launch.device == "cpu":
        copies = 3 if len(reading) > 1 or load.is_masked(launch) else 5  # values that are a view keep all three
        size, words = copies * q * 4, f"{copies}q in fp32"
        scores = 3 * heads * s * 4
    else:
        is_masked = load.is_masked(launch)
        repeated = is_masked and kv != q
        keys = q if repeated else kv
        values = q + 2 * kv if layer.fused_qkv and not repeated else keys
        size, words = (2 * q + keys + values) * w + 4 * heads, "queries, keys, values, output and a sum for each head"
        if is_masked:
            once = layers if launch.activation_checkpointing else 1
            yield _Part("attention mask", s * (layers * w + once), f"s × {w} B for each token, and once s")
    yield _Part("attention", layers * size, words)
    if scores:
        yield _Part("attention scores", layers * scores, f"heads × s × {scores / heads / s:.0f} B")
    yield from _read(load, [output], widths, width=q, of_stream=False, is_kept=not (scores or layer.fused_qkv))


def _read(
    load: Workload,
    linears: Sequence[Linear],
    widths: _Widths,
    *,
    width: int,
    of_stream: bool,
    is_kept: bool = False,
) -> Iterator[_Part]:
    """What linear layers that read one tensor keep: where they train, the tensor, once, or once each where autocast has
    to cast it; adapters the tensor, or after a dropout a copy and its mask each; and what lies between their halves."""
    role = "attention" if linears[0].role == "attention" else "mlp"
    if load.lora is None:
        if of_stream and widths.stream != widths.products:
            copies = sum(linear.count for linear in linears)
            yield _Part(role, copies * width * widths.products, "a cast of the input for each linear layer")
        elif not is_kept:
            yield _Part(role, linears[0].count * width * widths.products, "inputs of linear layers")
        return
    paths = {linear.path for linear in linears}
    adapted = [target for target in load.targets if target.path in paths]
    if not adapted:
        return
    count = sum(linear.count for linear in adapted)
    if load.lora.dropout:
        size = count * width * (widths.products + widths.dropped)
        yield _Part("dropout", size, "a copy and a mask of the input of each adapted layer")
    if (load.lora.use_dora or not load.lora.dropout) and not is_kept:
        most = max(linear.count for linear in adapted)
        yield _Part(role, most * width * widths.products, "inputs of adapted layers")
    yield _Part("adapter activations", count * load.lora.rank * widths.products, "rank for each adapted layer")
    if load.lora.use_dora:
        size = 2 * sum(linear.count * linear.out_features for linear in adapted) * widths.products
        yield _Part("adapter activations", size, "2 × its output (DoRA)")


def _experts(load: Workload, widths: _Widths, *, shared: int) -> Iterator[_Part]:
    """Fused experts, in the precision of their input: autocast does not know grouped matrix products."""
    shape = load.shape
    if not shape.num_experts:
        return
    h, f = shape.hidden_size, shape.intermediate_size
    k = _experts_of_a_token(shape, shared)
    size = widths.stream * (k * (3 * f + h + 1)) + 8 * shape.num_experts + _INDICES * k
    if load.lora is None:
        size += widths.stream * k * (h + f)
        is_cast, is_alone = widths.stream != widths.products, not shared
        size += widths.products * h * (is_cast + (not is_alone if is_cast else is_alone))
    if shared:
        size += widths.products * (h + 1)
    words = f"{k} experts of a token: {'4f + 2h' if load.lora is None else '3f + h'} each, and their router"
    yield _Part("experts", shape.num_layers * size, words)


def _experts_of_a_token(shape: ModelShape, shared: int) -> int:
    """Those that it is sent to, without the one that all pass."""
    return shape.num_experts_per_token - -(-shared // shape.intermediate_size)


def _left_behind(load: Workload, widths: _Widths, *, inner: int) -> Iterator[_Part]:
    """Recomputing a layer ends with an exception as soon as it has what it needs, and the frames that this leaves hold
    what is not kept otherwise: an output, the product that a dropout copied, a residual of which the norm kept a cast,
    the attention's output beside an MLP, the input of an activation that keeps its output, what experts read."""
    shape, layer = load.shape, load.shape.layer
    h = shape.hidden_size
    size = h if load.lora else 0
    is_cast, drops = widths.stream != widths.products, bool(load.lora and load.lora.dropout)
    if drops:
        size += h + (0 if layer.mlp == "relu" else inner)
    if widths.stream == 2 and layer.norm == "rms":
        size += 2 * h
    if layer.fused_qkv:
        size += h
    if layer.mlp == "relu":
        size += h + inner
    if layer.mlp == "gelu_new":
        size += h
    if layer.norms_after and is_cast:
        size += 3 * h
    if layer.parallel:
        size += h
    if layer.norms_first and (is_cast or drops):
        size += 2 * h * widths.stream // widths.products
    size += _of_the_other_kind(load) if is_cast else 0
    if shape.num_experts:
        size += _experts_of_a_token(shape, inner) * h if load.lora else h * widths.stream // widths.products
    yield _Part("recomputation", shape.num_layers * size * widths.products, "what its frames hold")


def _of_the_other_kind(load: Workload) -> int:
    """A cast, and the mask and the rotation of the other kind of layer, where kinds alternate and all weights train."""
    if not load.shape.layer.alternates or load.lora:
        return 0
    return load.shape.hidden_size + load.sequence_length // 2 + 4 * load.shape.head_dim


def _within_attention(
    load: Workload, launch: Launch, widths: _Widths, tokens: int, items: Sequence[MemoryItem]
) -> MemoryItem:
    """What there is for a moment while attention with its own dropout is computed again in halves of fp32 on a CPU,
    beyond the MLP, which is not there yet."""
    layer, h = load.shape.layer, load.shape.hidden_size
    if not (layer.attention_dropout and load.learns_answers and launch.device == "cpu" and widths.products == 2):
        return _item("within attention", 0, "")
    later = sum(item.size_bytes for item in items if item.name in ("mlp", "recomputation"))
    per_token = 3 * load.shape.num_attention_heads * load.sequence_length + 4 * h
    return _item(
        "within attention", max(0, tokens * per_token - later), f"{tokens:,} tokens × {per_token:,} B, less the MLP"
    )


def _outside(load: Workload, widths: _Widths, tokens: int) -> MemoryItem:
    """The last norm, what the head reads, and less the first norm where nothing before it trains."""
    shape, layer = load.shape, load.shape.layer
    h = shape.hidden_size
    norm = 4 * h if layer.norm == "rms" else widths.stream * h
    count = 1 - (load.lora is not None and not layer.norms_after)
    size = tokens * (count * norm + h * widths.stream)
    if load.lora is None:
        size += tokens * (8 + (norm if layer.norm == "rms" else 0))
    return _item("head input", size, f"{tokens:,} tokens × {size // tokens:,} B: last norm and the head's input")


def _in_layers(linears: Iterable[Linear]) -> list[Linear]:
    return [linear for linear in linears if "{}" in linear.path]


def _by_name(parts: Iterable[_Part]) -> dict[str, list[_Part]]:
    found: dict[str, list[_Part]] = {}
    for part in parts:
        found.setdefault(part.name, []).append(part)
    return found


def _item(name: str, size: float, formula: str) -> MemoryItem:
    return MemoryItem(name=name, size_bytes=int(size), formula=formula)
