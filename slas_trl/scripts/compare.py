"""`slas-trl compare`: train several kinds of advantages from the same base, with the same noise, and compare them."""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from slas_trl.rewards.by_name import masked
from slas_trl.scripts.arguments import parse, read_yaml
from slas_trl.scripts.train import held_out_prompts


OUTPUT_DIR = "runs/comparison"
SPEC, CONFIG, LOG, RESULT, SAMPLES = "arm.json", "config.yaml", "log.txt", "result.json", "samples"
EVALUATIONS = "evaluations.json"
WORKER = "slas_trl.scripts.compare_arm"
BASE = "base"  # the arm that is not trained
# What makes an arm, and what belongs to all of them; an option of these would be silently overridden.
OURS = {
    "gamma": "--gammas, which makes an arm of each",
    "scale_rewards": "--arms: grpo is the std of the group, linear and slas that of the batch",
    "resume_from_checkpoint": "the same command once more, which goes on from what is there",
    "push_to_hub": "`slas-trl train`, once an arm is chosen",
}


@dataclass(frozen=True)
class Arm:
    """A kind of advantages."""

    name: str  # of its folder
    label: str  # in tables and pictures
    options: tuple[str, ...]  # of `slas-trl train`


def arms_of(kinds: Sequence[str], gammas: Sequence[float]) -> list[Arm]:
    """
    The arms of `--arms` and `--gammas`: "slas" is one for each γ. Raises `ValueError` for an unknown or double one.
    """
    fixed = ("--gamma", "0", "--gamma_schedule", "constant")
    arms = []
    for kind in kinds:
        if kind == "grpo":
            arms.append(Arm("grpo", "group std", ("--scale_rewards", "group", *fixed)))
        elif kind == "linear":
            arms.append(Arm("linear", "batch std, γ 0", ("--scale_rewards", "batch", *fixed)))
        elif kind == "slas":
            if not gammas:
                raise ValueError("--gammas is empty, but the arm slas needs a γ, such as 0.5.")
            for gamma in gammas:
                options = ("--scale_rewards", "batch", "--gamma", f"{gamma:g}")
                arms.append(Arm(f"slas-{gamma:g}", f"batch std, γ {gamma:g}", options))
        else:
            raise ValueError(f"--arms: expected some of grpo, linear and slas, got {kind!r}.")
    names = [arm.name for arm in arms]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--arms and --gammas name {', '.join(twice)} twice; once is enough.")
    if not arms:
        raise ValueError("--arms is empty: expected some of grpo, linear and slas.")
    return arms


