"""Checkpoints on the Hub: what of one is pushed, and how a run on another machine gets it back."""

import functools
import json
import re
import shutil
from pathlib import Path

from filelock import FileLock
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from transformers.utils import logging

from .. import hub
from .checkpoints import STATE_FILE, TRAINER_STATE_FILE


logger = logging.get_logger(__name__)


# "user/name", "user/name/checkpoint-20", "user/name@branch"
_SOURCE = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?:@(\S+))?")


def checkpoint_files(checkpoint: Path, folder: str) -> dict[str, Path | bytes]:
    """All of a checkpoint, in `folder` of the repository; its state without the paths of this machine."""
    files: dict[str, Path | bytes] = {
        f"{folder}/{path.relative_to(checkpoint).as_posix()}": path
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != "training_args.bin"  # a pickle, with the token in it
    }
    state = json.loads((checkpoint / TRAINER_STATE_FILE).read_text())
    if state.get("best_model_checkpoint"):
        state["best_model_checkpoint"] = Path(state["best_model_checkpoint"]).name
    files[f"{folder}/{TRAINER_STATE_FILE}"] = json.dumps(state, indent=2).encode()
    return files


def names_checkpoint(source: str) -> bool:
    """Whether this, which is no folder here, can be one on the Hub."""
    return _SOURCE.fullmatch(source) is not None


def fetch_checkpoint(source: str, output_dir: Path, revision: str | None = None, token: str | None = None) -> Path:
    """
    Download a checkpoint that a run with `hub_strategy` "checkpoint" or "all_checkpoints" has pushed. Several
    processes may call it: one downloads.

    Args:
        source (`str`):
            `"user/name"`, whose last checkpoint is taken, or `"user/name/checkpoint-20"`; with `"@branch"` at the end.
        output_dir (`Path`): a folder `checkpoint-20` is made in it, as if the run had been here.
        revision (`str`, *optional*): branch, unless `source` names one.
        token (`str`, *optional*): for a private repository.

    Returns the `Path` of that folder.

    Raises:
        `ValueError`: when there is none, or another checkpoint of that number is in `output_dir`.
    """
    match = _SOURCE.fullmatch(source)
    assert match is not None  # the caller has looked
    repo_id, wanted, branch = match.groups()
    revision = branch or revision
    place = output_dir / f"_fetched-{repo_id.replace('/', '-')}"
    output_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(output_dir / "_fetching.lock"):
        try:
            names = HfApi(token=token).list_repo_files(repo_id, revision=revision)
            there = sorted({name.split("/")[0] for name in names if name.endswith(f"/{STATE_FILE}")}, key=_number)
            folder = wanted or (hub.LAST_CHECKPOINT if hub.LAST_CHECKPOINT in there else there[-1] if there else "")
            if folder not in there:
                source = f"{repo_id}@{revision}" if revision else repo_id
                raise ValueError(
                    f"{source} holds no checkpoint{f' {wanted!r}' if wanted else ''} to resume from (it has "
                    f"{', '.join(there) or 'none'}). A run pushes them with hub_strategy='checkpoint' or "
                    "'all_checkpoints'."
                )
            logger.info(f"Downloading {folder} of {repo_id}.")
            download = functools.partial(snapshot_download, repo_id, revision=revision, token=token, local_dir=place)
            download(allow_patterns=f"{folder}/*")
            state = json.loads((place / folder / TRAINER_STATE_FILE).read_text())
            best = state.get("best_model_checkpoint")
            if best in there and best != folder:  # for load_best_model_at_end
                download(allow_patterns=f"{best}/*")
                _adopt(place / best, output_dir)
            return _adopt(place / folder, output_dir)
        except RepositoryNotFoundError as error:
            raise ValueError(
                f"There is no checkpoint folder {source!r} here, and no repository {repo_id!r} on the Hub, or none "
                "that this token may read."
            ) from error
        except hub.FAILURES as error:
            raise ValueError(
                f"There is no checkpoint folder {source!r} here, and none came from the Hub: {hub.reason(error)}."
            ) from error
        finally:
            shutil.rmtree(place, ignore_errors=True)


def _number(folder: str) -> int:
    return int(folder.rpartition("-")[2]) if folder.rpartition("-")[2].isdigit() else -1


def _adopt(fetched: Path, output_dir: Path) -> Path:
    """Give a downloaded checkpoint the name that it had in its run."""
    state = json.loads((fetched / TRAINER_STATE_FILE).read_text())
    folder = output_dir / f"checkpoint-{state['global_step']}"
    if folder.exists():
        if (folder / STATE_FILE).read_bytes() != (fetched / STATE_FILE).read_bytes():
            raise ValueError(
                f"{str(folder)!r} is there already, and is another checkpoint than the one on the Hub. Use another "
                "output_dir, or resume from the one that is here."
            )
        return folder
    if best := state.get("best_model_checkpoint"):
        state["best_model_checkpoint"] = str(output_dir / best)
        (fetched / TRAINER_STATE_FILE).write_text(json.dumps(state, indent=2))
    fetched.rename(folder)
    return folder
