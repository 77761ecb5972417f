"""From rows to tokens: what is read, what is learned, and where an answer stops.

Called by data.py for every method that reads text. Each row becomes token ids and a mask of the tokens that are
learned.
The rules: exactly one beginning-of-sequence token; the stop token is always learned; chat answers are what the template
marks with `{% generation %}`; a completion starts where the tokens of prompt and prompt + completion part.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hone.run import TrainerExit
from hone.spec import Columns, Dataset, Model
from hone.spec.methods import Sft
from hone_trainer.failure import RunFailed, first_line
from hone_trainer.files import Row
from hone_trainer.rows import Rows

FORMATS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""Columns that each format needs, in the order in which `auto` looks for them."""


class TemplateRefused(RunFailed):
    """The chat template does not take a conversation: a role that it does not know, or turns in another order."""

    def __init__(self, why: str, *, index: int = 0) -> None:
        """`index`: of the conversation, in the batch that was given."""
        self.why, self.index = why, index
        super().__init__(
            TrainerExit.DATA,
            f"The chat template does not take a conversation: {why}",
            fix="Correct the rows, or set model.chat_template to one that takes them.",
        )


@dataclass
class Encoded:
    """One row as tokens."""

    ids: list[int]
    learned: list[bool]


@dataclass(kw_only=True)
class Encoder:
    """Turns rows of one format into tokens."""

    tokenizer: Any
    format: str
    columns: Columns
    respond_only: bool
    system_prompt: str | None = None
    is_chat: bool = False
    """Whether rows hold messages; the first one says it for all."""
    template: str | None = None
    """The chat template that marks the answers; None where the tokenizer's own is used."""
    merged_boundaries: int = 0
    """Rows whose last prompt token merged with the completion's first."""
    _stops: frozenset[int] = field(default=frozenset())

    def __post_init__(self) -> None:
        self._stops = frozenset({self.tokenizer.eos_token_id})

    @property
    def eos(self) -> int:
        """The token that ends an answer."""
        return int(self.tokenizer.eos_token_id)

    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        """Tokens of a batch of rows that `problem` found nothing wrong with."""
        encoded = _ENCODERS[self.format](self, rows)
        return [self._trimmed(row) for row in encoded]

    def value(self, row: Row, name: str) -> Any:
        """A column by our name for it."""
        return row.get(getattr(self.columns, name))

    def prompt_ids(self, prompt: str) -> list[int]:
        """A prompt as generation sees it."""
        return prompt_ids(self.tokenizer, prompt)

    def conversation(self, row: Row) -> list[dict[str, Any]]:
        """The messages of a row, with the system prompt where the row has none."""
        return with_system(self.value(row, "messages"), self.system_prompt)

    def _text(self, rows: Sequence[Row]) -> list[Encoded]:
        ids = self.tokenizer([self.value(row, "text") for row in rows])["input_ids"]
        return [self._stopped(Encoded(tokens, [True] * len(tokens))) for tokens in ids]

    def _prompt_completion(self, rows: Sequence[Row]) -> list[Encoded]:
        if not isinstance(self.value(rows[0], "prompt"), str):
            return self._chat_completion(rows)
        prompts = [self.value(row, "prompt") for row in rows]
        texts = [prompt + self.value(row, "completion") for prompt, row in zip(prompts, rows, strict=True)]
        asked, whole = self.tokenizer(prompts)["input_ids"], self.tokenizer(texts)["input_ids"]
        return [self._answered(prompt, tokens) for prompt, tokens in zip(asked, whole, strict=True)]

    def _chat_completion(self, rows: Sequence[Row]) -> list[Encoded]:
        prompts = [with_system(self.value(row, "prompt"), self.system_prompt) for row in rows]
        whole = [[*prompt, *self.value(row, "completion")] for prompt, row in zip(prompts, rows, strict=True)]
        asked = self._render(prompts, add_generation_prompt=True)["input_ids"]
        given = self._render(whole)["input_ids"]
        return [self._answered(prompt, tokens) for prompt, tokens in zip(asked, given, strict=True)]

    def _messages(self, rows: Sequence[Row]) -> list[Encoded]:
        conversations = [self.conversation(row) for row in rows]
        if not self.respond_only:
            ids = self._render(conversations)["input_ids"]
            return [self._stopped(Encoded(tokens, [True] * len(tokens))) for tokens in ids]
        rendered = self._render(conversations, return_assistant_tokens_mask=True)
        pairs = zip(rendered["input_ids"], rendered["assistant_masks"], strict=True)
        return [self._stopped(Encoded(ids, [bool(bit) for bit in mask])) for ids, mask in pairs]

    def _render(self, conversations: Sequence[Any], **options: Any) -> Any:
        return render(self.tokenizer, conversations, chat_template=self.template, **options)

    def _answered(self, prompt: list[int], whole: list[int]) -> Encoded:
        """Learn what follows the prompt. Where a token spans the boundary it belongs to the completion, and is
        counted."""
        if prompt and prompt[-1] == self.eos:  # some tokenizers end every text
            prompt = prompt[:-1]
        start = 0
        for start, (left, right) in enumerate(zip(prompt, whole, strict=False)):  # noqa: B007
            if left != right:
                self.merged_boundaries += 1
                break
        else:
            start = len(prompt)
        learned = [not self.respond_only] * start + [True] * (len(whole) - start)
        return self._stopped(Encoded(whole, learned))

    def _stopped(self, row: Encoded) -> Encoded:
        """See to it that the last thing learned is the stop token."""
        last = _last(row.learned)
        if last is None:
            return row
        tail = next((i for i in range(last, max(last - 3, -1), -1) if row.ids[i] in self._stops), None)
        if tail is not None:  # white space after the stop token is not part of the answer
            row.learned[tail + 1 :] = [False] * (len(row.ids) - tail - 1)
            return row
        if last + 1 < len(row.ids) and row.ids[last + 1] in self._stops:
            return self._with_stops(row)
        self._refuse_other_stop(row, last)
        return Encoded([*row.ids[: last + 1], self.eos], [*row.learned[: last + 1], True])

    def _with_stops(self, row: Encoded) -> Encoded:
        """The template leaves the end of a turn out of its marks: learn it too, at every turn."""
        ends = [i for i in range(1, len(row.ids)) if row.learned[i - 1] and row.ids[i] in self._stops]
        for index in ends:
            row.learned[index] = True
        return row

    def _refuse_other_stop(self, row: Encoded, last: int) -> None:
        special = set(self.tokenizer.all_special_ids) - {self.tokenizer.bos_token_id}
        found = next((token for token in row.ids[last : last + 2] if token in special), None)
        if found is None or self.format == "text":
            return
        token, eos = self.tokenizer.convert_ids_to_tokens(found), self.tokenizer.eos_token
        raise RunFailed(
            TrainerExit.USER,
            f"The chat template ends a turn with {token!r}, but generation stops at {eos!r}: it would never stop.",
            fix=f"Set model.eos_token to {token!r}.",
        )

    def _trimmed(self, row: Encoded) -> Encoded:
        ids = with_one_bos(self.tokenizer, row.ids)
        return Encoded(ids, row.learned[len(row.ids) - len(ids) :])


