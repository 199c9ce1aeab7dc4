"""Repositories of the Hugging Face hub, spoken to through huggingface_hub alone: what they hold, and copies of it here.

An id that is not reached is said at once: one short question tells whether there is a connection, before any library tries
again and again.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from simmim.messages import first_line, name_some

PREFIX = "hf:"  # of an id where a path is expected: "hf:owner/name" or "hf:owner/name@revision"
TIMEOUT_S = 5.0  # of the question; downloads take as long as they take
OFFLINE = "the hub cannot be reached"


def look_up(repo: str, kind: str = "model", revision: str | None = None) -> Any | None:
    """What the hub says of a repository; None where it cannot be reached.

    Args:
        repo: owner/name.
        kind: model or dataset.
        revision: branch, tag or commit.

    Raises:
        ValueError: when there is no such repository, or it is not for this user.
    """
    import huggingface_hub
    from huggingface_hub import errors

    api = huggingface_hub.HfApi()
    question = api.model_info if kind == "model" else api.dataset_info
    try:
        return question(repo, revision=revision, timeout=TIMEOUT_S)
    except errors.HFValidationError as error:
        raise ValueError(f"{repo!r} is no id of the hub: expected owner/name") from error
    except errors.GatedRepoError as error:
        raise ValueError(f"{repo} is gated: accept its terms on huggingface.co, then hf auth login") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(f"the hub has no {kind} {repo!r}, or it is private: check the name, or hf auth login") from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{repo} has no revision {revision!r}") from error
    except Exception:  # no connection, as the libraries below it name it; a proxy that refuses; offline mode
        return None


def split_id(text: str) -> tuple[str, str | None]:
    """Repository and revision of "hf:owner/name@revision".

    Raises:
        ValueError: when it is no id.
    """
    repo, _, revision = text.removeprefix(PREFIX).partition("@")
    parts = repo.split("/")
    if len(parts) != 2 or not all(parts):
        raise ValueError(f"{text!r} is no id of the hub: expected hf:owner/name, with @revision for another than main")
    return repo, revision or None


def fetch(text: str, wanted: Sequence[str], weights: Sequence[Sequence[str]]) -> Path:
    """The folder of a model of the hub in the cache of huggingface_hub, fetched on the first call and never asked for again.

    Args:
        text: the id, as of `split_id`.
        wanted: patterns of files to have beside the weights.
        weights: patterns of weight files, alternatives in the order of preference. The first that the repository has is
            fetched, so that nothing else is, however much lies there.

    Raises:
        ValueError: when the id is none, there is no such repository, it has none of these weights, or it is not in the cache
            and the hub cannot be reached.
    """
    import huggingface_hub

    repo, revision = split_id(text)
    folder = cached(repo, revision, weights)
    if folder is not None:
        return folder
    info = look_up(repo, revision=revision)
    if info is None:
        raise ValueError(f"{text} is not in the cache of this machine, and {OFFLINE}: give a local folder, or connect")
    files = sorted(file.rfilename for file in info.siblings or ())
    chosen = next((list(patterns) for patterns in weights if any(fnmatch.filter(files, patterns[0]))), None)
    if chosen is None:
        raise ValueError(
            f"{text} holds no safetensors of a format that is read ({name_some(files, 5)}): nothing pickled is fetched"
        )
    try:
        path = huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=[*wanted, *chosen])
    except Exception as error:
        raise ValueError(f"{text} cannot be fetched ({first_line(error)}): try again, or give a local folder") from error
    return Path(path)


def cached(repo: str, revision: str | None, weights: Sequence[Sequence[str]]) -> Path | None:
    """The folder in the cache, where weights are complete there."""
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True))
    except Exception:  # not in the cache
        return None
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    for patterns in weights:
        if all(fnmatch.filter(files, pattern) for pattern in patterns):
            return folder
    return None


def check_push(repo: str, license: str | None) -> None:
    """Check that a folder can be pushed, before it is made.

    Args:
        license: of the model, as the hub names licenses; None or "unknown" where nobody has said it.

    Raises:
        ValueError: for an id that is none, without a license, and without a login.
    """
    import huggingface_hub

    split_id(repo)
    if license in (None, "unknown"):
        raise ValueError(f"{repo} needs a license in its card, which is not guessed: give license, cc-by-4.0 for instance")
    if not huggingface_hub.get_token():
        raise ValueError(f"{repo} cannot be written without a login: hf auth login, then push_to_hub again")


def push(folder: Path, repo: str) -> str:
    """Push a folder's files to a repository, made private where it does not exist, and return its address.

    Raises:
        ValueError: when the hub cannot be reached or does not accept them.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message="Exported by simmim")
    except Exception as error:
        raise ValueError(
            f"{folder} is exported, but {repo} does not take it ({first_line(error)}): push it again"
        ) from error
    return str(address)


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """A context in which the libraries of the hub look into their caches alone, and do not wait for a connection."""
    import datasets
    from huggingface_hub import constants

    settings = ((constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE"))
    before = [getattr(module, name) for module, name in settings]
    try:
        for module, name in settings:
            setattr(module, name, True)
        yield
    finally:
        for (module, name), value in zip(settings, before):
            setattr(module, name, value)
