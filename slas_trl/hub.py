"""
What of a run goes to the Hub, and what comes from there.

A repository holds at its root what plain diffusers loads, the card and its pictures, and nothing else; what a training
needs to go on is in folders, `last-checkpoint` or `checkpoint-20`. Files are listed by name: whatever else is in a
run's folder stays there.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HfUriError,
    HFValidationError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from transformers.utils import logging

from .markdown import as_python
from .model_card import CARD_FILE, file_lines, render
from .quick_start import DOWNLOADS, FROM_HERE, LOADS_IMAGES, adapter_file
from .run_facts import FACTS_FILE, Base, RunFacts


logger = logging.get_logger(__name__)

LAST_CHECKPOINT = "last-checkpoint"  # transformers' name
CHECKPOINT_STRATEGIES = ("checkpoint", ALL_CHECKPOINTS := "all_checkpoints")
PICTURES = "samples"  # folder of those in the gallery
PLOTS = {
    "training.png": "curves of the training",
    "calibration.png": "which groups of images decided the updates, and what held-out rewards say",
}
OLD_PICTURES = rf"{PICTURES}/(\d+_(before|after|input(_\d+)*)|comparison)\.(png|jpg)|training\.png|calibration\.png"
OLD_CHECKPOINT = rf"{LAST_CHECKPOINT}/.*"
# The card as somebody has edited it, given a repository, its branch, and what is in it: path, and what it is.
EditedCard = Callable[[str, str | None, Sequence[tuple[str, str]]], str]
# What goes wrong with a network, a server or a file. Errors of an LFS upload come as RuntimeError.
FAILURES = (HfHubHTTPError, httpx2.HTTPError, OSError, RuntimeError)


@dataclass
class Push:
    """
    One commit.

    Attributes:
        repo_id (`str`): `"user/name"`, or `"name"` for a repository of the token's owner.
        files (`dict[str, Path | bytes]`): by their paths in the repository.
        message (`str`): of the commit.
        run_dir (`Path`): the run's folder, for the command that does it later.
        strategy (`str`): `"end"`, or one of `CHECKPOINT_STRATEGIES`, for the same.
        revision (`str`, *optional*): branch, which is made if it is not there; the main one by default.
        private (`bool`, *optional*): for a repository that is made.
        token (`str`, *optional*): by default the one of `hf auth login` or the environment.
        replaces (`str`, *optional*): pattern of files of which none stays that is not in `files`.
    """

    repo_id: str
    files: dict[str, Path | bytes]
    message: str
    run_dir: Path
    strategy: str = "end"
    revision: str | None = None
    private: bool | None = None
    token: str | None = None
    replaces: str | None = None


def create_repository(repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """
    Make the repository, if it is not there, and return its whole id. Raises `ValueError` where it is to be a private
    one, and is there as a public one.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and api.model_info(repo_id).private is False:
        raise ValueError("it is there already, and public; make it private on its page, or choose another name")
    return repo_id


def publish(facts: RunFacts, push: Push, card: EditedCard | None = None) -> CommitInfo:
    """
    Push files with their model card, in one commit, so that weights, card and checkpoint are always of the same
    update. Nothing new is no commit. The repository is made if it is not there; `push.repo_id` has its whole name
    afterwards, and `facts` the license of the base model.

    Args:
        facts ([`RunFacts`]): for the card.
        push ([`Push`]): what, and where to.
        card (`EditedCard`, *optional*): makes the card, where it is not to be written from `facts`.

    Raises:
        [`PushError`]: when nothing was pushed; the message says why, and how to do it later.
    """
    try:
        push.repo_id = create_repository(push.repo_id, push.private, push.token)
        license_of(facts.base, push.token)
        facts.base.folder = None  # there is no such folder where the card is read
        facts.keep_pictures(push.files)
        stays, stale = _there(push)
        files = describe({*stays, *push.files}, facts)
        if card is None:
            text = render(facts, push.repo_id, push.revision, files, on_hub=True)
        else:
            text = card(push.repo_id, push.revision, files)
        push.files[CARD_FILE] = text.encode()
        return _commit(push, stale)
    except HFValidationError as error:
        raise PushError(
            f"Nothing was pushed: {reason(error)}. Give the repository another name; {str(push.run_dir)!r} has all "
            "that was to be pushed."
        ) from error
    except Exception as error:  # what is no answer of the Hub comes as a KeyError, for one
        login = "" if push.token is None else ", with HF_TOKEN set to the same token,"
        raise PushError(
            f"Nothing was pushed to {push.repo_id!r}: {reason(error)}. Not pushed: "
            f"{_listed({CARD_FILE, *push.files})}. All of it is in {str(push.run_dir)!r}; push it later{login} with\n"
            f"    {command(push)}"
        ) from error


