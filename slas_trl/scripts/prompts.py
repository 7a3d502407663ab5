"""
`slas-trl prompts`: which prompts are worth training on. `score` samples images of each prompt as training would, and
writes how much their rewards differ; `filter` writes the list of those whose rewards differ enough.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tqdm.auto import tqdm

from slas_trl.advantages import Advantages
from slas_trl.policy import Rollout
from slas_trl.rewards.by_name import masked
from slas_trl.scripts.arguments import SLASScriptArguments, parse
from slas_trl.scripts.model import make_pipeline
from slas_trl.scripts.prompt_scores import (
    FORMATS,
    ScoreFile,
    Selection,
    fingerprint,
    read_scores,
    spread,
    write_prompts,
)
from slas_trl.scripts.train import train_prompts
from slas_trl.trainer import SLASConfig, SLASTrainer
from slas_trl.trainer.experts import calls_of
from slas_trl.trainer.prompts import load_prompts
from slas_trl.trainer.scoring import Scores


# Settings that the scores depend on, beside the prompts, the model and the rewards.
DECISIVE = (
    *("seed", "num_generations", "per_device_train_batch_size", "num_inference_steps", "guidance_scale"),
    *("height", "width", "eta", "noise_schedule", "noise_level", "sde_window_size", "sde_window_start"),
    *("sde_window_slide_every", "init_same_noise", "pipeline_columns", "pipeline_kwargs", "reward_weights"),
    *("model_init_kwargs", "bf16", "fp16"),
)


def make_parser(prog: str = "slas-trl prompts") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, allow_abbrev=False, description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    score = commands.add_parser(
        "score",
        allow_abbrev=False,
        help="sample num_generations images of each prompt and write mean, std and share of distinct scores",
        description="Sample --num_generations images of each prompt, as training would, and write for each prompt "
        "mean, std and share of distinct values of every reward and of their weighted sum. What is there already is "
        "not computed again.",
        epilog="All options of slas-trl train say what is sampled and how: --config, --model_name_or_path, "
        "--adapter, --dataset_name, --reward_funcs, --reward_weights, --num_generations, --seed ... Without "
        "--model_name_or_path: the embedded pipeline.",
    )
    score.add_argument("--output", required=True, help="file of scores to write, or to go on with (.jsonl)")
    choose = commands.add_parser(
        "filter",
        allow_abbrev=False,
        help="write the prompts whose scores differ enough, for --dataset_name of slas-trl train",
        description="Write the prompts that meet all conditions, with all their columns, for --dataset_name of "
        "slas-trl train.",
    )
    choose.add_argument("--scores", required=True, help="file that slas-trl prompts score wrote")
    choose.add_argument("--output", required=True, help=f"list to write ({', '.join(FORMATS)})")
    choose.add_argument("--reward", help="reward to go by (default: the weighted sum, which is trained on)")
    choose.add_argument("--min_std", type=float, help="least std of a prompt's scores, in units of the reward")
    choose.add_argument("--min_distinct", type=float, help="least share of distinct scores, in [0, 1]")
    choose.add_argument("--min_mean", type=float, help="least mean score: leaves out what always fails")
    choose.add_argument("--max_mean", type=float, help="largest mean score: leaves out what is solved")
    choose.add_argument("--keep_top", type=float, help="of those left, keep this share, (0, 1], of the widest std")
    choose.add_argument("--dataset_name", help="the prompts, where they are no longer where they were scored")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if args.command is None:
        parser.parse_args(rest)  # nothing is known but the commands
        parser.print_help()
    elif args.command == "score":
        score(Path(args.output), rest)
    else:
        if rest:
            parser.error(f"unknown arguments of filter: {' '.join(rest)}")
        filter_prompts(args)


def score(output: Path, argv: Sequence[str]) -> None:
    if output.suffix != ".jsonl":
        raise ValueError(f"--output must end in .jsonl, got {output.name!r}.")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"the folder {output.parent} of --output does not exist. Make it first.")
    script, lora, config = parse(argv, prog="slas-trl prompts score", one_process=True)
    if script.reward_funcs is None:
        raise ValueError("--reward_funcs is missing: name at least one function, as for slas-trl train.")
    if config.world_size > 1:
        raise ValueError(f"slas-trl prompts runs in one process, but there are {config.world_size}. Start it alone.")
    sys.path.append(str(Path.cwd()))  # as for `slas-trl train`
    data = train_prompts(script)
    data = load_prompts(config.prompt_dataset) if data is None else data
    copies = config.num_generations
    prompts_at_once = min(len(data), max(1, config.per_device_train_batch_size // copies))
    header = _header(script, config) | {"prompts": len(data), "fingerprint": fingerprint(data)}
    with tempfile.TemporaryDirectory() as folder:
        _only_sample(config, folder, prompts_at_once)
        pipe = make_pipeline(script, config)
        trainer = ScoringTrainer(pipe, script.reward_funcs, config, data, peft_config=lora.peft_config())
        scores = ScoreFile(output, header)
        bar = tqdm(total=len(data), initial=len(scores.lines), unit="prompt", disable=config.disable_tqdm)
        for start in range(0, len(data), prompts_at_once):
            rows = range(start, min(start + prompts_at_once, len(data)))
            before = len(scores.lines)
            if not all(row in scores.lines for row in rows):
                scores.add(trainer.score_rows(rows, start // prompts_at_once))
                bar.update(len(scores.lines) - before)
        bar.close()
    stds = [line["std"] for line in scores.lines.values() if line["std"] is not None]
    print(f"Wrote {output}: {len(scores.lines)} prompts, {copies} images each, {len(stds)} with two scores or more.")
    if stds:
        equal = sum(std == 0 for std in stds)
        print(f"Std of their weighted rewards: median {statistics.median(stds):.4g}, 0 for {equal} prompts.")


def _header(script: SLASScriptArguments, config: SLASConfig) -> dict[str, Any]:
    """What the scores depend on, before the configuration is changed."""
    return {
        "dataset_name": script.dataset_name or config.prompt_dataset,
        "split": script.dataset_train_split if script.dataset_name else "train",
        "model": script.model_name_or_path,
        **({} if script.adapter is None else {"adapter": script.adapter}),
        "rewards": [masked(reward) for reward in script.reward_funcs or []],
        **{name: value for name in DECISIVE if (value := getattr(config, name)) is not None},
    }


def _only_sample(config: SLASConfig, folder: str, prompts_at_once: int) -> None:
    """Rollouts of some prompts; no files, no trackers, no second denoiser for the KL divergence, no search for γ."""
    images = prompts_at_once * config.num_generations
    config.per_device_train_batch_size = min(config.per_device_train_batch_size, images)
    config.steps_per_generation = -(-images // config.per_device_train_batch_size)
    config.output_dir, config.push_to_hub, config.report_to = folder, False, []
    config.log_completions, config.use_ema, config.beta, config.eval_strategy = False, False, 0.0, "no"
    config.gamma_schedule, config.fisher_update_steps = "constant", None


class ScoringTrainer(SLASTrainer):
    """Samples and scores as a rollout of training does, with the trainer's own method, and trains nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        model = cast(torch.nn.Module, self.model)
        self.model_wrapped = self.accelerator.prepare(model)  # autocast and compilation come with it
        model.eval()
        self.replayer.models.update(calls_of(self.model_wrapped, self.denoiser_names))
        self._scored: tuple[torch.Tensor, Advantages] | None = None

    def score_rows(self, rows: Sequence[int], rollout_index: int) -> list[dict[str, Any]]:
        """A line for each of these prompts, which are one rollout. Its number decides the noise."""
        copies = self.args.num_generations
        self._sample_rollout([row for row in rows for _ in range(copies)], rollout_index)
        assert self._scored is not None  # by `_log_rollout`
        rewards, result = self._scored
        return [
            {
                "row": row,
                "prompt": self.train_dataset[row]["prompt"],
                **spread(result.rewards[images]),
                "rewards": {
                    name: spread(column[images]) for name, column in zip(self.scorer.names, rewards.T, strict=True)
                },
            }
            for i, row in enumerate(rows)
            for images in [slice(i * copies, (i + 1) * copies)]
        ]

    # What the trainer calls on the way

    def _log_rollout(self, scores: Scores, result: Advantages) -> None:
        self._scored = scores.rewards, result

    def _check_before_training(self, chunks: list[Rollout], steps: list[int], rewards: torch.Tensor) -> None:
        self._checked = True

    def _save_unfinished(self, why: str) -> None:
        pass


