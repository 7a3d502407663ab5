"""`slas-trl compare`: train several kinds of advantages from the same base, with the same noise, and compare them."""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch

from ..advantages import check_number
from ..rewards.resolve import masked
from ..run_files import write_text
from .arguments import flags_of, parse, take_config
from .compare_arm import BASE, EVALUATIONS, RESULT, SPEC
from .train import held_out_prompts


OUTPUT_DIR, LOG = "runs/comparison", "log.txt"
# What makes an arm, and what belongs to all of them; an option of these would be silently overridden.
OURS = {
    "gamma": "--gammas, which makes an arm of each",
    "scale_rewards": "--arms: grpo is the std of the group, linear and slas that of the batch",
    "resume_from_checkpoint": "the same command once more, which goes on from what is there",
    "push_to_hub": "`slas-trl train`, once an arm is chosen",
}


class Arm(NamedTuple):
    name: str  # of its folder
    label: str  # in tables and pictures
    options: tuple[str, ...]  # of `slas-trl train`


def arms_of(kinds: Sequence[str], gammas: Sequence[float]) -> list[Arm]:
    """The arms of `--arms` and `--gammas`. Raises `ValueError` for an unknown or double one."""
    fixed = ("--gamma", "0", "--gamma_schedule", "constant")
    known = {
        "grpo": [Arm("grpo", "group std", ("--scale_rewards", "group", *fixed))],
        "linear": [Arm("linear", "batch std, γ 0", ("--scale_rewards", "batch", *fixed))],
        "slas": [],
    }
    for gamma in gammas:
        check_number("--gammas", gamma, "(0, 100)")  # γ = 0 is the arm linear
        options = ("--scale_rewards", "batch", "--gamma", f"{gamma:g}")
        known["slas"].append(Arm(f"slas-{gamma:g}", f"batch std, γ {gamma:g}", options))
    arms = [arm for kind in kinds for arm in known.get(kind, [])]
    if not arms or not all(map(known.get, kinds)) or len({*arms}) < len(arms):
        raise ValueError(
            f"--arms: expected some of {', '.join(known)}, each once, and for slas different --gammas; got "
            f"{', '.join(kinds)!r} and γ {', '.join(map(str, gammas))}."
        )
    return arms


def make_parser() -> argparse.ArgumentParser:
    epilog = "All options of `slas-trl train` are taken too, --config among them, and hold for every arm. Arms that "
    epilog += "are finished are not run again: after an interruption, give the same command."
    texts = {"prog": "slas-trl compare", "description": __doc__, "epilog": epilog}
    parser = argparse.ArgumentParser(allow_abbrev=False, **texts)
    kinds = "grpo (std of the group), linear (std of the batch), slas (shaped as well, by each of --gammas)"
    parser.add_argument("--arms", default="grpo,linear,slas", help=f"kinds of advantages: {kinds}")
    parser.add_argument("--gammas", type=_numbers, default="0.25,0.5,1", help="γ of the slas arms (0.25,0.5,1)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from --seed on (default: 3)")
    parser.add_argument("--processes", type=int, default=1, help="arms that are trained at a time (default: 1)")
    parser.add_argument("--eval_every", type=int, help="updates between evaluations (default: an eighth of all)")
    parser.add_argument("--eval_prompts", type=int, help="number of held-out prompts (default: all)")
    parser.add_argument("--eval_images_per_prompt", type=int, default=4, help="images of each (default: 4)")
    parser.add_argument("--output_dir", "--output-dir", help=f"folder of the comparison (default: {OUTPUT_DIR})")
    parser.add_argument("--seed", type=int, help="first seed (default: that of a training)")
    return parser