class PushError(OSError):
    """Nothing was pushed."""


def command(push: Push) -> str:
    """What to type, to do it later."""
    words = ["slas-trl", "push", str(push.run_dir), push.repo_id]
    words += ["--private"] if push.private else []
    words += ["--revision", push.revision] if push.revision else []
    words += ["--hub_strategy", push.strategy] if push.strategy != "end" else []
    return shlex.join(words)


def _listed(files: Iterable[str]) -> str:
    names = list(dict.fromkeys(name.split("/")[0] + "/" * ("/" in name) for name in sorted(files)))
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _commit(push: Push, stale: list[str]) -> CommitInfo:
    api = HfApi(token=push.token)

    def try_once() -> CommitInfo:
        # Made anew for a second try: they remember what has been uploaded.
        operations = [CommitOperationAdd(name, file) for name, file in sorted(push.files.items())]
        deleted = [CommitOperationDelete(name) for name in stale]
        return api.create_commit(
            push.repo_id, [*operations, *deleted], commit_message=push.message, revision=push.revision
        )

    def commit() -> CommitInfo:
        # A thread of huggingface_hub that meets a broken connection closes that of the others, which then give up.
        for pause in (1, 8):
            try:
                return try_once()
            except RuntimeError as error:
                if "client has been closed" not in f"{error} {error.__cause__}":
                    raise
                time.sleep(pause)
        return try_once()

    try:
        return commit()
    except RevisionNotFoundError:
        if push.revision is None:
            raise
        api.create_branch(push.repo_id, branch=push.revision, exist_ok=True)
        stale = [name for name in stale if name in api.list_repo_files(push.repo_id, revision=push.revision)]
        return commit()


def _there(push: Push) -> tuple[list[str], list[str]]:
    """Files that are in the repository and stay there, and those that do not."""
    try:
        names = HfApi(token=push.token).list_repo_files(push.repo_id, revision=push.revision)
    except RevisionNotFoundError:  # a branch that is about to be made, as a copy of the main one
        names = HfApi(token=push.token).list_repo_files(push.repo_id)
    replaced = push.replaces and re.compile(push.replaces)
    stale = [name for name in names if replaced and replaced.fullmatch(name) and name not in push.files]
    return [name for name in names if name not in stale and name != ".gitattributes"], stale


def check_token(token: str | None = None) -> None:
    """Raise `ValueError` for a token that may only read: to know it before a run, not after."""
    account = HfApi(token=token).whoami()
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError("the token may only read; make one that may write, at https://huggingface.co/settings/tokens")


def local_name(folder: Path) -> str:
    """A folder for the card of a run that is not on the Hub: as seen from here, without the path to here."""
    here, there = Path.cwd(), folder.resolve()
    return there.relative_to(here).as_posix() if there.is_relative_to(here) else "."


def reason(error: BaseException) -> str:
    """Why nothing came of a push, in a sentence for its user."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so that the Hub is not asked"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        message = (error.server_message or str(error)).strip().splitlines()[0].rstrip(".")
        if status in (401, 403):
            return (
                f"the Hub refused ({status}, {message!r}); if it is for the token, log in with `hf auth login`, or "
                "set HF_TOKEN, with one that may do this"
            )
        return f"the Hub answered {status}: {message}"
    if isinstance(error, httpx2.HTTPError | ConnectionError):
        return f"the Hub could not be reached ({str(error).strip() or type(error).__name__})"
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # huggingface_hub's around an LFS upload
        return f"{str(error).rstrip('.')}: {reason(error.__cause__)}"
    if isinstance(error, json.JSONDecodeError | UnicodeError | LookupError | TypeError):
        return f"the answer was not one of the Hub ({type(error).__name__}: {error})"
    return str(error).strip().rstrip(".") or type(error).__name__


def is_refusal(error: BaseException) -> bool:
    """Whether the Hub was there, and will not have it: a later try would end alike."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (400, 401, 403)
    return isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError | UnicodeError | HfUriError)