def filter_prompts(args: argparse.Namespace) -> None:
    output = Path(args.output)
    selection = Selection(args.min_std, args.min_distinct, args.min_mean, args.max_mean, args.keep_top)
    if selection == Selection():
        raise ValueError("nothing to filter by: give --min_std, --min_distinct, --min_mean, --max_mean or --keep_top.")
    if args.keep_top is not None and not 0 < args.keep_top <= 1:
        raise ValueError(f"--keep_top must be a share in (0, 1], got {args.keep_top}.")
    if output.suffix not in FORMATS:
        raise ValueError(f"--output must end in one of {', '.join(FORMATS)}, got {output.name!r}.")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"the folder {output.parent} of --output does not exist. Make it first.")
    header, lines = read_scores(args.scores)
    if len(lines) < header["prompts"]:
        raise ValueError(
            f"{args.scores} has scores of {len(lines)} of {header['prompts']} prompts. Run its slas-trl prompts score "
            "again: it goes on where it stopped."
        )
    source = args.dataset_name or header["dataset_name"]
    if output.exists() and any(Path(name).exists() and output.samefile(name) for name in (source, args.scores)):
        raise ValueError(f"--output {output} would replace what it is made from. Name another file.")
    data = load_prompts(source, header["split"])
    if fingerprint(data) != header["fingerprint"]:
        raise ValueError(f"the prompts of {source} are not those that were scored. Score them again.")
    if args.reward is not None and any(args.reward not in line["rewards"] for line in lines.values()):
        names = ", ".join(next(iter(lines.values()))["rewards"])
        raise ValueError(f"there are no scores of --reward {args.reward}, only of {names}.")
    scores = {row: line if args.reward is None else line["rewards"][args.reward] for row, line in lines.items()}
    kept, dropped = selection.rows(scores)
    reasons = "; ".join(f"{count} {reason}" for reason, count in dropped.items())
    if not kept:
        widest = max((line["std"] for line in scores.values() if line["std"] is not None), default=None)
        raise ValueError(f"no prompt is left of {len(data)} (dropped: {reasons}). The largest std is {widest}.")
    write_prompts(data, kept, output)
    print(f"Kept {len(kept)} of {len(data)} prompts in {output} (dropped: {reasons}).")
    print(f"Train on them with slas-trl train --dataset_name {output}.")
