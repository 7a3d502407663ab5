"""
`slas-trl prompts score`: which prompts are worth training on. Samples images of each prompt as training would, and
writes the prompts again, with how much their rewards differ.
"""

import argparse
import hashlib
import json
import math
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from ..advantages import compute_advantages
from ..policy.checks import denoisers_of
from ..rewards.resolve import masked
from ..run_files import read_lines, write_lines, write_text
from ..seeds import generators
from ..trainer import SLASConfig, SLASTrainer, sampling
from ..trainer.pipeline_inputs import as_pictures, is_picture_column
from ..trainer.prompts import load_prompts
from ..trainer.scoring import Scoring
from .arguments import SLASScriptArguments, parse
from .train import make_trainer, train_prompts


# What the scores depend on, beside the prompts, the model and the rewards.
DECISIVE = (
    *("seed", "num_generations", "per_device_train_batch_size", "num_inference_steps", "guidance_scale"),
    *("height", "width", "eta", "noise_schedule", "noise_level", "sde_window_size", "sde_window_start"),
    *("sde_window_slide_every", "init_same_noise", "pipeline_columns", "pipeline_kwargs", "reward_weights"),
    *("model_init_kwargs", "bf16", "fp16"),
)

FILTERING = (
    "prompts filter was removed; scores are columns, and filtering is a line of datasets: load_dataset('json', "
    "data_files='scores.jsonl', split='train').filter(lambda row: (row['std'] or 0) > 0.01).to_json('kept.jsonl')"
)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="slas-trl prompts", allow_abbrev=False, description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    score = commands.add_parser(
        "score",
        allow_abbrev=False,
        help="sample num_generations images of each prompt and write mean, std and share of distinct scores",
        description="Sample --num_generations images of each prompt, as training would, and write each prompt with "
        "mean, std and share of distinct values of every reward and of their weighted sum. What is there already is "
        "not computed again.",
        epilog="All options of slas-trl train say what is sampled and how: --config, --model_name_or_path, "
        "--adapter, --dataset_name, --reward_funcs, --reward_weights, --num_generations, --seed ... Without "
        "--model_name_or_path: the embedded pipeline.",
    )
    what = "file of prompts and scores to write, or to go on with (.jsonl)"
    score.add_argument("--output", required=True, help=what)
    return parser


def main(argv: Sequence[str]) -> None:
    parser = make_parser()
    if argv[:1] == ["filter"]:
        raise ValueError(FILTERING)
    args, rest = parser.parse_known_args(argv)
    if args.command is None:
        parser.parse_args(rest)  # nothing is known but the commands
        parser.print_help()
    else:
        score(Path(args.output), rest)


