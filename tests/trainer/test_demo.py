"""On the demo's real data and model: SFT lowers the held-out loss, and DPO from its adapter raises the held-out margin.

Minutes; `make soak` runs it, and `make demo` makes what it needs.
"""

from pathlib import Path

import pytest

from .conftest import MakeAttempt, RunHere
from .test_adapters import adapter_of

EXAMPLES = Path(__file__).parents[2] / "examples"
BASE, DATA = EXAMPLES / "base" / "stdlib-4m", EXAMPLES / "data" / "stdlib"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not (BASE.exists() and DATA.exists()), reason="make demo makes the data and the base model")
def test_sft_lowers_the_held_out_loss_and_dpo_from_it_raises_the_margin(
    make_attempt: MakeAttempt, run_here: RunHere
) -> None:
    shared = {"max_steps": 60, "eval": {"at_start": True, "max_rows": 128, "batch_size": 32}}
    lora = {"lora": {"rank": 16, "alpha": 32, "target_modules": "all-linear"}}
    request = {
        "model": {"source": f"file://{BASE}"},
        "dataset": {"source": f"file://{DATA}/train.jsonl", "eval_source": f"file://{DATA}/eval.jsonl"},
        "method": {"sft": {"max_length": 256}},
        "adapter": lora,
        "training": {**shared, "learning_rate": 2e-3},
    }
    first = run_here(make_attempt(request, micro_batch_size=16))
    before, after = (event.metrics["eval_loss"] for event in first.events("eval"))
    assert after < before - 0.05
    request |= {
        "model": {"source": f"file://{adapter_of(first)}"},
        "dataset": {"source": f"file://{DATA}/pairs.jsonl", "eval_fraction": 0.05},
        "method": {"sft": None, "dpo": {"max_length": 256}},
        "training": {**shared, "learning_rate": 5e-4},
    }
    second = run_here(make_attempt(request, job="dpo", micro_batch_size=8))
    before, after = (event.metrics["eval_rewards/margins"] for event in second.events("eval"))
    assert before == pytest.approx(0, abs=1e-5)
    assert after > 0.5
