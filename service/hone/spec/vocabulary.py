"""Rules of the tokens that a request adds (model.new_tokens). Called by combinations.py."""

from collections.abc import Iterator

from hone.errors import Violation
from hone.spec import JobSpec

_WHOLE = ("embed_tokens", "wte", "word_embeddings", "embed_in", "lm_head", "embed_out")
"""Names of embeddings and heads, which modules_to_save would train whole."""


def vocabulary_violations(spec: JobSpec) -> Iterator[Violation]:
    """What is no token, and what would train it otherwise."""
    path, tokens = "model.new_tokens", spec.model.new_tokens
    if not tokens:
        return
    if spec.method.merge:
        yield Violation(path=path, value=list(tokens), message="merge trains nothing: remove it.")
    for number, token in enumerate(tokens):  # which is not repeated: it may be a secret
        if not token or token != token.strip():
            yield Violation(path=f"{path}.{number}", message="is empty or has white space around it: write it without.")
        if token in tokens[:number]:
            yield Violation(path=f"{path}.{number}", message="is named before: name each once.")
    for name in spec.adapter.lora.modules_to_save if spec.adapter else ():
        if name in _WHOLE:
            message = f"trains rows of what adapter.lora.modules_to_save trains whole ({name}): remove one of them."
            yield Violation(path=path, value=list(tokens), message=message)
