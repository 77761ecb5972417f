"""ZeRO: optimizer states and gradients (stage 2), and weights too (stage 3), split over all ranks by DeepSpeed.

Called by world.py, arguments.py and training.py where the plan says zero2 or zero3. Source: Rajbhandari et al. 2020.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from hone.job import Launch
from hone.run import TrainerExit
from hone_trainer.failure import RunFailed

STAGES = {"zero2": 2, "zero3": 3}


def is_sharded(launch: Launch) -> bool:
    """Whether DeepSpeed runs this launch."""
    return launch.strategy in STAGES


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
        },
    }


def check(launch: Launch, accelerator: Any) -> None:
    """Raise WRONG_WORLD unless the trainer's own idea of the world is the planned one: accelerate drops DeepSpeed, and
    ranks, without a word."""
    from accelerate.utils import DistributedType

    if launch.world_size != accelerator.num_processes:
        raise _wrong(f"has {accelerator.num_processes} processes", launch)
    if is_sharded(launch) != (accelerator.distributed_type == DistributedType.DEEPSPEED):
        raise _wrong(f"runs as {accelerator.distributed_type.value}", launch)
    if is_sharded(launch) and (stage := accelerator.state.deepspeed_plugin.zero_stage) != STAGES[launch.strategy]:
        raise _wrong(f"runs ZeRO stage {stage}", launch)


@contextmanager
def whole(parameters: Iterable[Any]) -> Iterator[None]:
    """Every rank holds these parameters in full for the length of the block. Every rank has to enter it."""
    split = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not split:
        yield
        return
    from deepspeed.zero import GatheredParameters

    with GatheredParameters(split, modifier_rank=0):
        yield


def _wrong(found: str, launch: Launch) -> RunFailed:
    return RunFailed(
        TrainerExit.WRONG_WORLD,
        f"The trainer does not do what was planned: it {found}; the plan says {launch.world_size} ({launch.strategy}).",
        fix="Report it as a bug, with the versions that `pip freeze` gives in the trainer image.",
    )
