"""One arm of `slas-trl compare` in a process of its own: trains with one seed, and evaluates along the way."""

import copy
import hashlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from slas_trl.evaluation.shapes import SCORES
from slas_trl.images import still
from slas_trl.objective import gaussian_kl
from slas_trl.scripts.arguments import parse
from slas_trl.scripts.compare import BASE, EVALUATIONS, RESULT, SAMPLES, SPEC, with_config
from slas_trl.scripts.model import make_pipeline
from slas_trl.scripts.train import held_out_prompts, train_prompts
from slas_trl.shapes import world
from slas_trl.shapes.verifier import verify
from slas_trl.trainer import SLASTrainer, checkpoints, lora, sampling
from slas_trl.trainer.precision import autocast_forward
from slas_trl.trainer.scoring import RewardScorer


SHOWN = 12  # pictures that are kept
KL_ROWS = 48  # trajectories that the KL divergence is measured on
# Streams of random numbers beside the trainer's: those of evaluation are the same for all arms and seeds.
NOISE, KL_NOISE, KL_STEPS = 100, 101, 102


class Evaluator(TrainerCallback):
    """
    Scores the policy on held-out prompts before training, every `every` updates, and at the end, always with the same
    noise; and takes the fingerprint of the first rollout.

    Args:
        trainer ([`SLASTrainer`]): before training.
        data (`Dataset`): held-out prompts.
        folder (`Path`): of the arm.
        every (`int`): updates.
        images_per_prompt (`int`): images of each prompt.
        embedded (`bool`): whether the verifier of the shapes world can judge.
    """

    def __init__(
        self, trainer: SLASTrainer, data: Dataset, folder: Path, every: int, images_per_prompt: int, embedded: bool
    ):
        self.trainer, self.data, self.folder, self.every = trainer, data, folder, every
        self.images_per_prompt, self.embedded = images_per_prompt, embedded
        self.first_rollout: str | None = None
        self.trained = self.evaluated = 0.0  # seconds
        self._last = time.perf_counter()
        self.evaluations: dict[str, dict[str, Any]] = {}
        # The base of an arm that goes on from an adapter has that adapter, whatever the reference of its loss is.
        self._kept = trainer.kept_adapter
        if trainer.continued is not None and self._kept is None:
            self._kept = lora.REFERENCE_NAME
            for name in trainer.denoiser_names:
                lora.keep_reference(trainer.pipe.components[name])
        self._base = trainer._reference
        if self._base is None and not trainer.has_adapter:
            self._base = {name: copy.deepcopy(trainer.pipe.components[name]) for name in trainer.denoiser_names}
            for frozen in self._base.values():
                autocast_forward(trainer.accelerator, frozen.requires_grad_(False))

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:  # resumed
            saved = json.loads((self.folder / EVALUATIONS).read_text(encoding="utf-8"))
            kept = {step: e for step, e in saved["evaluations"].items() if int(step) <= state.global_step}
            self.evaluations, self.first_rollout = kept, saved["first_rollout"]
            # The part of an update or an evaluation that is repeated counts twice: it was paid for twice.
            self.trained, self.evaluated = saved["seconds"], saved["evaluation_seconds"]
        self._last = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.first_rollout = fingerprint(self.trainer)
            self._write()
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.evaluate(state.global_step)

    def evaluate(self, step: int) -> None:
        start = time.perf_counter()
        self.trained += start - self._last
        self.evaluations[str(step)] = {"scores": self._scores(), "kl": self._kl() if step else 0.0}
        self._last = time.perf_counter()
        self.evaluated += self._last - start
        self._write()

    @property
    def results(self) -> dict[str, Any]:
        return {
            "first_rollout": self.first_rollout,
            "seconds": self.trained,
            "evaluation_seconds": self.evaluated,
            "evaluations": self.evaluations,
        }

    def _write(self) -> None:
        write_json(self.folder / EVALUATIONS, self.results)

    def _scores(self) -> dict[str, list[float]]:
        """By measure, the mean of each prompt."""
        trainer, copies = self.trainer, self.images_per_prompt
        rows = [row for row in range(len(self.data)) for _ in range(copies)]
        seeds = sampling.generators([(NOISE, row, i % copies) for i, row in enumerate(rows)])
        images = trainer.draw(self.data, rows, seeds, trainer.args.per_device_train_batch_size)
        read = trainer.calls.rows(self.data, rows)
        columns = {name: [row[name] for row in read] for name in self.data.column_names if name != "prompt"}
        prompts = [row["prompt"] for row in read]
        scorer = trainer.eval_scorer
        scores = dict(zip(scorer.names, scorer.score(prompts, images, columns).T, strict=True))
        if self.embedded:
            verdicts = verify(prompts, images)
            if clash := scores.keys() & set(SCORES):
                raise ValueError(f"The verifier has a score {min(clash)!r} too; give that reward another name.")
            scores |= {name: torch.tensor([float(getattr(v, name)) for v in verdicts]) for name in SCORES}
        self._keep(images[::copies])
        return {name: values.double().view(-1, copies).nanmean(1).tolist() for name, values in scores.items()}

    @property
    def shown(self) -> list[int]:
        """Prompts whose first picture is kept, spread over all."""
        count = min(SHOWN, len(self.data))
        return [i * len(self.data) // count for i in range(count)]

    def _keep(self, images: list[Any]) -> None:
        (self.folder / SAMPLES).mkdir(exist_ok=True)
        for i, row in enumerate(self.shown):
            still(images[row]).save(self.folder / SAMPLES / f"{i}.png")

    @torch.no_grad()
    def _kl(self) -> float:
        """KL of the policy to the base, in nats per latent element: mean over trajectories and their steps."""
        trainer, size = self.trainer, self.trainer.args.per_device_train_batch_size
        count = min(KL_ROWS, len(self.data))
        rows = [i * len(self.data) // count for i in range(count)]
        noise = sampling.generators([(KL_STEPS, i) for i in range(count)])
        scheduler, values = trainer.replayer.scheduler, []
        scheduler.window = sampling.window_of(trainer.args, 0, np.random.default_rng(KL_STEPS))
        trainer._place_frozen_components(trainer.accelerator.device)
        with trainer._averaged_weights():
            for part in trainer.calls.chunks(self.data, rows, size):
                chosen = [rows[i] for i in part]
                seeds = sampling.generators([(KL_NOISE, row) for row in chosen])
                call = trainer.calls.call(self.data, chosen, seeds)
                rollout = trainer.replayer.sample(noise_generator=[noise[i] for i in part], **call)
                for step in rollout.trainable_steps:
                    policy = trainer.replayer.replay(rollout, step)
                    base = trainer.replayer.reference(rollout, step, self._base, lora.ADAPTER_NAME, self._kept)
                    values.append(gaussian_kl(policy.mean, base.mean, policy.std))
        scheduler.window = None
        trainer._place_frozen_components("cpu")
        return torch.cat(values).mean().item()


def fingerprint(trainer: SLASTrainer) -> str:
    """Of the rollout that the trainer holds: equal where every latent of every step is, to the last bit."""
    assert trainer._buffer is not None  # after an update
    digest = hashlib.sha256()
    for chunk in trainer._buffer.chunks:
        for tensor in (chunk.log_probs, *(step.prev_sample for step in chunk.steps)):
            digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def run_arm(folder: Path) -> None:
    """Do what the folder's `arm.json` says, and write `result.json` into it."""
    spec: Mapping[str, Any] = json.loads((folder / SPEC).read_text(encoding="utf-8"))
    options = with_config(spec["options"], spec["config"], folder)
    script, adapter, config = parse([*options, "--output_dir", str(folder)], "slas-trl compare")
    config.eval_strategy = IntervalStrategy.NO  # the callback below does that
    sys.path.append(str(Path.cwd()))
    embedded = script.model_name_or_path is None
    prompts = held_out_prompts(script, config, "slas-trl compare")
    data = prompts.select([i * len(prompts) // spec["eval_prompts"] for i in range(spec["eval_prompts"])])
    trainer = SLASTrainer(
        model=make_pipeline(script, config),
        reward_funcs=cast(list, script.reward_funcs),
        args=config,
        train_dataset=train_prompts(script),
        peft_config=adapter.peft_config(),
    )
    if script.eval_reward_funcs:
        trainer.eval_scorer = RewardScorer([*cast(list, script.reward_funcs), *script.eval_reward_funcs])
    judged = embedded and world.all_captions().keys() >= set(data["prompt"])  # by the verifier
    evaluator = Evaluator(trainer, data, folder, spec["eval_every"], spec["eval_images_per_prompt"], judged)
    if spec["arm"] == BASE:
        evaluator.evaluate(0)
    else:
        trainer.add_callback(evaluator)
        trainer.train(resume_from_checkpoint=checkpoints.last_whole_checkpoint(folder) is not None)
        trainer.save_model()
    result = {
        **spec,
        **evaluator.results,
        "reward_weights": trainer.weight_of,
        "prompts": list(data["prompt"]),
        "shown_prompts": [data[row]["prompt"] for row in evaluator.shown],
    }
    write_json(folder / RESULT, result)


def write_json(path: Path, data: Any) -> None:
    """In one step: whoever is killed here leaves the whole old file or the whole new one."""
    writing = path.with_name(f"_{path.name}")
    writing.write_text(json.dumps(data), encoding="utf-8")
    writing.replace(path)