def make_parser(prog: str = "slas-trl compare") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        allow_abbrev=False,
        description=__doc__,
        epilog="All options of `slas-trl train` are taken too, --config among them, and hold for every arm. Arms that "
        "are finished are not run again: after an interruption, give the same command.",
    )
    kinds = "grpo (std of the group), linear (std of the batch), slas (shaped as well, by each of --gammas)"
    parser.add_argument("--arms", type=_words, default="grpo,linear,slas", help=f"kinds of advantages: {kinds}")
    parser.add_argument("--gammas", type=_numbers, default="0.25,0.5,1", help="γ of the slas arms (0.25,0.5,1)")
    parser.add_argument("--seeds", type=_positive, default=3, help="number of seeds, from --seed on (default: 3)")
    parser.add_argument("--processes", type=_positive, default=1, help="arms that are trained at a time (default: 1)")
    parser.add_argument("--eval_every", type=_positive, help="updates between evaluations (default: an eighth of all)")
    parser.add_argument("--eval_prompts", type=_positive, help="number of held-out prompts (default: all)")
    parser.add_argument("--eval_images_per_prompt", type=_positive, default=4, help="images of each (default: 4)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    args, options = make_parser().parse_known_args(argv)
    arms = arms_of(args.arms, args.gammas)
    given = {word[2:].split("=")[0].replace("-", "_") for word in options if word.startswith("--")}
    # A file's output_dir holds, that of the embedded pipeline's settings does not.
    options, settings = _take_config(options)
    # A file that was made for `slas-trl train` names a γ, which the arms replace; it may also ask for an upload.
    clash = given & OURS.keys() | {name for name in ("resume_from_checkpoint", "push_to_hub") if settings.get(name)}
    for name in sorted(clash):
        raise ValueError(f"{name} would be one for all arms; use {OURS[name]}.")
    # Each arm is for one device, and so is this process, which only reads the options.
    if gpus := _gpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[0]
    if "output_dir" not in given | settings.keys():
        options += ["--output_dir", OUTPUT_DIR]
    with tempfile.TemporaryDirectory() as folder:
        shared_options = with_config(options, settings, Path(folder))
        parsed = [parse([*shared_options, *arm.options], "slas-trl compare") for arm in arms]
    script, _, config = parsed[-1]
    if config.gamma_schedule == "ess" and sum(arm.name.startswith("slas") for arm in arms) > 1:
        raise ValueError("gamma_schedule=ess chooses γ by itself, whatever --gammas say: give one of them.")
    if script.reward_funcs is None:
        raise ValueError(
            "--reward_funcs is missing: name at least one function of slas_trl.rewards, or package.module:function."
        )
    named = {name: value for name, value in settings.items() if value is not None}
    if masked(text := str([argv, named])) != text:
        raise ValueError(f"{masked(text)} holds a secret, which compare would write down: put it in the environment.")
    if config.max_steps < 1:
        raise ValueError("--max_steps is missing: arms are compared after equally many updates.")
    prompts = held_out_prompts(script, config, "slas-trl compare")
    if args.eval_prompts is not None and args.eval_prompts > len(prompts):
        raise ValueError(f"--eval_prompts is {args.eval_prompts}, but there are {len(prompts)} held-out prompts.")
    root = Path(config.output_dir or OUTPUT_DIR)
    shared = {
        "eval_every": args.eval_every or max(1, config.max_steps // 8),
        "eval_prompts": args.eval_prompts or len(prompts),
        "eval_images_per_prompt": args.eval_images_per_prompt,
        "config": settings,
    }
    options = _without(options, "output_dir", "seed")
    jobs = [_job(root / BASE, Arm(BASE, BASE, ()), config.seed, options, shared)]
    seeds = [config.seed + i for i in range(args.seeds)]
    jobs += [_job(root / arm.name / f"seed-{s}", arm, s, options, shared) for s in seeds for arm in arms]
    todo = [folder for folder, spec in jobs if not _is_finished(folder, spec)]
    print(f"Comparing {len(arms)} arms with {len(seeds)} seeds: {len(todo)} of {len(jobs)} runs to do, in {root}.")
    for folder, spec in jobs:
        if folder in todo:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / SPEC).write_text(json.dumps(spec, indent=2) + "\n", encoding="utf-8")
    _run_all(todo, args.processes, gpus, root)

    from slas_trl.scripts.compare_report import write_report  # now that matplotlib is needed

    command = shlex.join(["slas-trl", "compare", *argv])
    text = write_report(root, [asdict(arm) for arm in arms], seeds, command)
    print(f"\n{text}\n\nDone. Look at comparison.md, comparison.png and samples.png in {root}.")


def _job(folder: Path, arm: Arm, seed: int, options: list[str], shared: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    own = [*options, *arm.options, "--seed", str(seed)]
    return folder, {"arm": arm.name, "seed": seed, "options": own, **shared}


def _is_finished(folder: Path, spec: dict[str, Any]) -> bool:
    """Raises `ValueError` when the folder holds something else than what was asked for."""
    if not (folder / SPEC).exists():
        return False
    then = json.loads((folder / SPEC).read_text(encoding="utf-8"))
    if not ((folder / RESULT).exists() or (folder / EVALUATIONS).exists()):  # nothing was computed
        return False
    if changed := {name: (then.get(name), spec[name]) for name in spec if then.get(name) != spec[name]}:
        raise ValueError(
            f"{folder} was run with other settings (then, now): {changed}. Give those, or another --output_dir."
        )
    return (folder / RESULT).exists()


def _run_all(folders: list[Path], processes: int, gpus: list[str], root: Path) -> None:
    """One process for each run, `processes` at a time; after one that failed, no other is started."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    # Forked from a process that has imported everything, which takes longer than a small arm's evaluation.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["slas_trl.cli.advice", WORKER])
    waiting, places, failed = list(folders), list(range(processes)), []
    running: dict[Any, tuple[Path, int, float]] = {}
    try:
        while running or (waiting and not failed):
            while waiting and places and not failed:
                folder, place = waiting.pop(0), places.pop(0)
                # Several GPUs are shared out; runs on the same one share its memory.
                gpu = gpus[place % len(gpus)] if gpus else None
                process = context.Process(target=_work, args=(folder, gpu))
                process.start()
                running[process] = folder, place, time.perf_counter()
            multiprocessing.connection.wait([process.sentinel for process in running])
            for process in [each for each in running if not each.is_alive()]:
                folder, place, start = running.pop(process)
                places.append(place)
                if process.exitcode or not (folder / RESULT).exists():
                    failed.append(folder)
                    continue
                done, seconds = len(folders) - len(waiting) - len(running), time.perf_counter() - start
                print(f"[{done}/{len(folders)}] {folder.relative_to(root)}: {seconds:.0f} s", flush=True)
    except KeyboardInterrupt:
        for process in running:  # interrupted too, they save what they have
            with contextlib.suppress(KeyboardInterrupt):
                process.join()
        raise
    if failed:
        lines = (failed[0] / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise ValueError(
            f"{failed[0]} failed: {lines[-1] if lines else 'it said nothing.'} All of what it said is in "
            f"{failed[0] / LOG}. The other runs are kept; give the same command again once this is mended."
        )


def _work(folder: Path, gpu: str | None) -> None:
    """In the process of one run: what it says goes into a file."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    threading.Thread(target=_follow, args=(multiprocessing.parent_process(),), daemon=True).start()
    importlib.import_module(WORKER).run_arm(folder)


def _follow(parent: Any) -> None:
    """End with the command that started this, however that ended: the next one goes on in the same folder."""
    parent.join()
    os.kill(os.getpid(), signal.SIGINT)


def _gpus() -> list[str]:
    """Names of those that may be used."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    return [str(i) for i in range(torch.cuda.device_count())]


def _take_config(options: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The command line without --config, and what is in that file, lest an arm reads it after it was changed."""
    for i, word in enumerate(options):
        name, equals, value = word.partition("=")
        if name == "--config" and (equals or i + 1 < len(options)):
            path = value if equals else options[i + 1]
            return [*options[:i], *options[i + (1 if equals else 2) :]], read_yaml(path)
    return options, {}


def with_config(options: list[str], settings: dict[str, Any], folder: Path) -> list[str]:
    """The command line that reads `settings` from a file in `folder`."""
    if not settings:
        return options
    (folder / CONFIG).write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
    return [*options, "--config", str(folder / CONFIG)]


def _without(options: list[str], *names: str) -> list[str]:
    """The command line without options of one value."""
    kept, words = [], iter(options)
    for word in words:
        name, equals, _ = word.partition("=")
        if name.startswith("--") and name[2:] in names:
            if not equals:
                next(words, None)
        else:
            kept.append(word)
    return kept


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> list[float]:
    numbers = [float(word) for word in _words(text)]
    if not all(0 < number < 100 for number in numbers):
        raise argparse.ArgumentTypeError(f"expected numbers above 0 (γ = 0 is the arm linear), got {text!r}")
    return numbers


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)