class Uploads:
    """Pushes in the background, one after the other. None of them ends a run: what failed is told, and kept."""

    def __init__(self):
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="push")
        self._last: Future[CommitInfo] | None = None

    @property
    def busy(self) -> bool:
        """Whether one is under way."""
        return self._last is not None and not self._last.done()

    def start(
        self, job: Callable[[], CommitInfo], note: Callable[["Future[CommitInfo]"], None]
    ) -> "Future[CommitInfo]":
        """Run `job` when those before it are done, and `note` before those after it are."""
        self._last = self._executor.submit(job)
        self._last.add_done_callback(note)
        return self._last

    def wait(self, seconds: float) -> bool:
        """Until none is under way, or for so long; whether none is."""
        if self._last is None:
            return True
        after = self._executor.submit(lambda: True)  # the last one, and its note
        try:
            return after.result(seconds)
        except TimeoutError:
            after.cancel()
            return False


# What is pushed


def weight_files(folder: Path, facts: RunFacts) -> dict[str, Path]:
    """
    The files at a repository's root that diffusers loads.

    Raises:
        `FileNotFoundError`: when they are not in `folder`.
    """
    if facts.adapter:
        files = {name: folder / name for name in _adapters(facts)}
        expected = list(files)
    else:
        paths = [path for name in facts.denoisers for path in sorted((folder / name).glob("*"))]
        files = {path.relative_to(folder).as_posix(): path for path in paths if _is_model_file(path)}
        expected = [f"{name}/config.json" for name in facts.denoisers]
    for name in expected:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"There are no trained weights in {str(folder)!r}: {name} is not there.")
    return files


def _adapters(facts: RunFacts) -> dict[str, str]:
    """The adapters' files, and what each is."""
    names = list(facts.denoisers)
    return {adapter_file(name, names): "the adapter" + f" of {name}" * (name != names[0]) for name in names}


def _is_model_file(path: Path) -> bool:
    return path.suffix == ".safetensors" or path.name == "config.json" or path.name.endswith(".index.json")


def run_files(run_dir: Path, weights: Path, facts: RunFacts) -> dict[str, Path | bytes]:
    """Weights, from the folder `weights`, and the pictures that the card shows; without the card."""
    files: dict[str, Path | bytes] = dict(weight_files(weights, facts))
    files |= {name: run_dir / name for name in facts.pictures if (run_dir / name).is_file()}
    return files


def keep(files: Mapping[str, Path | bytes], folder: Path) -> dict[str, Path | bytes]:
    """
    The same files under `folder`: what is uploaded must not change, nor be removed with its checkpoint, meanwhile.
    Hard links, where there are such.
    """
    kept = dict(files)
    for name, file in files.items():
        if isinstance(file, Path):
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, place)
            except OSError:  # another disk, or one without links
                shutil.copy(file, place)
            kept[name] = place
    return kept


def describe(names: Iterable[str], facts: RunFacts) -> list[tuple[str, str]]:
    """The card's list: each file at the root, and each folder, with what it is."""
    known = {CARD_FILE: "this card", **PLOTS, f"{PICTURES}/": "pictures of the same prompts before and after training"}
    if facts.samples and facts.samples[0].before is None:
        known[f"{PICTURES}/"] = "pictures after training"
    known |= _adapters(facts) if facts.adapter else {f"{name}/": f"the trained {name}" for name in facts.denoisers}
    found: dict[str, str] = {}
    for name in sorted({*names, CARD_FILE}):
        top, _, rest = name.partition("/")
        top += "/" if rest else ""
        checkpoint = top == f"{LAST_CHECKPOINT}/" or re.fullmatch(r"checkpoint-\d+/", top)
        found[top] = "what a training needs to go on; not for use" if checkpoint else known.get(top, "not of this run")
    return list(found.items())


