"""What every process of `test_distributed.py` runs, by name; what it found goes into `result_<rank>.pt`."""

import math
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from slas_trl.trainer import lora
from slas_trl.trainer.collectives import full_tensor
from tests.policy.zoo.all import FAMILIES
from tests.trainer.tiny_trainers import PROMPTS, Watched, logged, redness, tiny_trainer, trained_weights
from tests.trainer.zoo_trainers import zoo_trainer


def whole(trainer) -> dict[str, torch.Tensor]:
    return {name: full_tensor(weight) for name, weight in trained_weights(trainer).items()}


def one_update_for_each_rollout(folder: Path, processes: int, **settings: Any) -> dict[str, Any]:
    """Sixteen images in four groups, in chunks of four, over one process or two."""
    settings = {"steps_per_generation": 4 // processes, "max_steps": 3, **settings}
    trainer = tiny_trainer(
        folder,
        "flux",
        cls=Watched,
        eval_dataset=PROMPTS.select(range(3)),
        num_generations_eval=3,  # nine images: one process has a surplus one
        per_device_eval_batch_size=2,
        **settings,
    )
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    chunks = {id(inputs["rollout"]): inputs["advantages"] for inputs in trainer.micro_steps}
    return {
        "images": torch.cat([rollout.steps[-1].prev_sample for rollout in trainer.rollouts]),
        "advantages": torch.cat([chunks[id(rollout)] for rollout in trainer.rollouts]),
        "weights": whole(trainer),
        "evaluated": [before, trainer.evaluate()["eval_reward"]],
        "shards": sum(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in trainer.model.parameters()),
        "sharded": isinstance(trainer.model, FSDPModule),
        "logs": [log for log in trainer.state.log_history if "loss" in log],
    }


def resumed_within_a_rollout(folder: Path, **settings: Any) -> dict[str, Any]:
    """Two updates to a rollout; the uninterrupted run, and two that go on from its checkpoints."""
    settings = {"gradient_accumulation_steps": 3, "max_steps": 4, "beta": 0.1, **settings}
    uninterrupted = tiny_trainer(folder / "whole", **settings, save_strategy="steps", save_steps=1)
    uninterrupted.train()
    found = {"whole": whole(uninterrupted)}
    for at in (1, 3):
        resumed = tiny_trainer(folder / f"from-{at}", **settings)
        resumed.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{at}"))
        found[f"from-{at}"] = whole(resumed)
    return found


def adapter_saved(folder: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "log_completions": True}
    trainer = tiny_trainer(folder, max_steps=1, gradient_accumulation_steps=3, **settings)
    trainer.train()
    trainer.save_model()


def one_of_the_zoo(name: str, folder: Path, processes: int) -> dict[str, torch.Tensor]:
    """
    Of two experts, the last step of an update calls only one; skip-layer guidance calls the denoiser twice for a step,
    the second time without some layers. DDP alone can do neither.
    """
    settings = {"num_inference_steps": 4, "num_generations": 4, "per_device_train_batch_size": 2, "max_steps": 2}
    trainer = zoo_trainer(FAMILIES[name], folder, steps_per_generation=4 // processes, optim="sgd", **settings)
    trainer.train()
    return trained_weights(trainer)


def nan_on_one_process(folder: Path, rank: int) -> list[float]:
    """Both skip the update."""
    trainer = tiny_trainer(folder, max_steps=2)
    sample = trainer.replayer.sample

    def poisoned(**call):
        rollout = sample(**call)
        if rank == 1 and trainer.state.global_step == 0:
            rollout.log_probs[0] = math.nan
        return rollout

    trainer.replayer.sample = poisoned
    trainer.train()
    return [log["update_skipped"] for log in trainer.state.log_history if "loss" in log]


def ddp(folder: Path, state: PartialState) -> dict[str, Any]:
    if not state.is_main_process:

        def save_denoiser(*args: Any) -> None:
            raise PermissionError("the main process writes the weights")

        lora.LoraBaseMixin.write_lora_layers = save_denoiser
    found = {
        "compared": one_update_for_each_rollout(folder / "compared", state.num_processes),
        # Every group lies half on the one and half on the other.
        "spanning": one_update_for_each_rollout(folder / "spanning", 2, num_generations=8, max_steps=2),
        "resumed": resumed_within_a_rollout(folder / "resumed", full=True),
        "wan2.2": one_of_the_zoo("wan2.2", folder / "experts", 2),
        "sd3.5-slg": one_of_the_zoo("sd3.5-slg", folder / "skipping", 2),
        "skipped": nan_on_one_process(folder / "skipped", state.process_index),
    }
    uneven = tiny_trainer(folder / "uneven", train_dataset=PROMPTS.select(range(5)), num_train_epochs=2, max_steps=-1)
    uneven.train()
    adapter_saved(folder / "adapter")
    return {**found, "uneven": uneven.state.global_step}


def fsdp(folder: Path, state: PartialState) -> dict[str, Any]:
    found = {
        "lora": one_update_for_each_rollout(folder / "lora", 2, beta=0.1, use_ema=True),
        "full": one_update_for_each_rollout(folder / "full", 2, full=True, optim="sgd", beta=0.1, use_ema=True),
    }
    for kind, full in (("lora", False), ("full", True)):
        found[f"{kind} bf16"] = one_update_for_each_rollout(folder / f"{kind}-bf16", 2, full=full, bf16=True, beta=0.1)
        found[f"{kind} resumed"] = resumed_within_a_rollout(folder / f"{kind}-resumed", full=full, use_ema=True)
    return found


def failing(folder: Path, state: PartialState) -> dict[str, Any]:
    """A reward that raises on one process only, in the second rollout."""
    calls = []

    def moody(prompts, images, **columns):
        calls.append(len(images))
        if state.process_index == 1 and len(calls) > 1:
            raise RuntimeError("out of paint")
        return redness(prompts, images)

    trainer = tiny_trainer(folder / "run", "sd3", moody, max_steps=3)
    try:
        trainer.train()
    except ValueError as error:
        return {"error": str(error), "updates": trainer.state.global_step}
    return {"error": None, "logged": logged(folder / "run")}


def main(what: str, folder: Path) -> None:
    state = PartialState(cpu=True)
    found = {"ddp": ddp, "fsdp": fsdp, "failing": failing}[what](folder, state)
    torch.save(found, folder / f"result_{state.process_index}.pt")
    state.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
