"""The Hugging Face Hub as the place where outputs go: adapter, merged model or model, with tokenizer and card.

    pushed = push(directory, files, Target(repo="my-org/name"), token=token, message="…")

Used by the trainer's supervisor after its outputs are safe in the store, and by `hone push` on a person's machine.
huggingface_hub is imported when something is pushed and not before: the service runs without it.
"""

from hone.hub.push import Pushed, Target, look, push, saved_token

__all__ = ["Pushed", "Target", "look", "push", "saved_token"]
