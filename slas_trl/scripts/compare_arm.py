"""One arm of `slas-trl compare`: `python -m slas_trl.scripts.compare_arm FOLDER`, which has an `arm.json`."""

import copy
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from ..advantages import weighted_sum
from ..evaluation.shapes import SCORES
from ..images import still
from ..objective import gaussian_kl
from ..policy import PipelineReplayer
from ..policy.checks import denoisers_of
from ..run_files import METRICS, SAMPLES, read_lines, write_text
from ..seeds import generators, seed_for
from ..shapes import world
from ..shapes.verifier import verify
from ..statistics import evenly_spaced
from ..trainer import SLASTrainer, checkpoints, sampling
from .arguments import parse
from .train import held_out_prompts, make_trainer, train_prompts


BASE = "base"  # the arm that is not trained
SPEC, EVALUATIONS, RESULT = "arm.json", "evaluations.json", "result.json"
TRAINED = "trained reward"
SHOWN = 6  # pictures that are kept
KL_ROWS = 48  # trajectories that the KL divergence is measured on
# Streams of random numbers beside the trainer's: those of evaluation are the same for all arms and seeds.
NOISE, KL_NOISE, KL_STEPS = 100, 101, 102


class ArmEvaluation(TrainerCallback):
    """
    Scores the policy on the evaluation prompts every so many updates, and at the end, always with the same noise. The
    KL is to the denoisers in `base`, or to the model without its adapter.
    """

    def __init__(
        self, trainer: SLASTrainer, folder: Path, spec: Mapping[str, Any], base: dict[str, torch.nn.Module] | None
    ):
        self.trainer, self.folder, self.spec, self.base = trainer, folder, spec, base
        self.data: Any = trainer.eval_dataset
        self.size = trainer.args.per_device_train_batch_size
        self.done: dict[str, Any] = {}  # by update

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:  # resumed
            done = json.loads((self.folder / EVALUATIONS).read_text(encoding="utf-8"))
            self.done = {step: done[step] for step in done if int(step) <= state.global_step}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.spec["eval_every"] == 0 or state.global_step == state.max_steps:
            self.evaluate(state.global_step)

    def evaluate(self, step: int) -> None:
        self.done[str(step)] = {"scores": self._scores(), "kl": self._kl() if step else 0.0}
        write_text(self.folder / EVALUATIONS, json.dumps(self.done))

    def _scores(self) -> dict[str, list[float]]:
        """By measure, the mean of each prompt."""
        copies, weight_of = self.spec["eval_images_per_prompt"], self.trainer.weight_of
        rows = [row for row in range(len(self.data)) for _ in range(copies)]
        seeds = [seed_for(NOISE, row, i % copies) for i, row in enumerate(rows)]
        scored = self.trainer.evaluator.score(self.data, rows, seeds, self.size)
        rewards = scored.rewards.T.view(len(weight_of), -1, copies)  # (K, P, copies)
        weights = torch.tensor([*weight_of.values()], dtype=torch.float64).view(-1, 1, 1)
        trained = weights.flatten() != 0
        scores = {TRAINED: weighted_sum(rewards[trained], weights[trained])}
        scores |= dict(zip(weight_of, rewards, strict=True))
        return {name: values.nanmean(1).tolist() for name, values in scores.items()}

    @torch.no_grad()
    def _kl(self) -> float:
        """KL of the policy to the base, in nats per latent element: mean over trajectories and their steps."""
        trainer, args, values = self.trainer, self.trainer.args, []
        replayer = PipelineReplayer(trainer.pipe, trainer.replayer.scheduler)
        replayer.scheduler.window = sampling.window_of(args, 0, np.random.default_rng(KL_STEPS))
        rows = evenly_spaced(len(self.data), KL_ROWS)
        noise = iter(generators([(KL_STEPS, i) for i in range(len(rows))]))
        initial = generators([(KL_NOISE, row) for row in rows])
        if args.offload_frozen_components:
            trainer.pipe.to(trainer.accelerator.device)
        with trainer.trained.as_published(), trainer.accelerator.autocast():
            for batch in trainer.inputs.batches(self.data, rows, initial, self.size):
                rollout = replayer.sample(noise_generator=[next(noise) for _ in batch.rows], **batch.call)
                for step in rollout.trainable_steps:
                    policy = replayer.replay(rollout, step)
                    base = replayer.reference(rollout, step, self.base)
                    values.append(gaussian_kl(policy.mean, base.mean, policy.std))
        replayer.scheduler.window = None
        return torch.cat(values).mean().item()

    def save_pictures(self) -> list[str]:
        """Draw a few prompts, which are returned, into the folder `samples`."""
        rows = evenly_spaced(len(self.data), SHOWN)
        seeds = generators([(NOISE, row, 0) for row in rows])
        (self.folder / SAMPLES).mkdir(exist_ok=True)
        for i, image in enumerate(self.trainer.evaluator.draw(self.data, rows, seeds, self.size)):
            still(image).save(self.folder / SAMPLES / f"{i}.png")
        return [self.data[row]["prompt"] for row in rows]


