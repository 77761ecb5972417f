"""One push of one output: look at what is there, send what is not, in one commit, and look again.

A file that is there already, by digest, is not sent again; when all of them are, there is no commit: repeating a push
does no harm, and a push whose answer was lost is repeated. Tried again is what passes by itself, by type.

Refused, because it could not be undone or would mislead: a repository that is public where a private one is asked for,
one that holds other weights beside which loaders would not find these, and the name of a data set or a space.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from hone.errors import PermanentError, Refused, TemporaryError, Unauthenticated, UserError
from hone.hub.answers import TOKEN_FIX, push_error, status
from hone.modelinfo import ADAPTER_IDENTITY
from hone.storage import ManifestFile

if TYPE_CHECKING:
    from collections.abc import Iterator

    from huggingface_hub import HfApi

MAIN = "main"
TRIES = 6
LONGEST_PAUSE_S = 30.0
INSTALL = "pip install 'huggingface_hub>=1,<3'"
_WEIGHTS = re.compile(
    r"((pytorch_)?model|adapter_model)[\w.-]*\.(safetensors|bin)(\.index\.json)?|adapter_config\.json"
)
"""Names by which loaders find weights."""

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a push goes."""

    repo: str
    """`organisation/name`."""
    branch: str = MAIN
    """Made from main where it is not there."""
    private: bool = True
    """How the repository is made; one that is public already is refused where this is true."""


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What is on the Hub now."""

    repo: str
    branch: str
    private: bool
    """As the repository is, which may be more private than it was asked for."""
    url: str
    commit: str
    sent: tuple[str, ...]
    """Files of this commit; none where all was there."""


def push(
    directory: Path,
    files: Sequence[ManifestFile],
    target: Target,
    *,
    token: str,
    message: str,
    tell: Tell = lambda _: None,
    shows_bars: bool = False,
) -> Pushed:
    """Have these files of a directory in the repository; `tell` hears one line for each that is sent.

    `files` are as the manifest lists them. Raises Unauthenticated, Refused, UserError, TemporaryError after several
    tries, and PermanentError for what nobody foresaw.
    """
    api = _api(token, shows_bars=shows_bars)
    own = [_File.of(directory, file) for file in files]
    retrying = Retrying(
        retry=retry_if_exception_type(TemporaryError),
        stop=stop_after_attempt(TRIES),
        wait=wait_random_exponential(multiplier=1, max=LONGEST_PAUSE_S),
        before_sleep=lambda state: tell(f"{_error_of(state)} It is tried again."),
        reraise=True,
    )
    for attempt in retrying:
        with attempt, _typed_errors(target.repo):
            pushed = _Push(api, target, own, tell).make(message)
    return pushed


def look(target: Target, *, token: str) -> str:
    """Whether a push there may go well, as one sentence; changes nothing. Raises as `push`, without another try."""
    api = _api(token, shows_bars=False)
    with _typed_errors(target.repo):
        return _Push(api, target, (), lambda _: None).look()


def saved_token() -> str:
    """The person's own token: HF_TOKEN, else what `hf auth login` saved; empty where there is none."""
    return _library().get_token() or ""


@dataclass(frozen=True, kw_only=True)
class _File:
    """One file as it is pushed."""

    path: str
    size: int
    sha256: str
    source: Path
    data: bytes | None = None
    """What is pushed in the place of the file's own bytes."""

    @staticmethod
    def of(directory: Path, file: ManifestFile) -> "_File":
        """A file of a manifest; where an adapter's base was a path of one machine, nobody else is told of it."""
        source = directory / file.path
        data = _without_path(source.read_bytes()) if file.path == ADAPTER_IDENTITY else None
        if data is None:
            return _File(path=file.path, size=file.size, sha256=file.sha256, source=source)
        digest = hashlib.sha256(data).hexdigest()
        return _File(path=file.path, size=len(data), sha256=digest, source=source, data=data)

    def is_there(self, found: Any) -> bool:
        """Whether that file of the repository has these bytes: by sha256, or for small ones by git's own digest."""
        if found is None or found.size != self.size:
            return False
        if found.lfs:
            return bool(found.lfs.sha256 == self.sha256)
        data = self.source.read_bytes() if self.data is None else self.data
        return bool(found.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest())


