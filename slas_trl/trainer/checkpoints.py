"""Checkpoints that are whole or not there: how to tell, rollouts on disk, and those on the Hub."""

import functools
import json
import os
import re
import shutil
import signal
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError
from transformers.utils import logging

from ..policy import PipelineReplayer, Rollout
from ..publishing.repository import FAILURES, LAST_CHECKPOINT, reason
from ..run_files import REMOVED, STATE, TRAINER_STATE, WRITING


logger = logging.get_logger(__name__)

STARTED = time.time()
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, *(() if os.name == "nt" else (signal.SIGHUP,)))
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)  # what a full disk raises, by who is writing
# "user/name", "user/name/checkpoint-20", "user/name@branch"
ON_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?:@(\S+))?")


def rollout_file(rank: int) -> str:
    return f"rollout_{rank}.pt"


def write_state(folder: Path, **state: Any) -> None:
    """Write `STATE` with the sizes and checksums of the files that are in `folder` by now."""
    files = {str(path.relative_to(folder)): _content(path) for path in folder.rglob("*") if path.is_file()}
    state |= {"written": time.time(), "files": files}
    (folder / STATE).write_text(json.dumps({**state, "checksum": _checksum(state)}, indent=2))


def _checksum(state: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def _content(path: Path) -> list[int]:
    """The length of a file, and the CRC-32 of what is in it."""
    if path.name == TRAINER_STATE:  # in which the best checkpoint's place is another one on another machine
        return [0, _checksum({**json.loads(path.read_text()), "best_model_checkpoint": None})]
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(2**20):
            checksum = zlib.crc32(part, checksum)
    return [path.stat().st_size, checksum]


def read_state(folder: Path) -> dict[str, Any]:
    """The contents of `STATE`. Raises `ValueError`, which names the file, when the checkpoint is not whole."""
    if not folder.is_dir():
        raise ValueError(f"There is no checkpoint folder {str(folder)!r}.")
    file = STATE
    try:
        state = json.loads((folder / STATE).read_text())
        if state.pop("checksum") != _checksum(state):
            raise ValueError("not as it was written")
        for file, content in {TRAINER_STATE: None, **state["files"]}.items():
            if _content(folder / file) != content:
                raise ValueError("not as it was written")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"The checkpoint {str(folder)!r} is damaged, unfinished or old: {file} ({error}).") from error
    return state


def checkpoints_in(output_dir: Path) -> list[Path]:
    """The checkpoint folders, the last written first; of several runs, too, and broken ones."""
    folders = [path for path in output_dir.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdigit()]
    return sorted(folders, key=lambda path: (_written(path), int(path.name[11:])), reverse=True)


