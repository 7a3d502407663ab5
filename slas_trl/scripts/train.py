"""`slas-trl train`: fine-tune a pipeline and report what it learned. `accelerate launch -m` runs several processes."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from diffusers import DiffusionPipeline
from huggingface_hub import CommitInfo
from transformers.trainer_utils import IntervalStrategy

from ..publishing.repository import PushError
from ..rewards.resolve import shown_name
from ..trainer import SLASConfig, SLASTrainer
from ..trainer.prompts import load_prompts
from .arguments import LoraArguments, SLASScriptArguments, parse
from .report import RunReport


def main(argv: Sequence[str]) -> None:
    script, lora, config = parse(argv)
    reward_funcs, base_model, adapter = script.named_rewards(), script.model_name_or_path, script.adapter
    data, eval_data = train_prompts(script), eval_prompts(script, config)  # fail early: a model takes longer
    trainer = make_trainer(script, lora, config, data, eval_data)
    if adapter is not None:
        trainer.publisher.started_from = Path(adapter).resolve().name if Path(adapter).exists() else adapter
    chief = trainer.is_world_process_zero()
    if chief:
        start = "" if adapter is None else f", from the adapter {adapter},"
        print(
            f"Training {base_model or 'the embedded pipeline'}{start} on {len(trainer.train_dataset)} prompts "
            f"for {', '.join(map(shown_name, reward_funcs))}; results go to {config.output_dir}. Each rollout "
            f"is {config.generation_batch_size} images of {config.num_inference_steps} steps."
        )
    report = before = None
    if script.report_prompts != 0:
        report = RunReport(trainer, base_model, script.report_prompts, script.report_images_per_prompt)
        before = report.measure()
    # "true" is the newest checkpoint, as in transformers' own examples.
    resume = config.resume_from_checkpoint
    try:
        trainer.train(resume_from_checkpoint=True if resume in ("true", "True") else resume)
    except BaseException:
        print(file=sys.stderr)  # ends the line of the progress bar, for the message that follows
        raise
    trainer.save_model(_internal_call=True)  # pushed below, with the report
    try:
        if report is not None and before is not None:
            text = report.write(before, report.measure())
            if chief:
                print(f"\n{text}\n")
        if not config.push_to_hub:
            trainer.create_model_card(dataset_name=script.dataset_name)
    except OSError as error:
        raise OSError(f"The report could not be written ({error}). The trained weights are there.") from error
    if config.push_to_hub:
        push(trainer, script.dataset_name)
    if chief:
        print(f"Done. Look at {config.output_dir}: README.md says what is there and how to use it.")


def make_trainer(
    script: SLASScriptArguments,
    lora: LoraArguments,
    config: SLASConfig,
    data: Dataset | None,
    eval_data: Dataset | None = None,
    pipe: DiffusionPipeline | None = None,
) -> SLASTrainer:
    rewards: dict[str, Any] = {"reward_funcs": script.named_rewards(), "eval_reward_funcs": script.eval_reward_funcs}
    prompts: dict[str, Any] = {"train_dataset": data, "eval_dataset": eval_data}
    model = script.load_pipeline(config) if pipe is None else pipe
    return SLASTrainer(model=model, args=config, peft_config=lora.peft_config(), **rewards, **prompts)


def push(trainer: SLASTrainer, dataset_name: str | None) -> None:
    """Where that fails, the run has ended well all the same, and says what to do."""
    try:
        done = trainer.push_to_hub(dataset_name=dataset_name)
        if isinstance(done, CommitInfo):  # on the main process
            print(f"Pushed: {done.commit_url}")
    except (PushError, ValueError) as error:  # ValueError on the processes that do not push
        if trainer.is_world_process_zero():
            print(f"slas-trl train: {error}", file=sys.stderr)


def train_prompts(script: SLASScriptArguments) -> Dataset | None:
    """`None` leaves it to the trainer, which then takes `prompt_dataset`."""
    return None if script.dataset_name is None else load_prompts(script.dataset_name, script.dataset_train_split)


def eval_prompts(script: SLASScriptArguments, config: SLASConfig) -> Dataset | None:
    if config.eval_strategy != "no":
        return held_out_prompts(script, config, f"eval_strategy={IntervalStrategy(config.eval_strategy).value}")
    if script.eval_reward_funcs:
        raise ValueError("eval_reward_funcs need an evaluation: set --eval_strategy steps --eval_steps 10, say.")
    return None if script.eval_dataset_name is None else held_out_prompts(script, config, "")


def held_out_prompts(script: SLASScriptArguments, config: SLASConfig, needed_by: str) -> Dataset:
    """Raises `ValueError` where there are none."""
    name = script.eval_dataset_name or script.dataset_name or config.prompt_dataset
    if script.eval_dataset_name is None and Path(name).is_file():  # it has no splits, and is what is trained on
        raise ValueError(f"{needed_by} needs prompts: name a file as --eval_dataset_name.")
    return load_prompts(name, script.dataset_test_split)


if __name__ == "__main__":  # as `accelerate launch -m slas_trl.scripts.train`
    from ..cli.main import run_script

    sys.exit(run_script("train", sys.argv[1:]))