# The card in a run's folder


def write_card(
    folder: Path, facts: RunFacts, text: str, location: str, saved_step: int | None, is_new: bool = False
) -> None:
    """
    Write the card, and the facts that it can be written from again for another place.

    Args:
        folder (`Path`): of the run.
        facts ([`RunFacts`]): of the card.
        text (`str`): the card.
        location (`str`): of the result in its code.
        saved_step (`int`, *optional*): the update after which the weights in `folder` itself were saved.
        is_new (`bool`): whether a card that is there stays, if no run has written it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if is_new and (folder / CARD_FILE).is_file() and not (folder / FACTS_FILE).is_file():
        return
    record = {
        "facts": facts.to_dict(),
        "location": location,
        "saved_step": saved_step,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    (folder / FACTS_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def note_saved(folder: Path, step: int) -> None:
    """That the weights in `folder` are now those of this update, for [`read_card`]."""
    path = folder / FACTS_FILE
    if path.is_file():
        record = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**record, "saved_step": step}, indent=2) + "\n", encoding="utf-8")


@dataclass
class SavedCard:
    """
    What is in a run's folder.

    Attributes:
        facts ([`RunFacts`]): of the card.
        saved_step (`int`, *optional*): the update of the weights in the folder itself.
        edited (`EditedCard`, *optional*): if somebody has written in the card since, what makes that card for a
            repository.
    """

    facts: RunFacts
    saved_step: int | None
    edited: EditedCard | None


def read_card(folder: Path) -> SavedCard:
    """Raises `FileNotFoundError` when this is no run's folder."""
    try:
        record = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{str(folder)!r} is no run's folder: there is no {FACTS_FILE} in it, which is written at the first "
            "checkpoint, and at the end."
        ) from error
    path = folder / CARD_FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    edited = bool(text) and hashlib.sha256(text.encode()).hexdigest() != record["sha256"]
    return SavedCard(
        RunFacts.from_dict(record["facts"]),
        record["saved_step"],
        (lambda repo_id, branch, files: _moved(text, record["location"], repo_id, branch, files)) if edited else None,
    )


def _moved(card: str, location: str, repo_id: str, branch: str | None, files: Sequence[tuple[str, str]]) -> str:
    """The card, its code loading from the repository, and its list that of the repository's files."""
    listing = "".join(f"- {line}\n" for line in file_lines(files))
    card = re.sub(r"(?m)^(## Files\n\n)(?:- .*(?:\n|\Z))+", lambda match: match[1] + listing, card)
    # Only in the lines that load: "." may stand for other things elsewhere.
    here = re.escape(as_python(location))
    card = re.sub(
        rf"((?:load_lora_\w+|from_pretrained|hf_hub_download)\(\s*){here}", lambda m: m[1] + as_python(repo_id), card
    )
    arguments = f", revision={as_python(branch)}" if branch else ""
    card, pictures = re.subn(
        rf'load_image\({here[:-1]}/({PICTURES}/\d+_input[^"]*)"\)',
        lambda match: f'load_image(hf_hub_download({as_python(repo_id)}, filename="{match[1]}"{arguments}))',
        card,
    )
    card = card.replace(f"{FROM_HERE}\n", "")
    return re.sub(rf"(?m)^{LOADS_IMAGES}.*", rf"\g<0>\n{DOWNLOADS}", card, count=1) if pictures else card


# What is read


def license_of(base: Base, token: str | None = None) -> None:
    """Fill in the license that the base model's own card names. Nothing, where the Hub cannot be asked."""
    if base.hub_id is None or base.license is not None:
        return
    try:
        card = HfApi(token=token).model_info(base.hub_id, timeout=10).card_data
    except Exception as error:  # of whatever kind: it is no reason not to push
        logger.info(f"The license of {base.hub_id} is not known: {reason(error)}.")
        return
    if card is not None:
        named = {name: card.get(name) for name in ("license", "license_name", "license_link")}
        base.license, base.license_name, base.license_link = (
            value if isinstance(value, str) else None for value in named.values()
        )
