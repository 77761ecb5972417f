from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JobSpec(_message.Message):
    __slots__ = ("name", "labels", "model", "dataset", "method", "adapter", "quantization", "training", "compute", "scheduling", "reporting", "output")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_FIELD_NUMBER: _ClassVar[int]
    SCHEDULING_FIELD_NUMBER: _ClassVar[int]
    REPORTING_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    name: str
    labels: _containers.ScalarMap[str, str]
    model: Model
    dataset: Dataset
    method: Method
    adapter: Adapter
    quantization: str
    training: Training
    compute: Compute
    scheduling: Scheduling
    reporting: Reporting
    output: OutputOptions
    def __init__(self, name: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., model: _Optional[_Union[Model, _Mapping]] = ..., dataset: _Optional[_Union[Dataset, _Mapping]] = ..., method: _Optional[_Union[Method, _Mapping]] = ..., adapter: _Optional[_Union[Adapter, _Mapping]] = ..., quantization: _Optional[str] = ..., training: _Optional[_Union[Training, _Mapping]] = ..., compute: _Optional[_Union[Compute, _Mapping]] = ..., scheduling: _Optional[_Union[Scheduling, _Mapping]] = ..., reporting: _Optional[_Union[Reporting, _Mapping]] = ..., output: _Optional[_Union[OutputOptions, _Mapping]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("source", "tokenizer", "chat_template", "system_prompt", "eos_token", "new_tokens", "attention")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    SYSTEM_PROMPT_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    source: str
    tokenizer: str
    chat_template: str
    system_prompt: str
    eos_token: str
    new_tokens: _containers.RepeatedScalarFieldContainer[str]
    attention: str
    def __init__(self, source: _Optional[str] = ..., tokenizer: _Optional[str] = ..., chat_template: _Optional[str] = ..., system_prompt: _Optional[str] = ..., eos_token: _Optional[str] = ..., new_tokens: _Optional[_Iterable[str]] = ..., attention: _Optional[str] = ...) -> None: ...

class Dataset(_message.Message):
    __slots__ = ("source", "split", "config", "eval_source", "eval_split", "eval_fraction", "format", "columns", "weight", "mix")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    EVAL_SOURCE_FIELD_NUMBER: _ClassVar[int]
    EVAL_SPLIT_FIELD_NUMBER: _ClassVar[int]
    EVAL_FRACTION_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    MIX_FIELD_NUMBER: _ClassVar[int]
    source: str
    split: str
    config: str
    eval_source: str
    eval_split: str
    eval_fraction: float
    format: str
    columns: Columns
    weight: float
    mix: _containers.RepeatedCompositeFieldContainer[MixedDataset]
    def __init__(self, source: _Optional[str] = ..., split: _Optional[str] = ..., config: _Optional[str] = ..., eval_source: _Optional[str] = ..., eval_split: _Optional[str] = ..., eval_fraction: _Optional[float] = ..., format: _Optional[str] = ..., columns: _Optional[_Union[Columns, _Mapping]] = ..., weight: _Optional[float] = ..., mix: _Optional[_Iterable[_Union[MixedDataset, _Mapping]]] = ...) -> None: ...

class MixedDataset(_message.Message):
    __slots__ = ("source", "split", "config", "weight")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    source: str
    split: str
    config: str
    weight: float
    def __init__(self, source: _Optional[str] = ..., split: _Optional[str] = ..., config: _Optional[str] = ..., weight: _Optional[float] = ...) -> None: ...

class Columns(_message.Message):
    __slots__ = ("messages", "prompt", "completion", "text", "chosen", "rejected", "margin")
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    messages: str
    prompt: str
    completion: str
    text: str
    chosen: str
    rejected: str
    margin: str
    def __init__(self, messages: _Optional[str] = ..., prompt: _Optional[str] = ..., completion: _Optional[str] = ..., text: _Optional[str] = ..., chosen: _Optional[str] = ..., rejected: _Optional[str] = ..., margin: _Optional[str] = ...) -> None: ...

class Method(_message.Message):
    __slots__ = ("sft", "dpo", "reward", "ppo", "grpo", "merge")
    SFT_FIELD_NUMBER: _ClassVar[int]
    DPO_FIELD_NUMBER: _ClassVar[int]
    REWARD_FIELD_NUMBER: _ClassVar[int]
    PPO_FIELD_NUMBER: _ClassVar[int]
    GRPO_FIELD_NUMBER: _ClassVar[int]
    MERGE_FIELD_NUMBER: _ClassVar[int]
    sft: Sft
    dpo: Dpo
    reward: Reward
    ppo: Ppo
    grpo: Grpo
    merge: Merge
    def __init__(self, sft: _Optional[_Union[Sft, _Mapping]] = ..., dpo: _Optional[_Union[Dpo, _Mapping]] = ..., reward: _Optional[_Union[Reward, _Mapping]] = ..., ppo: _Optional[_Union[Ppo, _Mapping]] = ..., grpo: _Optional[_Union[Grpo, _Mapping]] = ..., merge: _Optional[_Union[Merge, _Mapping]] = ...) -> None: ...

class Sft(_message.Message):
    __slots__ = ("max_length", "packing", "packing_strategy", "loss_on")
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    PACKING_FIELD_NUMBER: _ClassVar[int]
    PACKING_STRATEGY_FIELD_NUMBER: _ClassVar[int]
    LOSS_ON_FIELD_NUMBER: _ClassVar[int]
    max_length: int
    packing: bool
    packing_strategy: str
    loss_on: str
    def __init__(self, max_length: _Optional[int] = ..., packing: _Optional[bool] = ..., packing_strategy: _Optional[str] = ..., loss_on: _Optional[str] = ...) -> None: ...

class Dpo(_message.Message):
    __slots__ = ("beta", "loss", "label_smoothing", "max_length", "precompute_reference")
    BETA_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    LABEL_SMOOTHING_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    PRECOMPUTE_REFERENCE_FIELD_NUMBER: _ClassVar[int]
    beta: float
    loss: _containers.RepeatedScalarFieldContainer[str]
    label_smoothing: float
    max_length: int
    precompute_reference: bool
    def __init__(self, beta: _Optional[float] = ..., loss: _Optional[_Iterable[str]] = ..., label_smoothing: _Optional[float] = ..., max_length: _Optional[int] = ..., precompute_reference: _Optional[bool] = ...) -> None: ...

class Reward(_message.Message):
    __slots__ = ("max_length", "center_rewards_coefficient")
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    CENTER_REWARDS_COEFFICIENT_FIELD_NUMBER: _ClassVar[int]
    max_length: int
    center_rewards_coefficient: float
    def __init__(self, max_length: _Optional[int] = ..., center_rewards_coefficient: _Optional[float] = ...) -> None: ...

class Ppo(_message.Message):
    __slots__ = ("rewards", "ppo_epochs", "batch_size", "mini_batch_size", "init_kl_coef", "kl_target", "max_kl", "gamma", "gae_lambda", "cliprange", "cliprange_value", "vf_coef", "missing_eos_penalty", "max_prompt_length", "max_new_tokens", "temperature")
    REWARDS_FIELD_NUMBER: _ClassVar[int]
    PPO_EPOCHS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    MINI_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    INIT_KL_COEF_FIELD_NUMBER: _ClassVar[int]
    KL_TARGET_FIELD_NUMBER: _ClassVar[int]
    MAX_KL_FIELD_NUMBER: _ClassVar[int]
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    GAE_LAMBDA_FIELD_NUMBER: _ClassVar[int]
    CLIPRANGE_FIELD_NUMBER: _ClassVar[int]
    CLIPRANGE_VALUE_FIELD_NUMBER: _ClassVar[int]
    VF_COEF_FIELD_NUMBER: _ClassVar[int]
    MISSING_EOS_PENALTY_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    rewards: _containers.RepeatedCompositeFieldContainer[RewardPart]
    ppo_epochs: int
    batch_size: int
    mini_batch_size: int
    init_kl_coef: float
    kl_target: float
    max_kl: float
    gamma: float
    gae_lambda: float
    cliprange: float
    cliprange_value: float
    vf_coef: float
    missing_eos_penalty: float
    max_prompt_length: int
    max_new_tokens: int
    temperature: float
    def __init__(self, rewards: _Optional[_Iterable[_Union[RewardPart, _Mapping]]] = ..., ppo_epochs: _Optional[int] = ..., batch_size: _Optional[int] = ..., mini_batch_size: _Optional[int] = ..., init_kl_coef: _Optional[float] = ..., kl_target: _Optional[float] = ..., max_kl: _Optional[float] = ..., gamma: _Optional[float] = ..., gae_lambda: _Optional[float] = ..., cliprange: _Optional[float] = ..., cliprange_value: _Optional[float] = ..., vf_coef: _Optional[float] = ..., missing_eos_penalty: _Optional[float] = ..., max_prompt_length: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., temperature: _Optional[float] = ...) -> None: ...

class RewardPart(_message.Message):
    __slots__ = ("model", "answer", "regex", "json_schema", "length", "http", "python", "weight", "on_error")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    REGEX_FIELD_NUMBER: _ClassVar[int]
    JSON_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    HTTP_FIELD_NUMBER: _ClassVar[int]
    PYTHON_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    ON_ERROR_FIELD_NUMBER: _ClassVar[int]
    model: RewardModelPart
    answer: AnswerPart
    regex: RegexPart
    json_schema: JsonSchemaPart
    length: LengthPart
    http: HttpPart
    python: PythonPart
    weight: float
    on_error: str
    def __init__(self, model: _Optional[_Union[RewardModelPart, _Mapping]] = ..., answer: _Optional[_Union[AnswerPart, _Mapping]] = ..., regex: _Optional[_Union[RegexPart, _Mapping]] = ..., json_schema: _Optional[_Union[JsonSchemaPart, _Mapping]] = ..., length: _Optional[_Union[LengthPart, _Mapping]] = ..., http: _Optional[_Union[HttpPart, _Mapping]] = ..., python: _Optional[_Union[PythonPart, _Mapping]] = ..., weight: _Optional[float] = ..., on_error: _Optional[str] = ...) -> None: ...

class RewardModelPart(_message.Message):
    __slots__ = ("source", "max_length")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    source: str
    max_length: int
    def __init__(self, source: _Optional[str] = ..., max_length: _Optional[int] = ...) -> None: ...

class AnswerPart(_message.Message):
    __slots__ = ("column", "numeric", "tolerance")
    COLUMN_FIELD_NUMBER: _ClassVar[int]
    NUMERIC_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    column: str
    numeric: bool
    tolerance: float
    def __init__(self, column: _Optional[str] = ..., numeric: _Optional[bool] = ..., tolerance: _Optional[float] = ...) -> None: ...

class RegexPart(_message.Message):
    __slots__ = ("pattern",)
    PATTERN_FIELD_NUMBER: _ClassVar[int]
    pattern: str
    def __init__(self, pattern: _Optional[str] = ...) -> None: ...

class JsonSchemaPart(_message.Message):
    __slots__ = ("schema_text",)
    SCHEMA_TEXT_FIELD_NUMBER: _ClassVar[int]
    schema_text: str
    def __init__(self, schema_text: _Optional[str] = ...) -> None: ...

class LengthPart(_message.Message):
    __slots__ = ("max_tokens",)
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    def __init__(self, max_tokens: _Optional[int] = ...) -> None: ...

class HttpPart(_message.Message):
    __slots__ = ("url", "timeout", "max_batch")
    URL_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    url: str
    timeout: int
    max_batch: int
    def __init__(self, url: _Optional[str] = ..., timeout: _Optional[int] = ..., max_batch: _Optional[int] = ...) -> None: ...

class PythonPart(_message.Message):
    __slots__ = ("file", "function")
    FILE_FIELD_NUMBER: _ClassVar[int]
    FUNCTION_FIELD_NUMBER: _ClassVar[int]
    file: str
    function: str
    def __init__(self, file: _Optional[str] = ..., function: _Optional[str] = ...) -> None: ...

class Grpo(_message.Message):
    __slots__ = ("rewards", "num_generations", "num_iterations", "beta", "epsilon", "loss", "max_kl", "max_prompt_length", "max_new_tokens", "temperature", "top_p", "top_k")
    REWARDS_FIELD_NUMBER: _ClassVar[int]
    NUM_GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_ITERATIONS_FIELD_NUMBER: _ClassVar[int]
    BETA_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    MAX_KL_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    rewards: _containers.RepeatedCompositeFieldContainer[RewardPart]
    num_generations: int
    num_iterations: int
    beta: float
    epsilon: float
    loss: str
    max_kl: float
    max_prompt_length: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    def __init__(self, rewards: _Optional[_Iterable[_Union[RewardPart, _Mapping]]] = ..., num_generations: _Optional[int] = ..., num_iterations: _Optional[int] = ..., beta: _Optional[float] = ..., epsilon: _Optional[float] = ..., loss: _Optional[str] = ..., max_kl: _Optional[float] = ..., max_prompt_length: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ...) -> None: ...

class Merge(_message.Message):
    __slots__ = ("adapters", "combination", "max_kl")
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    COMBINATION_FIELD_NUMBER: _ClassVar[int]
    MAX_KL_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[MergeAdapter]
    combination: str
    max_kl: float
    def __init__(self, adapters: _Optional[_Iterable[_Union[MergeAdapter, _Mapping]]] = ..., combination: _Optional[str] = ..., max_kl: _Optional[float] = ...) -> None: ...

class MergeAdapter(_message.Message):
    __slots__ = ("source", "weight")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    source: str
    weight: float
    def __init__(self, source: _Optional[str] = ..., weight: _Optional[float] = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("lora",)
    LORA_FIELD_NUMBER: _ClassVar[int]
    lora: Lora
    def __init__(self, lora: _Optional[_Union[Lora, _Mapping]] = ...) -> None: ...

class Lora(_message.Message):
    __slots__ = ("rank", "alpha", "dropout", "bias", "target_modules", "modules_to_save", "use_rslora", "use_dora")
    RANK_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    DROPOUT_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    MODULES_TO_SAVE_FIELD_NUMBER: _ClassVar[int]
    USE_RSLORA_FIELD_NUMBER: _ClassVar[int]
    USE_DORA_FIELD_NUMBER: _ClassVar[int]
    rank: int
    alpha: float
    dropout: float
    bias: str
    target_modules: _containers.RepeatedScalarFieldContainer[str]
    modules_to_save: _containers.RepeatedScalarFieldContainer[str]
    use_rslora: bool
    use_dora: bool
    def __init__(self, rank: _Optional[int] = ..., alpha: _Optional[float] = ..., dropout: _Optional[float] = ..., bias: _Optional[str] = ..., target_modules: _Optional[_Iterable[str]] = ..., modules_to_save: _Optional[_Iterable[str]] = ..., use_rslora: _Optional[bool] = ..., use_dora: _Optional[bool] = ...) -> None: ...

class Training(_message.Message):
    __slots__ = ("epochs", "max_steps", "learning_rate", "scheduler", "warmup_ratio", "warmup_steps", "optimizer", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "micro_batch_size", "gradient_accumulation_steps", "global_batch_size", "activation_checkpointing", "precision", "seed", "eval", "checkpoint")
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    SCHEDULER_FIELD_NUMBER: _ClassVar[int]
    WARMUP_RATIO_FIELD_NUMBER: _ClassVar[int]
    WARMUP_STEPS_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    ADAM_BETA1_FIELD_NUMBER: _ClassVar[int]
    ADAM_BETA2_FIELD_NUMBER: _ClassVar[int]
    ADAM_EPSILON_FIELD_NUMBER: _ClassVar[int]
    MAX_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_ACCUMULATION_STEPS_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_CHECKPOINTING_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    EVAL_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    epochs: float
    max_steps: int
    learning_rate: float
    scheduler: str
    warmup_ratio: float
    warmup_steps: int
    optimizer: str
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    micro_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int
    activation_checkpointing: bool
    precision: str
    seed: int
    eval: Eval
    checkpoint: CheckpointOptions
    def __init__(self, epochs: _Optional[float] = ..., max_steps: _Optional[int] = ..., learning_rate: _Optional[float] = ..., scheduler: _Optional[str] = ..., warmup_ratio: _Optional[float] = ..., warmup_steps: _Optional[int] = ..., optimizer: _Optional[str] = ..., weight_decay: _Optional[float] = ..., adam_beta1: _Optional[float] = ..., adam_beta2: _Optional[float] = ..., adam_epsilon: _Optional[float] = ..., max_grad_norm: _Optional[float] = ..., micro_batch_size: _Optional[int] = ..., gradient_accumulation_steps: _Optional[int] = ..., global_batch_size: _Optional[int] = ..., activation_checkpointing: _Optional[bool] = ..., precision: _Optional[str] = ..., seed: _Optional[int] = ..., eval: _Optional[_Union[Eval, _Mapping]] = ..., checkpoint: _Optional[_Union[CheckpointOptions, _Mapping]] = ...) -> None: ...

class Eval(_message.Message):
    __slots__ = ("steps", "at_start", "max_rows", "batch_size", "keep_best", "early_stopping_patience")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    AT_START_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    KEEP_BEST_FIELD_NUMBER: _ClassVar[int]
    EARLY_STOPPING_PATIENCE_FIELD_NUMBER: _ClassVar[int]
    steps: int
    at_start: bool
    max_rows: int
    batch_size: int
    keep_best: bool
    early_stopping_patience: int
    def __init__(self, steps: _Optional[int] = ..., at_start: _Optional[bool] = ..., max_rows: _Optional[int] = ..., batch_size: _Optional[int] = ..., keep_best: _Optional[bool] = ..., early_stopping_patience: _Optional[int] = ...) -> None: ...

class CheckpointOptions(_message.Message):
    __slots__ = ("steps", "keep")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    steps: int
    keep: int
    def __init__(self, steps: _Optional[int] = ..., keep: _Optional[int] = ...) -> None: ...

class Compute(_message.Message):
    __slots__ = ("nodes", "gpus_per_node", "processes_per_node", "gpu", "strategy")
    NODES_FIELD_NUMBER: _ClassVar[int]
    GPUS_PER_NODE_FIELD_NUMBER: _ClassVar[int]
    PROCESSES_PER_NODE_FIELD_NUMBER: _ClassVar[int]
    GPU_FIELD_NUMBER: _ClassVar[int]
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    nodes: int
    gpus_per_node: int
    processes_per_node: int
    gpu: str
    strategy: str
    def __init__(self, nodes: _Optional[int] = ..., gpus_per_node: _Optional[int] = ..., processes_per_node: _Optional[int] = ..., gpu: _Optional[str] = ..., strategy: _Optional[str] = ...) -> None: ...

class Scheduling(_message.Message):
    __slots__ = ("queue", "priority", "deadline", "max_attempts")
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_FIELD_NUMBER: _ClassVar[int]
    MAX_ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    queue: str
    priority: str
    deadline: int
    max_attempts: int
    def __init__(self, queue: _Optional[str] = ..., priority: _Optional[str] = ..., deadline: _Optional[int] = ..., max_attempts: _Optional[int] = ...) -> None: ...

class Reporting(_message.Message):
    __slots__ = ("logging_steps", "samples", "trackers")
    LOGGING_STEPS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    TRACKERS_FIELD_NUMBER: _ClassVar[int]
    logging_steps: int
    samples: Samples
    trackers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, logging_steps: _Optional[int] = ..., samples: _Optional[_Union[Samples, _Mapping]] = ..., trackers: _Optional[_Iterable[str]] = ...) -> None: ...

class Samples(_message.Message):
    __slots__ = ("prompts", "max_new_tokens", "steps")
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    prompts: int
    max_new_tokens: int
    steps: int
    def __init__(self, prompts: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., steps: _Optional[int] = ...) -> None: ...

class OutputOptions(_message.Message):
    __slots__ = ("merged", "hub")
    MERGED_FIELD_NUMBER: _ClassVar[int]
    HUB_FIELD_NUMBER: _ClassVar[int]
    merged: bool
    hub: Hub
    def __init__(self, merged: _Optional[bool] = ..., hub: _Optional[_Union[Hub, _Mapping]] = ...) -> None: ...

class Hub(_message.Message):
    __slots__ = ("repo", "private", "what", "branch")
    REPO_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    BRANCH_FIELD_NUMBER: _ClassVar[int]
    repo: str
    private: bool
    what: str
    branch: str
    def __init__(self, repo: _Optional[str] = ..., private: _Optional[bool] = ..., what: _Optional[str] = ..., branch: _Optional[str] = ...) -> None: ...
