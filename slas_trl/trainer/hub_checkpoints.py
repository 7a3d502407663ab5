"""Checkpoints on the Hub: how a run on another machine gets one."""

import functools
import json
import re
import shutil
from pathlib import Path

from filelock import FileLock
from huggingface_hub import HfApi, snapshot_download
from transformers.utils import logging

from ..publishing.repository import FAILURES, LAST_CHECKPOINT, reason
from ..run_files import STATE, TRAINER_STATE


logger = logging.get_logger(__name__)

# "user/name", "user/name/checkpoint-20", "user/name@branch"
_SOURCE = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?:@(\S+))?")


def names_checkpoint(source: str) -> bool:
    """Whether this, which is no folder here, can be one on the Hub."""
    return _SOURCE.fullmatch(source) is not None


def fetch_checkpoint(source: str, output_dir: Path, revision: str | None = None, token: str | None = None) -> Path:
    """
    Download a checkpoint that a run with `hub_strategy` "checkpoint" or "all_checkpoints" has pushed, and the best one
    that it names, into folders such as `checkpoint-20` of `output_dir`, as if the run had been here. Several processes
    may call it: one downloads. See [`~SLASTrainer.train`] for `source`; `revision` is a branch, unless it names one.

    Raises:
        `ValueError`: when there is none, or another checkpoint of that number is in `output_dir`.
    """
    repo_id, wanted, branch = _SOURCE.fullmatch(source).groups()  # type: ignore[union-attr]
    place = output_dir / f"_fetched-{repo_id.replace('/', '-')}"
    output_dir.mkdir(parents=True, exist_ok=True)
    where = {"revision": branch or revision, "token": token}
    with FileLock(output_dir / "_fetching.lock"):
        try:
            names = HfApi(token=token).list_repo_files(repo_id, revision=where["revision"])
            there = sorted((n.split("/")[0] for n in names if n.endswith(f"/{STATE}")), key=lambda n: (len(n), n))
            folder = wanted or (LAST_CHECKPOINT if LAST_CHECKPOINT in there else there[-1] if there else None)
            if folder not in there:
                raise ValueError(
                    f"{source!r} is no checkpoint on the Hub; {repo_id} has {', '.join(there) or 'none'}. A run "
                    "pushes them with hub_strategy='checkpoint' or 'all_checkpoints'."
                )
            logger.info(f"Downloading {folder} of {repo_id}.")
            download = functools.partial(snapshot_download, repo_id, local_dir=place, **where)
            download(allow_patterns=f"{folder}/*")
            best = json.loads((place / folder / TRAINER_STATE).read_text()).get("best_model_checkpoint")
            if best in there and best != folder:  # for load_best_model_at_end
                download(allow_patterns=f"{best}/*")
                _adopt(place / best, output_dir)
            return _adopt(place / folder, output_dir)
        except FAILURES as error:
            raise ValueError(f"{source!r} is no folder here, and could not be downloaded: {reason(error)}.") from error
        finally:
            shutil.rmtree(place, ignore_errors=True)


def _adopt(fetched: Path, output_dir: Path) -> Path:
    """Give a downloaded checkpoint the name that it had in its run."""
    state = json.loads((fetched / TRAINER_STATE).read_text())
    folder = output_dir / f"checkpoint-{state['global_step']}"
    if folder.exists():
        if (folder / STATE).read_bytes() != (fetched / STATE).read_bytes():
            raise ValueError(f"{str(folder)!r} is another checkpoint than the one on the Hub. Use another output_dir.")
        return folder
    if best := state.get("best_model_checkpoint"):
        state["best_model_checkpoint"] = str(output_dir / best)
        (fetched / TRAINER_STATE).write_text(json.dumps(state, indent=2))
    fetched.rename(folder)
    return folder