def run_arm(folder: Path) -> None:
    """Do what `arm.json` says, and write `result.json`."""
    spec: Mapping[str, Any] = json.loads((folder / SPEC).read_text(encoding="utf-8"))
    own = ["--seed", str(spec["seed"]), "--output_dir", str(folder)]
    own += ["--eval_strategy", "no", "--load_best_model_at_end", "false"]
    own += ["--logging_first_step", "true", "--disable_tqdm", "true"]
    script, lora, config = parse([*spec["options"], *own], "slas-trl compare", settings=spec["config"])
    prompts = held_out_prompts(script, config, "slas-trl compare")
    data = prompts.select(evenly_spaced(len(prompts), spec["eval_prompts"]))
    if script.model_name_or_path is None and world.all_captions().keys() >= set(data["prompt"]):
        script.eval_reward_funcs = [*(script.eval_reward_funcs or []), *map(_verdict, SCORES)]  # type: ignore[list-item]
    trainer = make_trainer(script, lora, config, train_prompts(script), data)
    base = None
    if script.adapter is not None or not lora.use_peft:
        with trainer.trained.as_published():
            base = copy.deepcopy(denoisers_of(trainer.pipe))
    evaluation = ArmEvaluation(trainer, folder, spec, base)
    if spec["arm"] == BASE:
        evaluation.evaluate(0)
    else:
        trainer.add_callback(evaluation)
        trainer.train(resume_from_checkpoint=checkpoints.last_whole_checkpoint(folder) is not None)
        trainer.save_model()
    result = {**spec, "evaluations": evaluation.done, "first_rollout": _first_rewards(folder)}
    result |= {"reward_weights": trainer.weight_of, "prompts": list(data["prompt"])}
    result |= {"shown_prompts": evaluation.save_pictures()}
    write_text(folder / RESULT, json.dumps(result))


def _verdict(score: str) -> Callable[..., list[float]]:
    """A score of the verifier of the shapes world as a reward."""

    def reward(prompts, images, **columns):
        return [float(getattr(verdict, score)) for verdict in verify(prompts, images)]

    reward.__name__ = score
    return reward


def _first_rewards(folder: Path) -> dict[str, float] | None:
    """Statistics of the rewards of the first rollout: equal for two arms only if their pictures are."""
    logged = read_lines(folder / METRICS) if (folder / METRICS).exists() else []
    first = next((line for line in logged if "reward" in line), {})
    return {name: first[name] for name in first if name.startswith("rewards/") and not name.endswith("/time")} or None


def _follow_parent() -> None:
    """End with the command that started this, however that ended: the next one goes on in the same folder."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    threading.Thread(target=_follow_parent, daemon=True).start()
    run_arm(Path(sys.argv[1]))