def score(output: Path, argv: Sequence[str]) -> None:
    if output.suffix != ".jsonl":
        raise ValueError(f"--output must end in .jsonl, got {output.name!r}.")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"the folder {output.parent} of --output does not exist. Make it first.")
    script, lora, config = parse(argv, prog="slas-trl prompts score", one_process=True)
    script.named_rewards()
    script.eval_reward_funcs, data = None, train_prompts(script)
    data = load_prompts(config.prompt_dataset) if data is None else data
    copies = config.num_generations
    size = max(1, config.per_device_train_batch_size // copies)  # prompts in a call
    lines = _scored_before(output, _settings(script, config, data))
    with tempfile.TemporaryDirectory() as folder:
        _only_sample(config, min(size, len(data)), folder)
        trainer = make_trainer(script, lora, config, data)
        for denoiser in denoisers_of(trainer.pipe).values():
            trainer.accelerator.prepare(denoiser)  # autocast
        bar = tqdm(total=len(data), initial=len(lines), unit="prompt", disable=config.disable_tqdm)
        for start in range(0, len(data), size):
            rows = range(start, min(start + size, len(data)))
            scored = [] if lines.keys() >= {*rows} else _score_rows(trainer, rows, start // size)
            new = [_as_json(data, each["row"], output.parent) | each for each in scored if each["row"] not in lines]
            lines |= {line["row"]: line for line in new}
            with output.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in new)
            bar.update(len(new))
        bar.close()
    stds = [line["std"] for line in lines.values() if line["std"] is not None]
    print(f"Wrote {output}: {len(lines)} prompts, {copies} images each, {len(stds)} with two scores or more.")
    if stds:
        middle, equal = statistics.median(stds), stds.count(0)
        print(f"Std of their weighted rewards: median {middle:.4g}, 0 for {equal} prompts.")


def _settings(script: SLASScriptArguments, config: SLASConfig, data: Dataset) -> dict[str, Any]:
    given = {
        "dataset_name": script.dataset_name or config.prompt_dataset,
        "prompts": hashlib.sha256("\n".join(data["prompt"]).encode()).hexdigest(),
        "model": script.model_name_or_path,
        "adapter": script.adapter,
        "rewards": [masked(reward) for reward in script.reward_funcs or []],
        **{name: getattr(config, name) for name in DECISIVE},
    }
    return {name: value for name, value in json.loads(json.dumps(given)).items() if value is not None}


def _scored_before(output: Path, settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The lines of `output` by row, if it was made with the same settings, which a file beside it holds."""
    beside = output.with_suffix(".settings.json")
    if not output.is_file() or not output.stat().st_size:
        write_text(beside, json.dumps(settings, indent=2) + "\n")
        return {}
    then = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    if changed := {k: (then.get(k), settings.get(k)) for k in then | settings if then.get(k) != settings.get(k)}:
        raise ValueError(
            f"{output} holds something else, or scores of other settings (then, now): {changed}. Name another file."
        )
    lines = read_lines(output)
    write_lines(output, lines)  # without half a line, which a killed run has left
    return {line["row"]: line for line in lines}


def _only_sample(config: SLASConfig, prompts: int, folder: str) -> None:
    """Rollouts of some prompts; no files, no trackers, no second denoiser for the KL divergence, no search for γ."""
    images = prompts * config.num_generations
    config.per_device_train_batch_size = min(config.per_device_train_batch_size, images)
    config.steps_per_generation = -(-images // config.per_device_train_batch_size)
    config.output_dir, config.push_to_hub, config.report_to = folder, False, []
    config.log_completions, config.use_ema, config.beta, config.eval_strategy = False, False, 0.0, "no"
    config.gamma_schedule, config.fisher_update_steps = "constant", None


def _score_rows(trainer: SLASTrainer, rows: Sequence[int], rollout_index: int) -> list[dict[str, Any]]:
    """The scores of these prompts, which are one rollout of a training; its number decides the noise."""
    args, copies = trainer.args, trainer.args.num_generations
    indices = [row for row in rows for _ in range(copies)]
    rng = np.random.default_rng([args.seed, sampling.TIMESTEPS, rollout_index])
    trainer.replayer.scheduler.window = sampling.window_of(args, rollout_index, rng)
    keys = [(args.seed, sampling.STEP_NOISE, rollout_index, i) for i in range(len(indices))]
    noise = iter(generators(keys))
    with Scoring(trainer.scorer) as scoring:
        for batch in trainer.batches(indices, rollout_index):
            rollout = trainer.replayer.sample(noise_generator=[next(noise) for _ in batch.rows], **batch.call)
            made = as_pictures(rollout.images, rollout.problems, batch.call["prompt"])
            scoring.add(batch.prompts, made, batch.columns)
        scores = scoring.gather().rewards  # (N, K)
    total = compute_advantages(scores, copies, args).rewards
    groups = zip(rows, total.view(-1, copies), scores.view(len(rows), copies, -1), strict=True)
    scored = []
    for row, of_sum, of_each in groups:
        rewards = dict(zip(trainer.scorer.names, map(_statistics, of_each.T), strict=True))
        scored.append({"row": row, **_statistics(of_sum), "rewards": rewards})
    return scored


def _statistics(scores: torch.Tensor) -> dict[str, float | None]:
    """Mean, std as training takes it, and share of distinct values of one prompt's scores `(G,)`; NaN is no score."""
    scored = scores[~scores.isnan()]
    std = compute_advantages(scores, len(scores)).group_std.item()
    return {
        "mean": scored.mean().item() if len(scored) else None,
        "std": None if math.isnan(std) else std,
        "distinct": len(scored.float().unique()) / len(scored) if len(scored) else None,
    }


def _as_json(data: Dataset, i: int, folder: Path) -> dict[str, Any]:
    """A row, without images that are in the data set; paths of others as seen from `folder`."""
    row: dict[str, Any] = data[i]
    for name in filter(lambda name: is_picture_column(data, name), list(row)):
        paths = row[name] if isinstance(row[name], list) else [row[name]]
        if not all(isinstance(path, str | None) for path in paths):
            del row[name]
            continue
        paths = [os.path.relpath(path, folder) if path and Path(path).is_file() else path for path in paths]
        row[name] = paths if isinstance(row[name], list) else paths[0]
    return row