_ENCODERS: dict[str, Callable[[Encoder, Sequence[Row]], list[Encoded]]] = {
    "messages": Encoder._messages,
    "prompt_completion": Encoder._prompt_completion,
    "text": Encoder._text,
}


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """A prompt as generation sees it: without the end that some tokenizers put after every text."""
    ids: list[int] = tokenizer(prompt)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def with_one_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    """Tokens with one beginning-of-sequence token at most: a template writes one, and so may the tokenizer."""
    bos, start = tokenizer.bos_token_id, 0
    while bos is not None and ids[start : start + 2] == [bos, bos]:
        start += 1
    return ids[start:]


def render(tokenizer: Any, conversations: Sequence[Any], **options: Any) -> Any:
    """A batch of conversations by the chat template. Raises TemplateRefused for the first that it does not take."""

    def rendered(wanted: Sequence[Any]) -> Any:
        return tokenizer.apply_chat_template(wanted, tokenize=True, return_dict=True, **options)

    try:
        return rendered(conversations)
    except Exception:  # a template may raise what it likes
        for index, conversation in enumerate(conversations):
            try:
                rendered([conversation])
            except Exception as error:
                raise TemplateRefused(first_line(error), index=index) from error
        raise


def asked_ids(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """A conversation as generation sees it: with the beginning of an answer. Raises TemplateRefused."""
    return with_one_bos(tokenizer, render(tokenizer, [messages], add_generation_prompt=True)["input_ids"][0])


def with_system(messages: Sequence[Mapping[str, Any]], system_prompt: str | None) -> list[dict[str, Any]]:
    """Messages with the system prompt in front, where there is one and they have none."""
    listed = [dict(message) for message in messages]
    if system_prompt is None or listed[0]["role"] == "system":
        return listed
    return [{"role": "system", "content": system_prompt}, *listed]


def refuse_system_prompt(model: Model, held: str) -> None:
    """Raise RunFailed where the request has a system prompt: rows that hold `held` have no place for it."""
    if model.system_prompt is not None:
        raise RunFailed(
            TrainerExit.USER,
            f"model.system_prompt needs conversations, and the rows hold {held}.",
            fix="Remove it, or use rows with messages.",
        )


def make_encoder(tokenizer: Any, model: Model, dataset: Dataset, sft: Sft, rows: Rows) -> Encoder:
    """The encoder that fits the rows. Raises RunFailed: no fitting columns, no usable template, an option without
    effect."""
    name = _format_of(dataset, rows)
    if sft.loss_on == "response" and name == "text":
        raise RunFailed(
            TrainerExit.USER,
            "method.sft.loss_on: response needs a response, and rows of plain text have none.",
            fix="Use loss_on: all, or rows with prompt and completion.",
        )
    respond_only = name != "text" and sft.loss_on != "all"
    encoder = Encoder(tokenizer=tokenizer, format=name, columns=dataset.columns, respond_only=respond_only)
    is_chat = name == "messages" or not isinstance(encoder.value(rows.first(), FORMATS[name][0]), str)
    if not is_chat:
        refuse_system_prompt(model, " and ".join(FORMATS[name]))
    encoder.system_prompt, encoder.is_chat = model.system_prompt, is_chat
    if is_chat:
        encoder.template = training_template(tokenizer, marked=respond_only and name == "messages")
    return encoder


def _format_of(dataset: Dataset, rows: Rows) -> str:
    there = list(rows.first())
    names = FORMATS if dataset.format == "auto" else {dataset.format: FORMATS[dataset.format]}
    for name, needed in names.items():
        if all(getattr(dataset.columns, column) in there for column in needed):
            return name
    wanted = " or ".join(
        " and ".join(getattr(dataset.columns, column) for column in needed) for needed in names.values()
    )
    raise RunFailed(
        TrainerExit.DATA,
        f"The data set {rows.source} has the columns {', '.join(there)}; {wanted} is needed.",
        fix="Name its columns under dataset.columns.",
    )


def training_template(tokenizer: Any, *, marked: bool) -> str | None:
    """What renders conversations, None where it is the tokenizer's own template; `marked` needs the answers marked."""
    if not tokenizer.chat_template:
        raise RunFailed(
            TrainerExit.USER,
            "The rows are conversations, and the tokenizer has no chat template.",
            fix="Set model.chat_template.",
        )
    if not marked:
        return None
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if has_generation_markers(tokenizer.chat_template):
        return None
    try:
        template: str | None = get_training_chat_template(tokenizer)
    except ValueError as error:
        raise RunFailed(
            TrainerExit.USER,
            "The chat template does not say which tokens are the assistant's, so the loss cannot be on the "
            "response only.",
            fix="Set model.chat_template with assistant turns between {% generation %} and {% endgeneration %}, or "
            "method.sft.loss_on to all.",
        ) from error
    return template


def problem(encoder: Encoder, row: Row) -> str | None:
    """What is wrong with a row; None when it can be encoded."""
    for name in FORMATS[encoder.format]:
        column = getattr(encoder.columns, name)
        if column not in row:
            return f"has no column {column}, only {', '.join(row)}"
        value = row[column]
        if name == "prompt" and isinstance(value, list | str) and isinstance(value, list) != encoder.is_chat:
            return f"{column} holds {'messages' if isinstance(value, list) else 'a text'}, unlike the first row"
        if name == "messages" or (isinstance(value, list) and name != "text"):
            if found := conversation_problem(value, column, needs_answer=name == "messages" and encoder.respond_only):
                return found
        elif not isinstance(value, str):
            return f"{column} is {kind_of(value)} where a text is expected"
        elif not value.strip():
            return f"{column} is empty"
    kinds = {type(encoder.value(row, name)) for name in FORMATS[encoder.format]}
    return "prompt and completion are not both texts, or both messages" if len(kinds) > 1 else None


def conversation_problem(messages: Any, column: str, *, needs_answer: bool) -> str | None:
    """What is wrong with a list of messages."""
    if not isinstance(messages, list) or not messages:
        return f"{column} is {kind_of(messages)} where a list of messages is expected"
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            keys = ", ".join(message) if isinstance(message, dict) else kind_of(message)
            return f"message {number} of {column} has no role and content, but {keys}"
        content, is_call = message.get("content"), bool(message.get("tool_calls"))
        if not is_call and (not isinstance(content, str) or (not content.strip() and message["role"] != "system")):
            return f"message {number} of {column} ({message['role']}) has no text"
    if needs_answer and not any(message["role"] == "assistant" for message in messages):
        return f"{column} has no assistant turn to learn"
    return None


def kind_of(value: Any) -> str:
    """What a value is, for a message."""
    if value is None:
        return "absent"
    return f"empty ({type(value).__name__})" if value in ([], {}) else f"of type {type(value).__name__}"


def _last(mask: Sequence[bool]) -> int | None:
    return next((index for index in range(len(mask) - 1, -1, -1) if mask[index]), None)
