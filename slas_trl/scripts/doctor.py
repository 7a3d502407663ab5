"""
`slas-trl doctor`: would this training start, and what would it be like? Takes the options of `slas-trl train`, does
what its first rollout and its first micro-step do, and prints what it finds. It trains nothing and writes nothing.
"""

import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline

from slas_trl.policy.doctor import denoisers_of, pipeline_problems
from slas_trl.rewards.by_name import RewardFunc, resolve_reward, reward_name
from slas_trl.schedulers import stochastic_scheduler
from slas_trl.scripts.arguments import LoraArguments, SLASScriptArguments, parse
from slas_trl.scripts.doctor_report import DoctorReport, print_findings, print_pipeline, print_row, print_weights
from slas_trl.scripts.examination import ExaminedTrainer, Findings
from slas_trl.scripts.model import make_pipeline
from slas_trl.scripts.train import eval_prompts, train_prompts
from slas_trl.trainer import SLASConfig
from slas_trl.trainer.checkpoints import last_whole_checkpoint, read_state
from slas_trl.trainer.prompts import load_prompts
from slas_trl.trainer.scoring import RewardScorer


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if training could start, and 1 if not."""
    script, lora, config = parse(sys.argv[1:] if argv is None else argv, prog="slas-trl doctor", one_process=True)
    if config.world_size > 1:
        raise ValueError(f"slas-trl doctor runs in one process, but there are {config.world_size}. Start it alone.")
    sys.path.append(str(Path.cwd()))  # as for `slas-trl train`
    pipe = make_pipeline(script, config)
    with tempfile.TemporaryDirectory() as folder:
        findings = Doctor(pipe, script, lora, config, folder).examine()
    print_findings(findings)
    return 1 if findings.refusals else 0


class Doctor:
    """
    Args:
        pipe ([`~diffusers.DiffusionPipeline`]): the pipeline; what is wrong with it is put right where that can be.
        script, lora, config: the options of `slas-trl train`; those that are refused are replaced.
        folder (`str`): where to write what is written all the same.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        script: SLASScriptArguments,
        lora: LoraArguments,
        config: SLASConfig,
        folder: str,
    ):
        self.pipe: Any = pipe
        self.script, self.lora, self.config = script, lora, config
        self.findings = Findings()
        # Neither files nor a repository on the Hub.
        self.output_dir, config.output_dir, config.push_to_hub = Path(config.output_dir or "."), folder, False

    def examine(self) -> Findings:
        """Examine all of it, and print the report."""
        config, findings = self.config, self.findings
        findings.refusals += pipeline_problems(self.pipe)
        scheduler = self._converted_scheduler()
        print_pipeline(self.pipe, self.script.model_name_or_path or "the embedded one", scheduler)
        self._put_right(scheduler)
        weights = config.reward_weights
        functions, all_rewards = self._rewards()
        self.held_out = self._usable(self.script.eval_reward_funcs or [])
        data, eval_data = self._prompts()
        trainer = None
        if data is not None and not list(pipeline_problems(self.pipe)):
            trainer = self._trainer(functions or [_no_reward], data, eval_data)
        if trainer is None:
            print_weights(self.pipe)
            return findings
        report = DoctorReport(trainer, self.script.adapter, findings)
        report.print_trained()
        # Whole chunks and whole groups, of the first rollout.
        images = math.lcm(config.per_device_train_batch_size, config.num_generations)
        print(f"slas-trl doctor: sampling {images} images ...", file=sys.stderr)
        trainer.examine(next(iter(trainer.get_train_dataloader()))[:images], findings)
        if trainer.rollout is None:
            print_weights(self.pipe)
            return findings
        report.print_sampling(trainer.rollout)
        if trainer.rewards is not None and functions:
            report.print_rewards(trainer.rewards, as_asked=all_rewards and config.reward_weights == weights)
        report.print_costs(trainer.rollout)
        return findings

    def _converted_scheduler(self) -> Any:
        if self.pipe.components.get("scheduler") is None:
            return None
        try:
            return stochastic_scheduler(
                self.pipe,
                noise_schedule=self.config.noise_schedule,
                noise_level=self.config.noise_level,
                eta=self.config.eta,
            )
        except ValueError as error:
            self.findings.refuse(error)
            return None

    def _put_right(self, scheduler: Any) -> None:
        """What is refused of the pipeline is put right in memory where it can be, so that the rest can be measured."""
        changed = []
        for module in [m for denoiser in denoisers_of(self.pipe).values() for m in denoiser.modules()]:
            if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0:
                module.p = 0.0
                changed = ["without dropout"]
        if scheduler is not None and self.pipe.scheduler.order != 1:
            self.pipe.scheduler = scheduler
            changed.append("with the converted scheduler")
        if changed:
            print_row("measured", f"{' and '.join(changed)}; see what is refused below")

    def _rewards(self) -> tuple[list[RewardFunc], bool]:
        """The rewards that can be used, and whether these are all."""
        named = self.script.reward_funcs or []
        if not named:
            self.findings.refusals.append(
                "No reward is named: rewards not checked. Give --reward_funcs: functions of slas_trl.rewards, or "
                "package.module:function."
            )
        functions = self._usable(named)
        usable = list({reward_name(function): function for function in functions}.values())
        if len(usable) < len(functions):
            try:
                RewardScorer(functions)
            except ValueError as error:  # two of one name
                self.findings.refuse(error)
        if len(usable) < len(named):
            self.config.reward_weights = None  # they were for all of them
        return usable, len(usable) == len(named)

    def _usable(self, named: list[str]) -> list[RewardFunc]:
        functions = []
        for reward in named:
            try:
                functions.append(resolve_reward(reward))
            except (ValueError, TypeError, OSError, ImportError) as error:
                self.findings.refuse(error)
        return functions

    def _prompts(self) -> tuple[Dataset | None, Dataset | None]:
        """To train and to evaluate on."""
        data = eval_data = None
        try:
            data = train_prompts(self.script)
            data = load_prompts(self.config.prompt_dataset) if data is None else data
        except Exception as error:
            self.findings.refuse(error)
        try:
            eval_data = eval_prompts(self.script, self.config)
        except Exception as error:
            self.findings.refuse(error)
            self.config.eval_strategy = "no"
        return data, eval_data

    def _trainer(
        self, functions: list[RewardFunc], data: Dataset, eval_data: Dataset | None
    ) -> ExaminedTrainer | None:
        """The trainer. What it refuses is left aside where that can be, to find what else it refuses."""
        config = self.config
        prompts = config.images_per_rollout // config.num_generations
        while True:
            try:
                trainer = ExaminedTrainer(
                    self.pipe,
                    functions,
                    config,
                    data,
                    eval_data,
                    peft_config=self.lora.peft_config(),
                    eval_reward_funcs=self.held_out,
                )
                break
            except Exception as error:
                self.findings.refuse(error)
            if config.reward_weights is not None and len(config.reward_weights) != len(functions):
                config.reward_weights = None
            elif self.held_out:
                self.held_out = []
            elif len(data) < prompts:
                data = data.select([i % len(data) for i in range(prompts)])
            else:
                return None
        if config.resume_from_checkpoint:
            try:
                self._resume(trainer, config.resume_from_checkpoint)
            except Exception as error:
                self.findings.refuse(error)
        return trainer

    def _resume(self, trainer: ExaminedTrainer, checkpoint: str) -> None:
        folder = last_whole_checkpoint(self.output_dir) if checkpoint in ("true", "True") else Path(checkpoint)
        if folder is None:
            raise ValueError(f"There is no whole checkpoint in {str(self.output_dir)!r} to resume from.")
        read_state(folder)
        trainer._load_from_checkpoint(str(folder))
        trainer._micro_step = 0  # a rollout of its own


def _no_reward(prompts: list[str], images: list[Any], **columns: Any) -> list[None]:
    """Stands in where no reward can be used."""
    return [None] * len(images)