def _written(folder: Path) -> float:
    """When, in seconds since the epoch; a copy keeps it, unless it is broken."""
    try:
        return float(json.loads((folder / STATE).read_text())["written"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return folder.stat().st_mtime


def last_whole_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that can be resumed from; newer ones that cannot are named in a warning."""
    for folder in checkpoints_in(output_dir):
        try:
            read_state(folder)
        except ValueError as error:
            logger.warning(f"{error} Looking for an earlier one.")
        else:
            return folder
    return None


def find(output_dir: Path, wanted: str | bool | None) -> Path | None:
    """
    The checkpoint to resume from: a folder, or with `True` the newest whole one in `output_dir`; `None` for none.
    Raises `ValueError` if there is none that is whole.
    """
    if not wanted:
        return None
    folder = last_whole_checkpoint(output_dir) if wanted is True else Path(wanted)
    if folder is None:
        raise ValueError(f"There is no whole checkpoint in {str(output_dir)!r} to resume from.")
    read_state(folder)
    return folder


@contextmanager
def on_interrupt(note: Callable[[int], None]) -> Iterator[None]:
    """
    Within, Ctrl-C, SIGTERM and SIGHUP call `note` with their number, so that no update is torn apart. A second Ctrl-C
    interrupts as usual; but SIGTERM may well come twice, from a scheduler and a launcher. An ignored SIGHUP (nohup)
    stays so.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    previous = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    previous = {n: h for n, h in previous.items() if n == signal.SIGINT or h is not signal.SIG_IGN}

    def handle(number: int, frame: Any) -> None:
        for other in previous if number == signal.SIGINT else (signal.SIGINT,):
            signal.signal(other, previous[other])
        note(number)

    for number in previous:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in previous:
            signal.signal(number, previous[number])


discard = functools.partial(shutil.rmtree, ignore_errors=True)


def try_writing(folder: Path) -> None:
    """Raise before a run what would be raised when its results are written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise OSError(f"output_dir {str(folder)!r} cannot be written to ({error.strerror}); name another.") from error


def lost(what: str, output_dir: Path, error: Exception) -> OSError:
    """The error of a run that a full disk has ended: what could not be written, and what is left."""
    last = last_whole_checkpoint(output_dir)
    left = f"the last whole one is {str(last)!r}; resume from there" if last else "there is no earlier one"
    return OSError(f"{what} could not be written ({error}). Checkpoints left after making room: {left}.")


def publish(written: Path, folder: Path) -> None:
    """
    Give a checkpoint that was written elsewhere its name, in one step: what bears it is whole, after a power cut too.
    One of an earlier run with the same name is there until then, see [`tidy`].
    """
    for path in (*written.rglob("*"), written):
        _sync(path)
    removed = _set_aside(folder)
    written.rename(folder)
    _sync(folder.parent)
    discard(removed)


def _sync(path: Path) -> None:
    """Have the contents of a file or folder on the disk, and not only on their way there."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _set_aside(folder: Path) -> Path:
    """Take a checkpoint, if it is there, from the others in one step, so that no half of one is ever among them."""
    removed = folder.with_name(REMOVED + folder.name)
    if folder.exists():
        discard(removed)
        folder.rename(removed)
    return removed


def rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beside `newest` until there are `limit`; `best` stays."""
    if limit is None or limit <= 0:
        return
    others = [folder for folder in checkpoints_in(newest.parent) if folder != newest]
    removable = [folder for folder in others if best is None or folder.resolve() != Path(best).resolve()]
    excess = max(0, 1 + len(others) - limit)
    for folder in removable[::-1][:excess]:
        with suppress(OSError):  # too many checkpoints are no reason to stop
            discard(_set_aside(folder))


def rotate_after_kill(output_dir: Path, folder: Path, limit: int | None) -> None:
    """[`rotate`], if `folder` is the newest checkpoint: a run that was killed just after writing it has not."""
    newest = checkpoints_in(output_dir)[:1]
    if [path.resolve() for path in newest] == [folder.resolve()]:
        state = json.loads((folder / TRAINER_STATE).read_text())
        rotate(newest[0], limit, state.get("best_model_checkpoint"))


def tidy(output_dir: Path) -> None:
    """
    Undo what a killed run left half done: checkpoints half written or half removed go, and one that was to be replaced
    returns. Folders written to since this process began belong to another one, which is alive.
    """
    for removed in output_dir.glob(REMOVED + "checkpoint-*"):
        folder = removed.with_name(removed.name.removeprefix(REMOVED))
        with suppress(ValueError):
            if not folder.exists() and read_state(removed):
                removed.rename(folder)
        discard(removed)
    for writing in output_dir.glob(WRITING + "*"):
        with suppress(OSError):
            if max(path.stat().st_mtime for path in (writing, *writing.rglob("*"))) < STARTED:
                discard(writing)


def save_rollouts(path: Path, rollouts: list[Rollout], **others: Any) -> None:
    """Tensors and plain values only, so that reading them back runs no code."""
    torch.save({"rollouts": [rollout.state() for rollout in rollouts], **others}, path)


def load_rollouts(
    path: Path, replayer: PipelineReplayer, calls: list[dict[str, Any]], device: torch.device
) -> tuple[list[Rollout], dict[str, Any]]:
    """The rollouts, given the pipeline calls that made them, and what else was saved with them."""
    # One of several processes on the CPU has the device "cpu:0", which torch.load does not know.
    location = "cpu" if device.type == "cpu" else device
    saved = torch.load(path, map_location=location, weights_only=True)
    states = saved.pop("rollouts")
    return [replayer.restore(state, call) for state, call in zip(states, calls, strict=True)], saved


def fetch_checkpoint(source: str, output_dir: Path, revision: str | None = None, token: str | None = None) -> Path:
    """
    Download a checkpoint that a run has pushed, and the best one that it names, into folders such as `checkpoint-20`
    of `output_dir`, as if the run had been here. `source` is as in [`~SLASTrainer.train`], and `revision` a branch,
    unless it names one. Raises `ValueError` without one, and where another one of that number is in `output_dir`.
    """
    repo_id, wanted, branch = ON_HUB.fullmatch(source).groups()  # type: ignore[union-attr]
    place, revision = output_dir / f"_fetched-{repo_id.replace('/', '-')}", branch or revision
    output_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(output_dir / "_fetching.lock"):  # one machine of several that share the folder
        try:
            names = HfApi(token=token).list_repo_files(repo_id, revision=revision)
            there = sorted((n.split("/")[0] for n in names if n.endswith(f"/{STATE}")), key=lambda n: (len(n), n))
            folder = wanted or (LAST_CHECKPOINT if LAST_CHECKPOINT in there else there[-1] if there else None)
            if folder not in there:
                raise ValueError(f"{source!r} is not on the Hub; {repo_id} has {', '.join(there) or 'no checkpoint'}.")
            download = functools.partial(snapshot_download, repo_id, revision=revision, token=token, local_dir=place)
            download(allow_patterns=f"{folder}/*")
            best = json.loads((place / folder / TRAINER_STATE).read_text()).get("best_model_checkpoint")
            if best in there and best != folder:  # for load_best_model_at_end
                download(allow_patterns=f"{best}/*")
                _adopt(place / best, output_dir)
            return _adopt(place / folder, output_dir)
        except FAILURES as error:
            raise ValueError(f"{source!r} is no folder here, and could not be downloaded: {reason(error)}.") from error
        finally:
            discard(place)


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
