"""What the formulas of memory need to know of a request, gathered once."""

from dataclasses import dataclass, field

from hone.job import Launch
from hone.modelinfo import Linear, ModelShape
from hone.spec import Lora


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A request as the formulas see it, before anything of its launch is decided."""

    shape: ModelShape
    trained: int
    lora: Lora | None
    """None trains every weight."""
    targets: tuple[Linear, ...] = field(compare=False)
    """The layers that it adapts; shape and adapter decide them."""
    quantized: bool
    sequence_length: int
    rows_factor: int
    """Sequences that one row of the micro-batch brings: 2 for pairs."""
    reward_models: int
    """Models beside the trained one that score its answers, each taken to be as large."""
    keeps_reference: bool
    """Whether a frozen copy of the trained weights is kept: full DPO and PPO."""
    scores: bool
    """Whether the model answers with one score, and no head makes logits."""
    learns_answers: bool
    """Whether it is supervised fine-tuning, which leaves the model's own dropout on."""
    generated_tokens: int
    packed: bool
    attention: str
    """`sdpa`, `eager` or `flash_attention_2`."""
    optimizer: str
    answers: int = 0
    """Answers that are drawn together, over all processes; 0: as many as the micro-batch has rows."""
    eval_rows: int = 0
    """Rows of one forward pass of the evaluation, where the request says it; else they are a micro-batch."""
    merges: bool = False

    @property
    def adapted(self) -> bool:
        return self.lora is not None

    def is_masked(self, launch: Launch) -> bool:
        """Whether attention takes a mask, of every token by every token of its row: for rows that are padded to the
        longest, or packed. Grouped keys and values are then repeated for every head, too."""
        if self.attention != "sdpa":
            return False
        several = launch.micro_batch_size * self.rows_factor > 1
        return several or self.packed or bool(self.generated_tokens) or self.shape.layer.always_masked

    def trains_in_fp32(self, launch: Launch) -> bool:
        """Whether weights are fp32, and what autocast does not cast is, too."""
        is_cast = self.lora is None and not launch.is_sharded and self.optimizer != "adamw_bf16_sr"
        return launch.precision == "fp32" or is_cast