def main(argv: Sequence[str]) -> None:
    args, options = make_parser().parse_known_args(argv)
    for name in ("seeds", "processes", "eval_every", "eval_prompts", "eval_images_per_prompt"):
        check_number(f"--{name}", 1 if (number := getattr(args, name)) is None else number, "[1, inf)")
    arms = arms_of([kind.strip() for kind in args.arms.split(",")], args.gammas)
    options, settings = take_config(options)
    # A file that was made for `slas-trl train` names a γ, which the arms replace; it may also ask for an upload.
    clash = flags_of(options).keys() & OURS.keys()
    clash |= {name for name in ("resume_from_checkpoint", "push_to_hub") if settings.get(name)}
    for name in sorted(clash):
        raise ValueError(f"{name} would be one for all arms; use {OURS[name]}.")
    if masked(text := str([argv, {name: value for name, value in settings.items() if value is not None}])) != text:
        raise ValueError(f"{masked(text)} holds a secret, which compare would write down: put it in the environment.")
    # Each arm is for one device, and so is this process, which only reads the options.
    if gpus := _gpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[0]
    script, _, config = [parse([*options, *arm.options], "slas-trl compare", settings=settings) for arm in arms][-1]
    script.named_rewards()
    if config.gamma_schedule == "ess" and sum(arm.name.startswith("slas") for arm in arms) > 1:
        raise ValueError("gamma_schedule=ess chooses γ by itself, whatever --gammas say: give one of them.")
    if config.max_steps < 1:
        raise ValueError("--max_steps is missing: arms are compared after equally many updates.")
    prompts = held_out_prompts(script, config, "slas-trl compare")
    if args.eval_prompts is not None and args.eval_prompts > len(prompts):
        raise ValueError(f"--eval_prompts is {args.eval_prompts}, but there are {len(prompts)} held-out prompts.")
    every, number = args.eval_every or max(1, config.max_steps // 8), args.eval_prompts or len(prompts)
    shared: dict[str, Any] = {"eval_every": every, "eval_prompts": number}
    shared |= {"eval_images_per_prompt": args.eval_images_per_prompt, "config": settings}
    root = Path(args.output_dir or settings.get("output_dir") or OUTPUT_DIR)
    first = config.seed if args.seed is None else args.seed
    seeds = [*range(first, first + args.seeds)]
    jobs = {root / BASE: {"arm": BASE, "seed": first, "options": options, **shared}}
    for seed in seeds:
        for arm in arms:
            spec = {"arm": arm.name, "seed": seed, "options": [*options, *arm.options], **shared}
            jobs[root / arm.name / f"seed-{seed}"] = spec
    todo = [folder for folder, spec in jobs.items() if not _is_finished(folder, spec)]
    print(f"Comparing {len(arms)} arms with {len(seeds)} seeds: {len(todo)} of {len(jobs)} runs to do, in {root}.")
    for folder in todo:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / SPEC, json.dumps(jobs[folder], indent=2) + "\n")
    _run_all(todo, args.processes, gpus, root)

    from .compare_report import write_report  # now that matplotlib is needed

    labels = {arm.name: arm.label for arm in arms}
    text = write_report(root, labels, seeds, shlex.join(["slas-trl", "compare", *argv]))
    print(f"\n{text}\n\nDone. Look at comparison.md, comparison.png and samples.png in {root}.")


def _is_finished(folder: Path, spec: dict[str, Any]) -> bool:
    """Raises `ValueError` when the folder holds something else than what was asked for."""
    if not ((folder / RESULT).exists() or (folder / EVALUATIONS).exists()):  # nothing was computed
        return False
    then = json.loads((folder / SPEC).read_text(encoding="utf-8"))
    if changed := {name: (then.get(name), spec[name]) for name in spec if then.get(name) != spec[name]}:
        raise ValueError(f"{folder} has other settings (then, now): {changed}. Name another --output_dir.")
    return (folder / RESULT).exists()


def _run_all(folders: list[Path], processes: int, gpus: list[str], root: Path) -> None:
    """One process for each run, `processes` at a time; if one fails, the others are interrupted, and save."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
    waiting, running = list(folders), {}
    try:
        while waiting or running:
            if waiting and len(running) < processes:
                folder, place = waiting.pop(0), min(set(range(processes)) - {place for *_, place in running.values()})
                running[_start(folder, gpus, place)] = folder, time.perf_counter(), place
                continue
            time.sleep(0.1)
            for process in [each for each in running if each.poll() is not None]:
                folder, start, _ = running.pop(process)
                if process.returncode:
                    lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
                    raise ValueError(
                        f"{folder} failed: {lines[-1] if lines else 'it said nothing.'} See {folder / LOG}. "
                        "The other runs are kept; give the same command again once this is mended."
                    )
                done, seconds = len(folders) - len(waiting) - len(running), time.perf_counter() - start
                print(f"[{done}/{len(folders)}] {folder.relative_to(root)}: {seconds:.0f} s", flush=True)
    finally:
        for process in running:
            cast(IO, process.stdin).close()
        for process in running:
            process.wait()


def _start(folder: Path, gpus: list[str], place: int) -> subprocess.Popen:
    """A process that interrupts itself when its stdin is closed, be it that this one was killed."""
    # Several GPUs are shared out; runs on the same one share its memory.
    environ = {"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if gpus else {}
    command = [sys.executable, "-m", "slas_trl.scripts.compare_arm", str(folder)]
    with (folder / LOG).open("ab") as log:
        streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": log, "stderr": subprocess.STDOUT}
        # Ctrl-C reaches it through this process alone.
        return subprocess.Popen(command, env=os.environ | environ, start_new_session=True, **streams)


def _gpus() -> list[str]:
    """Names of those that may be used."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    return [*filter(None, names.split(","))]


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",") if word.strip()]
