"""
Kills a training run with SIGKILL, again and again, and compares what it ends with to the run that nothing stopped.

    python benchmarks/kill_and_resume.py --kills 20 --seed 0

The run trains an adapter of the embedded pipeline, six updates to a rollout, with a moving average and a checkpoint
after every update. It is killed at moments drawn uniformly over the life of a run, from the start of its process to
its end; every third kill is aimed into the writing of a checkpoint. Each time it goes on from its newest checkpoint,
or anew where there is none. A run that reaches its end is compared bit for bit: every tensor of its last checkpoint
(adapter, moving average, optimizer, schedule, random states, rollout under way) and every line of its metrics. Then
the next one starts, until all kills are spent. The exit status is 1 if anything differs, if a run did not go on from
the newest folder that has the name of a checkpoint, or if it left something else behind.

Processes are forked from one that has imported what takes long, so that a start takes no ten seconds.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a fork has no threads but the forking one
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # which finds semaphores of processes that were killed

# Not the trainer itself: a process of its own imports it, before it looks for what another one has left.
IMPORTED_ONCE = [
    "diffusers.training_utils",
    "peft",
    "slas_trl.policy",
    "slas_trl.rewards.shapes",
    "slas_trl.shapes.pipeline",
    "transformers.trainer",
    "trl.trainer.utils",
]
KEPT = 2  # checkpoints
TIMINGS = re.compile(r"step_time|images_per_second|rewards/.+/time")
PATIENCE = 120.0  # seconds for what takes a few


def train(folder: Path, notes: Path, updates: int) -> None:
    """Run or resume; what is under way is noted in a file, and what is printed goes into another."""
    start = time.monotonic()
    out = notes.open("a", buffering=1)

    def note(what: str, done: int = 0) -> None:
        out.write(json.dumps([time.monotonic() - start, what, done]) + "\n")

    note("start-up")
    printed = os.open(notes.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(printed, stream)
    from peft import LoraConfig
    from transformers import TrainerCallback

    from slas_trl.rewards import shapes_coloured_area
    from slas_trl.shapes import load_shapes_pipeline, shapes_prompts
    from slas_trl.trainer import SLASConfig, SLASTrainer
    from slas_trl.trainer.checkpoints import last_whole_checkpoint

    class Noting(SLASTrainer):
        def sample_rollout(self, *args, **kwargs):
            note("sampling", self.state.global_step)
            return super().sample_rollout(*args, **kwargs)

        def compute_loss(self, *args, **kwargs):
            note("update", self.state.global_step)
            return super().compute_loss(*args, **kwargs)

        def _save_checkpoint(self, *args, **kwargs):
            note("writing", self.state.global_step)
            super()._save_checkpoint(*args, **kwargs)
            note("written", self.state.global_step)

    class NotingStart(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            note("from", state.global_step)

    config = SLASConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        num_generations=2,
        steps_per_generation=2,
        num_inference_steps=4,
        gradient_accumulation_steps=2,  # of two chunks at three steps: three updates to a pass
        num_iterations=2,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        max_steps=updates,
        use_ema=True,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=KEPT,
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Noting(
        load_shapes_pipeline(),
        shapes_coloured_area,
        config,
        train_dataset=shapes_prompts("test"),
        callbacks=[NotingStart()],
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
    )
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder) is not None)
    note("end", trainer.state.global_step)


def newest(folder: Path) -> int:
    """Number of the newest checkpoint, 0 without one; by its name alone, which only a whole one should have."""
    return max((int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*")), default=0)


class Run:
    """One process of a run, from its start or from its newest checkpoint."""

    context: Any = multiprocessing.get_context(
        "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    )

    def __init__(self, folder: Path, updates: int):
        self.newest = newest(folder)
        self.notes_file = folder.with_name(f"notes-{time.monotonic_ns()}")
        self.notes_file.touch()
        self.process = self.context.Process(target=train, args=(folder, self.notes_file, updates))
        self.start = time.monotonic()
        self.process.start()

    @property
    def notes(self) -> list[tuple[float, str, int]]:
        return [tuple(json.loads(line)) for line in self.notes_file.read_text().splitlines() if line.endswith("]")]

    def wait_for(self, what: str, times: int) -> bool:
        """Until it has noted that so often, or has ended."""
        while self.process.is_alive() and time.monotonic() < self.start + PATIENCE:
            if sum(note[1] == what for note in self.notes) >= times:
                return True
            time.sleep(0.001)
        return False

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def finish(self) -> list[str]:
        """What is wrong with its end."""
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.kill()
            return [f"the process hung, its last note is {self.notes[-1:]}"]
        if self.process.exitcode == 0:
            return []
        printed = self.notes_file.with_suffix(".txt").read_text()
        return [f"the process ended with status {self.process.exitcode}:\n{printed[-2000:]}"]

    def wrong_start(self) -> list[str]:
        """What is wrong with the checkpoint that it went on from."""
        taken = next((done for _, what, done in self.notes if what == "from"), self.newest)  # or killed before
        return [] if taken == self.newest else [f"checkpoint-{self.newest} is there, but it went on from {taken}"]


def differences(a: Any, b: Any, name: str) -> Iterator[str]:
    """Names of what is not the same to the last bit."""
    import numpy as np
    import torch

    if type(a) is not type(b):
        yield name
    elif isinstance(a, dict):
        if a.keys() != b.keys():
            yield name
        else:
            for key in a:
                yield from differences(a[key], b[key], f"{name}/{key}")
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            yield name
        for i, (one, other) in enumerate(zip(a, b, strict=False)):
            yield from differences(one, other, f"{name}/{i}")
    elif isinstance(a, torch.Tensor):
        if a.dtype != b.dtype or not torch.allclose(a, b, rtol=0, atol=0, equal_nan=True):  # a step without density
            yield name
    elif isinstance(a, np.ndarray):
        if not np.array_equal(a, b):
            yield name
    elif a != b:
        yield name


def contents(path: Path) -> Any:
    import torch
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, weights_only=False)  # random states of numpy, of a file that we wrote


def compare(whole: Path, run: Path, updates: int) -> list[str]:
    """Where a run that was killed differs from the one that was not."""
    found: list[str] = []
    folders = [folder / f"checkpoint-{updates}" for folder in (whole, run)]
    names = [{str(p.relative_to(f)) for p in f.rglob("*") if p.is_file()} for f in folders]
    if names[0] != names[1]:
        return [f"checkpoint-{updates} has the files {sorted(names[1])} instead of {sorted(names[0])}"]
    for name in sorted(name for name in names[0] if Path(name).suffix in (".pt", ".pth", ".safetensors")):
        found += differences(contents(folders[0] / name), contents(folders[1] / name), name)
    lines = [list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())) for folder in (whole, run)]
    logs = [
        [{k: v for k, v in line.items() if not TIMINGS.fullmatch(k)} for line in each if "loss" in line]
        for each in lines
    ]
    found += differences(logs[0], logs[1], "metrics.jsonl")
    kept = [sorted(path.name for path in folder.iterdir()) for folder in (whole, run)]
    found += [f"left over: {name}" for name in kept[1] if name not in kept[0]]
    return found


def describe(notes: list[tuple[float, str, int]], folder: Path) -> str:
    """What was under way when the notes ended."""
    _, what, done = notes[-1] if notes else (0.0, "start-up", 0)
    during = {
        "start-up": "start-up",
        "from": "start-up",
        "sampling": f"sampling after update {done}",
        "update": f"update {done + 1}",
        "writing": f"writing of checkpoint-{done}",
        "written": f"after checkpoint-{done}",
        "end": "end",
    }[what]
    halves = [path.name for path in folder.glob("_*")] if folder.exists() else []
    return during + (f" (left {', '.join(sorted(halves))})" if halves else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=15, help="of a run")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    Run.context.set_forkserver_preload(IMPORTED_ONCE)
    begin = time.monotonic()
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="kill and resume ") as temporary:
        base = Path(temporary)
        whole = base / "whole"
        uninterrupted = Run(whole, options.updates)
        if failed := uninterrupted.finish():
            print(f"The uninterrupted run failed: {failed[0]}.")
            return 1
        notes = uninterrupted.notes
        life = notes[-1][0]
        began = next(at for at, what, _ in notes if what == "from")
        spells = [b[0] - a[0] for a, b in zip(notes, notes[1:], strict=False) if a[1] == "writing"]
        writing = sum(spells) / len(spells)
        print(
            f"An uninterrupted run of {options.updates} updates takes {life:.2f} s, {began:.2f} s of it to start, and "
            f"{writing * 1000:.0f} ms for each checkpoint.\n"
        )
        print(f"{'kill':>4}  {'run':>3}  {'after':>7}  {'lost':>4}  {'resumed from':<14}  during")
        kills, number, starts, after = 0, 1, 0, 0.0
        lost_updates: list[int] = []
        folder = base / f"run {number}"
        while True:
            run, starts = Run(folder, options.updates), starts + 1
            aimed = kills % 3 == 0
            moment = rng.uniform(0, life)
            nth, share = rng.randint(1, 4), rng.uniform(0, 1.2)
            if kills < options.kills:
                if aimed and run.wait_for("writing", nth):
                    time.sleep(share * writing)
                else:
                    run.process.join(moment)
                after = time.monotonic() - run.start
                run.kill()  # if it has not ended meanwhile
            else:
                run.process.join(PATIENCE)
            killed = run.process.exitcode == -signal.SIGKILL
            problems += [f"run {number}: {problem}" for problem in run.wrong_start()]
            if killed:
                kills += 1
                done = max((done for _, _, done in run.notes), default=run.newest)
                kept = newest(folder)
                lost_updates.append(max(done, run.newest) - kept)
                source = f"checkpoint-{kept}" if kept else "the start"
                during = describe(run.notes, folder) + (", aimed" if aimed else "")
                print(f"{kills:>4}  {number:>3}  {after:>5.2f} s  {lost_updates[-1]:>4}  {source:<14}  {during}")
                continue
            failed = run.finish() or compare(whole, folder, options.updates)
            problems += [f"run {number}: {problem}" for problem in failed]
            print(f"      {number:>3}  {'differs: ' + '; '.join(failed) if failed else 'ends as the whole one'}")
            if kills == options.kills or failed:
                break
            number += 1
            folder = base / f"run {number}"
    print(
        f"\n{kills} kills in {number} runs and {starts} processes: {sum(lost_updates)} updates were repeated, at most "
        f"{max(lost_updates, default=0)} after one kill; {math.ceil(time.monotonic() - begin)} s in all."
    )
    for problem in problems:
        print(f"WRONG: {problem}")
    print("Not every run came to the same end." if problems else "Every run came to the same end, to the last bit.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
