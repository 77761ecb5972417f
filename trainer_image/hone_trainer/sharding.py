"""ZeRO: optimizer states and gradients (stage 2), and weights too (stage 3), split over all ranks by DeepSpeed.

Called by world.py, arguments.py, training.py, course.py and outputs.py where the plan says zero2 or zero3. Under stage
3 every forward pass and every look at a weight is made by all ranks together. Source: Rajbhandari et al. 2020.
"""

from __future__ import annotations  # torch is for the types alone: who starts processes imports this too

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hone.job import Launch
from hone.plan.memory import MAX_LIVE_PARAMETERS, REDUCE_BUCKET_SIZE
from hone.run import TrainerExit
from hone_trainer.failure import RunFailed

if TYPE_CHECKING:
    import torch

STAGES = {"zero2": 2, "zero3": 3}


def splits_weights(launch: Launch) -> bool:
    """Whether no rank holds the weights in full."""
    return launch.strategy == "zero3"


def announce(launch: Launch) -> None:
    """Before anything of accelerate is made: what makes it use DeepSpeed, on a CPU too."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ.pop("ACCELERATE_USE_CPU", None)  # with it accelerate forgets DeepSpeed and says nothing
    if launch.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"


def configuration(launch: Launch) -> dict[str, Any]:
    """DeepSpeed's settings; `auto` is filled in from the trainer's arguments."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": launch.precision == "bf16"},
        "zero_allow_untested_optimizer": True,  # torch's fused AdamW, the one of every other strategy
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": STAGES[launch.strategy],
            # Without it full fine-tuning under stage 3 saves no weights at all.
            "stage3_gather_16bit_weights_on_model_save": True,
            "overlap_comm": launch.device == "cuda",
            # DeepSpeed's own is ten times as much: 2 GB on every GPU under stage 2.
            "reduce_bucket_size": REDUCE_BUCKET_SIZE,
            "stage3_max_live_parameters": MAX_LIVE_PARAMETERS,
            # Weights of fewer numbers stay whole: DeepSpeed's default, and for the small models of CPUs norms only.
            "stage3_param_persistence_threshold": 100_000 if launch.device == "cuda" else 1000,
        },
    }


def check(launch: Launch, accelerator: Any) -> None:
    """Raise WRONG_WORLD unless the trainer's own idea of the world is the planned one: accelerate drops DeepSpeed, and
    ranks, without a word."""
    from accelerate.utils import DistributedType

    if launch.world_size != accelerator.num_processes:
        raise _wrong(f"has {accelerator.num_processes} processes", launch)
    if launch.is_sharded != (accelerator.distributed_type == DistributedType.DEEPSPEED):
        raise _wrong(f"runs as {accelerator.distributed_type.value}", launch)
    if launch.is_sharded and (stage := accelerator.state.deepspeed_plugin.zero_stage) != STAGES[launch.strategy]:
        raise _wrong(f"runs ZeRO stage {stage}", launch)


def shape(parameter: torch.Tensor) -> torch.Size:
    """Of all of it; a rank's share says that it is empty."""
    found: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return found


@contextmanager
def whole(parameters: Iterable[torch.Tensor], *, written: bool = False) -> Iterator[None]:
    """Every rank holds these parameters in full for the length of the block; with `written` all of them keep what the
    first one wrote. Every rank has to enter it."""
    split: list[Any] = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not split:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    # Small ones are always whole, and have to stay so.
    split = [parameter for parameter in split if parameter.ds_status != ZeroParamStatus.AVAILABLE]

    with GatheredParameters(split, modifier_rank=0 if written else None):
        yield


def copies(parameters: Iterable[tuple[str, torch.Tensor]], *, kept: bool) -> dict[str, torch.Tensor]:
    """Copies on the CPU, where `kept`; one parameter is whole at a time. Every rank has to call it."""
    found = {}
    for name, parameter in parameters:
        with whole([parameter]):
            if kept:
                found[name] = parameter.detach().to("cpu", copy=True)
    return found


def consolidated(model: Any, *, kept: bool) -> Any:
    """A model with all weights on the CPU, where `kept`, else None. Every rank has to call it."""
    import torch

    state = copies(model.named_parameters(), kept=kept)
    if not kept:
        return None
    split = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state |= {name: tensor for name, tensor in model.state_dict().items() if name not in split}  # buffers
    with torch.device("meta"):
        found = type(model)(model.config)
    found.load_state_dict(state, strict=False, assign=True)
    found.tie_weights()
    found.generation_config = model.generation_config
    return found


def prepare_forward(trainer: Any) -> None:
    """Let a model that is not going to train compute: without an engine nobody gathers its weights."""
    from transformers.integrations.deepspeed import deepspeed_init

    plugin = trainer.accelerator.state.deepspeed_plugin
    if plugin and plugin.zero_stage == STAGES["zero3"]:
        deepspeed_init(trainer, num_training_steps=0, inference=True)
        trainer.deepspeed = trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)


def forget_order(trainer: Any) -> None:
    """Between answering and training. DeepSpeed fetches ahead what the pass before used; a step does not call the head
    as an answer does (TRL reads its weight past the module), and a head that came ahead of time is given back while its
    gradient is made."""
    coordinator = trainer.deepspeed.optimizer.parameter_offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()


def load_whole() -> None:
    """From here on transformers loads models in one piece, on one rank alone."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def _wrong(found: str, launch: Launch) -> RunFailed:
    return RunFailed(
        TrainerExit.WRONG_WORLD,
        f"The trainer does not do what was planned: it {found}; the plan says {launch.world_size} ({launch.strategy}).",
        fix="Report it as a bug, with the versions that `pip freeze` gives in the trainer image.",
    )
