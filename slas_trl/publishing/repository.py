"""
Files of a run on the Hub. A repository holds at its root what plain diffusers loads, the card and its pictures;
what a training needs to go on is in folders, `last-checkpoint` or `checkpoint-20`. Whatever else is there stays.
"""

import json
import os
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from transformers.utils import logging

from ..run_files import CALIBRATION, CARD, CURVES, FACTS, SAMPLES, TRAINER_STATE, adapter_file
from .card import render
from .facts import Base, Place, RunFacts


logger = logging.get_logger(__name__)

LAST_CHECKPOINT = "last-checkpoint"  # transformers' name
CHECKPOINT_STRATEGIES = ("checkpoint", ALL_CHECKPOINTS := "all_checkpoints")
OLD_PICTURES = (
    rf"{SAMPLES}/(\d+_(before|after|input(_\d+)*)|comparison)\.(png|jpg)|{re.escape(CURVES)}|{re.escape(CALIBRATION)}"
)
OLD_CHECKPOINT = rf"{LAST_CHECKPOINT}/.*"
# What goes wrong with a network, a server or a file. Errors of an LFS upload come as RuntimeError.
FAILURES = (HfHubHTTPError, httpx2.HTTPError, OSError, RuntimeError)

Files = dict[str, Path | bytes]  # by their paths in the repository


class PushError(OSError):
    """Nothing was pushed."""


@dataclass
class Push:
    """One commit. Repository, a `private` one, and branch are made if they are not there."""

    repo_id: str  # "user/name", or "name" for a repository of the token's owner
    files: Files  # without the card
    message: str  # of the commit
    run_dir: Path  # the run's folder, for the command that pushes it later
    strategy: str = "end"  # or one of `CHECKPOINT_STRATEGIES`, for the same
    revision: str | None = None
    private: bool | None = None
    token: str | None = None  # by default the one of `hf auth login` or the environment
    replaces: str | None = None  # pattern of files that are deleted unless they are among `files`
    card: str | None = None  # instead of the one that is rendered from the facts

    @property
    def command(self) -> str:
        words = ["slas-trl", "push", str(self.run_dir), self.repo_id]
        words += ["--private"] if self.private else []
        words += ["--revision", self.revision] if self.revision else []
        return shlex.join(words + (["--hub_strategy", self.strategy] if self.strategy != "end" else []))


def publish(facts: RunFacts, push: Push) -> CommitInfo:
    """
    Push files with their card, in one commit, so that weights, card and checkpoint are always of the same update.
    `push.repo_id` and `facts.place` have the repository's whole name afterwards. Raises [`PushError`], which says why
    nothing was pushed, and how to push it later.
    """
    try:
        push.repo_id = create_repository(push.repo_id, push.private, push.token)
        find_license(facts.base, push.token)
        facts.keep_pictures(push.files)
        facts.place = Place(push.repo_id, push.revision, on_hub=True)
        files: Files = {**push.files, CARD: (push.card or render(facts)).encode()}
        api = HfApi(token=push.token)
        if push.revision is not None:
            api.create_branch(push.repo_id, branch=push.revision, exist_ok=True)
        there = api.list_repo_files(push.repo_id, revision=push.revision) if push.replaces else []
        stale = [name for name in there if name not in files and re.fullmatch(push.replaces or "", name)]
        operations = [CommitOperationAdd(name, file) for name, file in sorted(files.items())]
        operations += [CommitOperationDelete(name) for name in stale]
        return api.create_commit(push.repo_id, operations, commit_message=push.message, revision=push.revision)
    except Exception as error:  # a malformed response comes as a KeyError, for one
        raise PushError(
            f"Nothing was pushed to {push.repo_id!r}: {reason(error)}. Push it later with\n    {push.command}"
        ) from error


def create_repository(repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Make the repository, if need be, and return its whole id. Raises `ValueError` if it should not be public."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and api.model_info(repo_id).private is False:
        raise ValueError("it is there already, and public; make it private on its page, or choose another name")
    return repo_id


def check_token(token: str | None = None) -> None:
    """Raise `ValueError` for a token that may only read: to know it before a run, not after."""
    account = HfApi(token=token).whoami()
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError("the token may only read; make one that may write, at https://huggingface.co/settings/tokens")


def find_license(base: Base, token: str | None = None) -> None:
    """Fill in the license that the base model's own card names, if the Hub can be asked."""
    if base.hub_id is None or base.license is not None:
        return
    try:
        card = HfApi(token=token).model_info(base.hub_id, timeout=10).card_data or {}
    except Exception as error:  # whatever it is, it is no reason not to push
        logger.info(f"The license of {base.hub_id} is not known: {reason(error)}.")
        return
    for name in ("license", "license_name", "license_link"):
        setattr(base, name, value if isinstance(value := card.get(name), str) else None)


def is_refusal(error: BaseException) -> bool:
    """Whether the Hub refused, or the name cannot be one, so that a retry cannot help."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (400, 401, 403)
    return type(error) in (ValueError, HFValidationError)  # malformed responses are subclasses


def reason(error: BaseException) -> str:
    """Why nothing came of a request, in a few words."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # huggingface_hub's around an LFS upload
        return reason(error.__cause__)
    if not isinstance(error, HfHubHTTPError):
        return str(error).strip().rstrip(".") or type(error).__name__
    status = error.response.status_code
    login = "; see `hf auth login`, or HF_TOKEN" if status in (401, 403) else ""
    message = (error.server_message or str(error)).strip().splitlines()[0].rstrip(".")
    return f"the Hub answered {status}, {message!r}{login}"


def result_files(folder: Path, facts: RunFacts, pictures_in: Path) -> Files:
    """The weights in `folder`, and the pictures that the card shows. Raises `FileNotFoundError` without weights."""
    names = list(facts.denoisers)
    expected = [adapter_file(name, names) if facts.adapter else f"{name}/config.json" for name in names]
    kinds = ("*.safetensors", "config.json", "*.index.json")
    whole = [path for name in names for kind in kinds for path in (folder / name).glob(kind)]
    paths = [folder / name for name in expected] if facts.adapter else whole
    for name in expected:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"There are no trained weights in {str(folder)!r}: {name} is not there.")
    pictures = {name: pictures_in / name for name in facts.pictures if (pictures_in / name).is_file()}
    return {**{path.relative_to(folder).as_posix(): path for path in paths}, **pictures}


def checkpoint_files(checkpoint: Path, strategy: str) -> Files:
    """All of a checkpoint, in its folder of the repository; its state without the paths of this machine."""
    folder = checkpoint.resolve().name if strategy == ALL_CHECKPOINTS else LAST_CHECKPOINT
    left_out = ("training_args.bin", FACTS)  # a pickle, with the token in it; and what the card at the root says
    paths = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name not in left_out]
    files: Files = {f"{folder}/{path.relative_to(checkpoint).as_posix()}": path for path in paths}
    state = json.loads((checkpoint / TRAINER_STATE).read_text())
    if state.get("best_model_checkpoint"):
        state["best_model_checkpoint"] = Path(state["best_model_checkpoint"]).name
    files[f"{folder}/{TRAINER_STATE}"] = json.dumps(state, indent=2).encode()
    return files


def keep(files: Mapping[str, Path | bytes], folder: Path) -> Files:
    """Links or copies under `folder`: what is uploaded must not change, or be removed with its checkpoint."""
    kept = dict(files)
    for name, file in files.items():
        if isinstance(file, Path):
            kept[name] = place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, place)
            except OSError:  # another disk, or one without links
                shutil.copy(file, place)
    return kept