class _Push:
    """One try."""

    def __init__(self, api: "HfApi", target: Target, files: Sequence[_File], tell: Tell) -> None:
        self._api, self._target, self._files, self._tell = api, target, files, tell

    def look(self) -> str:
        """Whose token it is, and what is there."""
        who = self._api.whoami()
        repo, kind = self._target.repo, who.get("auth", {}).get("accessToken", {}).get("role")
        if kind == "read":
            raise Refused("The token for the Hub may only read.", fix=TOKEN_FIX)
        info = self._repository()
        there = "will be made" if info is None else f"is there, {'private' if info.private else 'public'}"
        return f"The token of {who['name']} is valid; {repo} {there}."

    def make(self, message: str) -> Pushed:
        """Look, send, look again."""
        private = self._open_repository()
        there = self._tree()
        self._refuse_other_weights(there)
        missing = self._missing(there)
        if missing:
            self._send(missing, message)
            if left := self._missing(self._tree()):
                ignored = "a .gitignore of the repository may name it"
                raise PermanentError(f"The Hub took the commit without {left[0].path}: {ignored}.")
        repo, branch = self._target.repo, self._target.branch
        return Pushed(
            repo=repo,
            branch=branch,
            private=private,
            url=f"{self._api.endpoint}/{repo}" + (f"/tree/{quote(branch)}" if branch != MAIN else ""),
            commit=str(self._api.repo_info(repo, revision=branch).sha),
            sent=tuple(file.path for file in missing),
        )

    def _open_repository(self) -> bool:
        """Find the repository or make it; whether it is private."""
        target = self._target
        info = self._repository()
        if info is None:
            self._create()
            return target.private
        if info.private and not target.private:
            self._tell(f"{target.repo} is private and stays so; its settings on the Hub change that.")
        return bool(info.private)

    def _repository(self) -> Any:
        """What is there under that name; None where nothing is. Refuses what would not take this push."""
        target = self._target
        info = self._info("model")
        if info is None:
            for kind in ("dataset", "space"):
                if self._info(kind) is not None:
                    fix = "Name another repository."
                    raise UserError(f"{target.repo} is the name of a {kind} on the Hub, not of a model.", fix=fix)
        elif target.private and info.private is False:
            raise Refused(
                f"{target.repo} is public on the Hub, and this push is to be private.",
                fix="Name another repository, make that one private, or ask for a public push (--public, or "
                "output.hub.private: false).",
            )
        return info

    def _info(self, kind: str) -> Any:
        try:
            return self._api.repo_info(self._target.repo, repo_type=kind)
        except Exception as error:
            if status(error) == 404:
                return None
            raise

    def _create(self) -> None:
        try:
            self._api.create_repo(self._target.repo, private=self._target.private)
        except Exception as error:
            if status(error) == 409:
                message = f"{self._target.repo} is on the Hub already, and the token may not see it."
                raise Refused(message, fix=TOKEN_FIX) from error
            raise
        self._tell(f"made {self._target.repo}, {'private' if self._target.private else 'public'}")

    def _tree(self) -> Mapping[str, Any]:
        """Files of the branch by path; the branch is made where it is not there."""
        try:
            return self._list()
        except Exception as error:
            if status(error) != 404 or self._target.branch == MAIN:
                raise
        self._api.create_branch(self._target.repo, branch=self._target.branch, exist_ok=True)
        self._tell(f"made branch {self._target.branch}")
        return self._list()

    def _list(self) -> Mapping[str, Any]:
        found = self._api.list_repo_tree(self._target.repo, recursive=True, revision=self._target.branch)
        return {file.path: file for file in found if hasattr(file, "blob_id")}

    def _missing(self, there: Mapping[str, Any]) -> list[_File]:
        return [file for file in self._files if not file.is_there(there.get(file.path))]

    def _refuse_other_weights(self, there: Iterable[str]) -> None:
        own = {file.path for file in self._files}
        others = [path for path in there if _WEIGHTS.fullmatch(path) and path not in own]
        if others:
            raise UserError(
                f"{self._target.repo} holds other weights ({', '.join(sorted(others)[:3])}), and both together would "
                "be loaded as neither.",
                fix="Name another repository, or remove them there first.",
            )

    def _send(self, missing: Sequence[_File], message: str) -> None:
        from huggingface_hub import CommitOperationAdd

        repo, branch = self._target.repo, self._target.branch
        operations = []
        for number, file in enumerate(missing, start=1):
            self._tell(f"sending {file.path}, {file.size:,} bytes ({number} of {len(missing)})")
            content = str(file.source) if file.data is None else file.data
            operations.append(CommitOperationAdd(path_in_repo=file.path, path_or_fileobj=content))
            self._api.preupload_lfs_files(repo, operations[-1:], revision=branch)  # small ones go with the commit
        self._api.create_commit(repo, operations, commit_message=message, revision=branch)


def _without_path(data: bytes) -> bytes | None:
    """An adapter's identity with the bare name of a local base; None where it names none."""
    identity = json.loads(data)
    if not str(identity.get("source", "")).startswith("file://"):
        return None
    return json.dumps({**identity, "source": Path(identity["source"].rstrip("/")).name}, indent=2).encode()


def _api(token: str, *, shows_bars: bool) -> "HfApi":
    token = token.strip()  # Secrets are often made with a line break at their end
    if not token:
        raise Unauthenticated("There is no token for the Hub: HF_TOKEN is not set.", fix=TOKEN_FIX)
    if not re.fullmatch(r"[!-~]+", token):  # the library's error would repeat it
        raise Unauthenticated("The token for the Hub holds blanks, or letters that no token has.", fix=TOKEN_FIX)
    library = _library()
    if not shows_bars:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    api: HfApi = library.HfApi(token=token)
    return api


def _library() -> Any:
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # read when it is imported
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError("A push needs huggingface_hub, which is not installed here.", fix=f"{INSTALL}.") from error
    return huggingface_hub


def _error_of(state: RetryCallState) -> str:
    error = state.outcome.exception() if state.outcome else None
    return getattr(error, "message", "")


@contextmanager
def _typed_errors(repo: str) -> "Iterator[None]":
    """The library's errors leave as those of hone.errors."""
    try:
        yield
    except Exception as error:
        raise push_error(error, repo=repo) from error
