"""A saved adapter on its way back: on its base alone, whole, and trained on where it stopped."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hone.run import TrainerExit
from hone.spec import Lora
from hone_trainer.failure import RunFailed
from hone_trainer.inputs import Source
from hone_trainer.lora import add_lora, load_adapter
from hone_trainer.merging import logits

from .conftest import Attempt, MakeAttempt, RunHere, make_model


def source(path: Path) -> Source:
    return Source(asked=f"file://{path}", path=str(path))


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def adapter_of(attempt: Attempt) -> Path:
    return attempt.directory.scratch / "outputs" / "adapter"


@pytest.fixture
def adapter(make_attempt: MakeAttempt, run_here: RunHere) -> Path:
    """Trained on the tiny model; a test may spoil it."""
    return adapter_of(run_here(make_attempt()))


def as_mistral(path: Path) -> None:
    """The same shapes and the very same weights, as another architecture."""
    config = json.loads((path / "config.json").read_text())
    changes = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    (path / "config.json").write_text(json.dumps(config | changes))


def other_weights(path: Path) -> None:
    """Another fine-tuning of the same architecture: one tensor differs."""
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] += 0.01
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "what"), [(as_mistral, r"its config\.json differs"), (other_weights, "its weights differ")]
)
def test_a_look_alike_base_is_refused(
    adapter: Path, tiny_model: Path, tmp_path: Path, change: Callable[[Path], None], what: str
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "look-alike"))
    change(base)
    with pytest.raises(
        RunFailed, match=rf"was trained on file://.*tiny, and .*look-alike is another model: {what}"
    ) as e:
        load_adapter(load(base), source(adapter), base=source(base))
    assert e.value.code == TrainerExit.USER
    assert "Use the adapter with file://" in e.value.fix


def test_peft_still_loads_a_llama_adapter_on_a_mistral_of_the_same_shape(
    adapter: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """When this fails, upstream checks the base itself."""
    from peft import PeftModel

    base = Path(shutil.copytree(tiny_model, tmp_path / "look-alike"))
    as_mistral(base)
    found = PeftModel.from_pretrained(load(base), adapter)
    assert type(found.get_base_model()).__name__ == "MistralForCausalLM"


def test_a_copy_of_the_base_elsewhere_and_cut_into_other_files_is_the_base(
    adapter: Path, tiny_model: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[:5], names[5:]), start=1):
        chosen = {name: tensors[name] for name in part}
        save_file(chosen, copy / f"model-0000{number}-of-00002.safetensors", metadata={"format": "pt"})
    load_adapter(load(tiny_model), source(adapter), base=source(copy))


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        tensors = load_file(path / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})

    return edit


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
SPOILED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a tensor is missing": (edit_tensors(lambda t: t.pop(KEY)), r"it lacks .*layers\.0\.self_attn\.q_proj\.lora_B"),
    "a tensor too many": (edit_tensors(lambda t: t.update(odd=torch.ones(1))), r"it has besides odd \(1 tensors in"),
    "another shape": (edit_tensors(lambda t: t.update({KEY: torch.ones(64, 3)})), r"is \(64, 3\), and \(64, 4\) is"),
    "targets that are not there": (edit_config(target_modules=["query"]), "does not fit .*: Target modules"),
    "of a classifier": (edit_config(task_type="SEQ_CLS"), "is an adapter for SEQ_CLS, and CAUSAL_LM is wanted"),
    "pickled": (
        lambda path: (path / "adapter_model.safetensors").rename(path / "adapter_model.bin") and None,
        "Pickled adapters are not read",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_an_adapter_that_is_not_whole_or_does_not_fit_is_refused(adapter: Path, tiny_model: Path, name: str) -> None:
    spoil, message = SPOILED[name]
    spoil(adapter)
    with pytest.raises(RunFailed, match=message) as caught:
        load_adapter(load(tiny_model), source(adapter), base=source(tiny_model))
    assert caught.value.code == TrainerExit.USER


def test_another_tools_adapter_is_held_against_the_name_of_its_base(adapter: Path, tiny_model: Path) -> None:
    (adapter / "hone_base.json").unlink()
    edit_config(base_model_name_or_path="org/other")(adapter)
    base = Source(asked="hf://org/name", path=str(tiny_model), revision="abc")
    with pytest.raises(RunFailed, match="names org/other as its base, and hf://org/name is another model"):
        load_adapter(load(tiny_model), source(adapter), base=base)


@pytest.fixture
def go_on(make_attempt: MakeAttempt, run_here: RunHere) -> Callable[..., Attempt]:
    """Trains on from an adapter."""

    def run(adapter: Path, changes: dict[str, Any]) -> Attempt:
        lora = {"rank": 4, "dropout": changes.pop("dropout", 0.0)}
        return run_here(make_attempt({"model": {"source": f"file://{adapter}"}, "adapter": {"lora": lora}, **changes}))

    return run


def test_training_goes_on_from_an_adapter_on_its_base(
    adapter: Path, tiny_model: Path, go_on: Callable[..., Attempt], make_attempt: MakeAttempt, run_here: RunHere
) -> None:
    attempt = go_on(adapter, {"training": {"max_steps": 12}})
    fresh = run_here(make_attempt({"training": {"max_steps": 12}}))
    assert sum(attempt.losses()[:3]) < sum(fresh.losses()[:3]) - 0.3
    identity = json.loads((adapter_of(attempt) / "hone_base.json").read_text())
    assert identity == json.loads((adapter / "hone_base.json").read_text())
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, adapter_of(attempt)))
    assert before.keys() == after.keys()
    assert not torch.equal(before[KEY], after[KEY])
    config = json.loads((adapter_of(attempt) / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["inference_mode"]) == ("tiny", True)


def test_the_first_loss_is_that_of_the_adapted_model(
    adapter: Path, tiny_model: Path, go_on: Callable[..., Attempt], tmp_path: Path, tokenizer: Any
) -> None:
    model = load_adapter(load(tiny_model), source(adapter), base=source(tiny_model))
    again = go_on(adapter, {"training": {"max_steps": 1, "learning_rate": 1e-12}})
    unmoved = load_adapter(load(tiny_model), source(adapter_of(again)), base=source(tiny_model))
    assert torch.allclose(logits(model), logits(unmoved), atol=1e-6)


def test_dropout_is_the_requests_and_not_what_the_adapter_was_trained_with(
    adapter: Path, tiny_model: Path, go_on: Callable[..., Attempt]
) -> None:
    edit_config(lora_dropout=0.5)(adapter)
    first, second = (go_on(adapter, {"training": {"max_steps": 1}}).losses() for _ in range(2))
    assert first == second
    assert go_on(adapter, {"training": {"max_steps": 1}, "dropout": 0.5}).losses() != first


def test_a_request_for_another_rank_than_the_adapters_is_refused(
    adapter: Path, make_attempt: MakeAttempt, run_here: RunHere
) -> None:
    changes = {"model": {"source": f"file://{adapter}"}, "adapter": {"lora": {"rank": 8}}}
    with pytest.raises(RunFailed, match=r"adapter\.lora\.rank: is 4 in the adapter that training goes on from"):
        run_here(make_attempt(changes))


def test_a_base_that_is_gone_is_named_beside_its_adapter(adapter: Path, make_attempt: MakeAttempt) -> None:
    from hone_trainer.inputs import fetch

    identity = json.loads((adapter / "hone_base.json").read_text())
    (adapter / "hone_base.json").write_text(json.dumps(identity | {"source": "file:///nowhere/base"}))
    attempt = make_attempt({"model": {"source": f"file://{adapter}"}})
    with pytest.raises(RunFailed, match=r"model\.source: file://.*adapter, its base: /nowhere/base does not exist"):
        fetch(attempt.run, attempt.directory.path)


def test_full_fine_tuning_does_not_start_from_an_adapter(
    adapter: Path, make_attempt: MakeAttempt, run_here: RunHere
) -> None:
    with pytest.raises(RunFailed, match="is an adapter, and the request trains a whole model"):
        run_here(make_attempt({"model": {"source": f"file://{adapter}"}, "adapter": None}))


def test_several_adapters_are_switched_in_place(adapter: Path, tiny_model: Path, go_on: Callable[..., Attempt]) -> None:
    other = adapter_of(go_on(adapter, {"training": {"max_steps": 2}}))
    alone = [logits(load_adapter(load(tiny_model), source(path), base=source(tiny_model))) for path in (adapter, other)]
    model = load(tiny_model)
    for name, path in (("a_0", adapter), ("a_1", other)):
        model = load_adapter(model, source(path), base=source(tiny_model), name=name)
    for name, expected in zip(("a_0", "a_1", "a_0"), (*alone, alone[0]), strict=True):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected)


OPTIONS: dict[str, tuple[dict[str, Any], Callable[[set[str]], bool]]] = {
    "dora": ({"use_dora": True}, lambda names: any("lora_magnitude_vector" in name for name in names)),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, lambda names: "base_model.model.lm_head.weight" in names),
    "attention": ({"target_modules": ["attention"]}, lambda names: not any("mlp" in name for name in names)),
    "names": ({"target_modules": ["mlp.up_proj"]}, lambda names: all("mlp.up_proj" in name for name in names)),
    "expression": (
        {"target_modules": ["re:.*layers\\.1\\..*_proj"]},
        lambda names: all("layers.1" in name for name in names),
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_shows_in_what_is_saved_and_loads_again(
    make_attempt: MakeAttempt, run_here: RunHere, tiny_model: Path, name: str
) -> None:
    options, holds = OPTIONS[name]
    path = adapter_of(
        run_here(make_attempt({"adapter": {"lora": {"rank": 2, **options}}, "training": {"max_steps": 2}}))
    )
    assert holds(set(load_file(path / "adapter_model.safetensors")))
    model = load_adapter(load(tiny_model), source(path), base=source(tiny_model))
    assert not torch.allclose(logits(model), logits(load(tiny_model)), atol=1e-4)


def test_biases_are_trained_and_saved_where_the_model_has_some(
    make_attempt: MakeAttempt, run_here: RunHere, tmp_path: Path
) -> None:
    base = make_model(tmp_path / "biased", attention_bias=True)
    changes = {"model": {"source": f"file://{base}"}, "adapter": {"lora": {"rank": 2, "bias": "all"}}}
    path = adapter_of(run_here(make_attempt(changes)))
    tensors = load_file(path / "adapter_model.safetensors")
    biases = [name for name in tensors if name.endswith(".bias")]
    assert len(biases) == 8
    assert any(tensors[name].abs().max() > 0 for name in biases)
    load_adapter(load(base), source(path), base=source(base))


@pytest.mark.parametrize(("use_rslora", "expected"), [(False, 8 / 16), (True, 8 / 4)])
def test_the_scale_is_alpha_over_rank_or_over_its_root(tiny_model: Path, use_rslora: bool, expected: float) -> None:
    adapted = add_lora(load(tiny_model), Lora(rank=16, alpha=8.0, target_modules=("q_proj",), use_rslora=use_rslora))
    assert adapted.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == expected
