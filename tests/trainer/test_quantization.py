"""QLoRA on the CPU: what is in 4 bits, what trains, and the merge into what the 4-bit weights stand for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hone.run import TrainerExit
from hone_trainer import merging
from hone_trainer.failure import RunFailed
from hone_trainer.inputs import Source
from hone_trainer.merging import Part
from hone_trainer.model import count_parameters
from hone_trainer.quantization import check_layers, check_quantizable, nf4

from .conftest import Attempt, MakeAttempt, RunHere
from .test_architectures import make_family

QLORA: dict[str, Any] = {"quantization": "nf4", "adapter": {"lora": {"rank": 8}}}


def source(path: Path) -> Source:
    return Source(asked=f"file://{path}", path=str(path))


def outputs(attempt: Attempt) -> Path:
    return attempt.directory.scratch / "outputs"


def load_4bit(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    config = nf4(dtype, **options)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=config, device_map={"": "cpu"})


def test_linear_layers_are_nf4_with_double_quantisation_and_the_rest_stays_as_it_is_loaded(tiny_model: Path) -> None:
    model = load_4bit(tiny_model, torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    state = layer.weight.quant_state
    assert (state.quant_type, state.nested, layer.weight.dtype) == ("nf4", True, torch.uint8)
    assert layer.weight.numel() * 2 == 64 * 128
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert embeddings.dtype == head.dtype == model.model.norm.weight.dtype == torch.bfloat16


def test_sharded_weights_are_stored_as_numbers_that_can_be_sharded(tiny_model: Path) -> None:
    weight = load_4bit(tiny_model, torch.bfloat16, sharded=True).model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.bfloat16
    assert weight.numel() * 4 == 64 * 128


def test_adapters_of_a_quantized_model_train_in_fp32_although_trl_makes_them_bf16(
    make_attempt: MakeAttempt, run_here: RunHere
) -> None:
    tensors = load_file(outputs(run_here(make_attempt(QLORA))) / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    # In bf16 these would be numbers of eight bits.
    moved = torch.cat([tensor.flatten() for name, tensor in tensors.items() if "lora_B" in name])
    assert not torch.equal(moved, moved.bfloat16().float())


def test_training_on_four_bits_lowers_the_loss_and_two_runs_are_equal(
    make_attempt: MakeAttempt, run_here: RunHere
) -> None:
    changes = {**QLORA, "training": {"max_steps": 12}}
    losses = run_here(make_attempt(changes)).losses()
    assert losses == run_here(make_attempt(changes)).losses()
    assert sum(losses[-3:]) < sum(losses[:3])
    plain = run_here(make_attempt({"adapter": QLORA["adapter"], "training": {"max_steps": 12}})).losses()
    assert losses != plain
    assert losses[0] == pytest.approx(plain[0], abs=0.1)


def test_evaluation_computes_as_training_does(make_attempt: MakeAttempt, run_here: RunHere) -> None:
    """On some CPUs bitsandbytes repacks weights for evaluation and computes in bf16 from then on."""
    without = run_here(make_attempt(QLORA)).losses()
    evaluated = {"dataset": {"eval_fraction": 0.1}, "training": {"eval": {"at_start": True}}}
    base = run_here(make_attempt({**QLORA, **evaluated}))
    again = run_here(make_attempt({**QLORA, "dataset": {"eval_fraction": 0.1}}))
    assert base.losses() == again.losses()
    assert without[0] == pytest.approx(base.losses()[0], rel=0.2)


def test_two_processes_train_a_quantized_model_as_one_does_on_as_many_rows(
    make_attempt: MakeAttempt, run_here: RunHere
) -> None:
    from hone_trainer.supervisor import supervise

    two = make_attempt(QLORA, processes=2, micro_batch_size=2)
    assert supervise(two.directory.path) == TrainerExit.SUCCEEDED
    assert two.losses() == pytest.approx(run_here(make_attempt(QLORA)).losses(), abs=1e-4)


def test_weights_in_four_bits_count_as_what_they_stand_for(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert count_parameters(load_4bit(tiny_model))[1] == count_parameters(plain)[1] == plain.num_parameters()


def test_an_adapter_says_that_its_base_was_quantized(make_attempt: MakeAttempt, run_here: RunHere) -> None:
    identity = json.loads((outputs(run_here(make_attempt(QLORA))) / "adapter" / "hone_base.json").read_text())
    assert (identity["quantization"], identity["dtype"]) == ("nf4", "float32")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_qlora_adapter_is_merged_into_what_the_four_bits_stand_for(
    make_attempt: MakeAttempt, run_here: RunHere, tmp_path: Path, family: str
) -> None:
    base = make_family(tmp_path / family, family, dtype=torch.bfloat16)
    changes = {"model": {"source": f"file://{base}"}, "output": {"merged": True}, "training": {"max_steps": 3}}
    attempt = run_here(make_attempt({**QLORA, **changes}))
    quality = json.loads((attempt.directory.scratch / "worker.json").read_text())["metrics"]["merge"]
    naive = merged_into_the_original(base, outputs(attempt) / "adapter")
    assert quality["kl_nats"] < naive / 10
    assert quality["kl_nats"] < quality["kl_nats_bf16_base"]


def merged_into_the_original(base: Path, adapter: Path) -> float:
    """What merging into the weights as they were before quantisation costs."""
    from hone_trainer.lora import load_adapter

    quantized = merging._load(source(base), _model(base), torch.float32, nf4(torch.float32))
    wanted = merging.logits(load_adapter(quantized, source(adapter), base=source(base)))
    plain = merging._load(source(base), _model(base), torch.float32)
    merged = load_adapter(plain, source(adapter), base=source(base)).merge_and_unload()
    return merging.divergence(wanted, merging.logits(merged.bfloat16().float()))


def _model(base: Path) -> Any:
    from hone.spec import Model

    return Model(source=f"file://{base}")


def test_adapters_of_quantized_and_other_bases_are_not_merged_together(
    make_attempt: MakeAttempt, run_here: RunHere, tiny_model: Path
) -> None:
    places = [outputs(run_here(make_attempt(changes))) / "adapter" for changes in (QLORA, {})]
    parts = [Part(adapter=source(place)) for place in places]
    with pytest.raises(
        RunFailed, match=r"on a base in 4 bits \(nf4\) and .* on a base in full precision: no base fits"
    ):
        merging.merge(source(tiny_model), parts, combination="cat", model=_model(tiny_model))


def test_fused_experts_are_refused_because_they_would_not_be_four_bits(tmp_path: Path) -> None:
    base = make_family(tmp_path / "mixtral", "mixtral")
    with pytest.raises(RunFailed, match=r"experts are fused .* bitsandbytes leaves in 16 bits") as caught:
        check_quantizable(source(base))
    assert caught.value.code == TrainerExit.USER


def test_bitsandbytes_still_leaves_fused_experts_as_they_are(tmp_path: Path) -> None:
    """When this fails, upstream holds experts in four bits and the refusal can go."""
    model = load_4bit(make_family(tmp_path / "mixtral", "mixtral"))
    experts = [parameter for name, parameter in model.named_parameters() if "experts" in name]
    assert experts and {parameter.dtype for parameter in experts} == {torch.float32}


def test_a_model_without_linear_layers_is_refused() -> None:
    class Headed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8)

        def get_output_embeddings(self) -> torch.nn.Linear:
            return self.head

    with pytest.raises(RunFailed, match=r"hf://org/name has no linear layer beside its head"):
        check_layers(Headed(), "hf://org/name")


def test_a_model_that_cannot_be_quantized_is_refused_before_it_is_loaded(
    make_attempt: MakeAttempt, run_here: RunHere, tmp_path: Path
) -> None:
    base = make_family(tmp_path / "mixtral", "mixtral")
    attempt = make_attempt({**QLORA, "model": {"source": f"file://{base}"}})
    with pytest.raises(RunFailed, match="experts are fused"):
        run_here(attempt)
    assert not attempt.events("progress")
