"""What every process of `test_distributed.py` runs, by name; what it found goes into `result_<rank>.pt`."""

import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from slas_trl.trainer import lora as adapters
from slas_trl.trainer import publishing
from slas_trl.trainer.collectives import full_tensor, gathered, wait_together
from tests.policy.zoo.all import FAMILIES
from tests.test_trust_region import dense_fisher
from tests.tiny_pipelines import PIPELINES
from tests.trainer.tiny_trainers import PROMPTS, Watched, logged, lora, redness, tiny_trainer, trained_weights
from tests.trainer.zoo_trainers import zoo_trainer


def whole(trainer) -> dict[str, torch.Tensor]:
    return {name: full_tensor(weight) for name, weight in trained_weights(trainer).items()}


def one_update_for_each_rollout(folder: Path, processes: int, **settings: Any) -> dict[str, Any]:
    """
    Sixteen images in four groups, in chunks of four, over one process or two. By SGD, whose weights say what the
    gradients were: Adam makes 7e-6 of the last bits of gradients that are nearly 0, whatever their cause.
    """
    settings = {"steps_per_generation": 4 // processes, "max_steps": 3, "ema_decay": 0.5, **settings}
    settings = {"optim": "sgd", "learning_rate": 10.0, **settings}
    trainer = tiny_trainer(
        folder,
        "flux",
        cls=Watched,
        eval_dataset=PROMPTS.select(range(3)),
        num_generations_eval=3,  # nine images: one process has a surplus one
        per_device_eval_batch_size=2,
        **settings,
    )
    before, initial = trainer.evaluate()["eval_reward"], whole(trainer)
    trainer.train()
    chunks = {id(inputs["rollout"]): inputs["advantages"] for inputs in trainer.micro_steps}
    return {
        "images": torch.cat([rollout.steps[-1].prev_sample for rollout in trainer.rollouts]),
        "advantages": torch.cat([chunks[id(rollout)] for rollout in trainer.rollouts]),
        "weights": whole(trainer),
        "moved": max((weight - initial[name]).abs().max().item() for name, weight in whole(trainer).items()),
        "evaluated": [before, trainer.evaluate()["eval_reward"]],
        "shards": sum(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in trainer.model.parameters()),
        "sharded": isinstance(trainer.model, FSDPModule),
        "logs": [log for log in trainer.state.log_history if "loss" in log],
    }


def resumed_within_a_rollout(folder: Path, *checkpoints: int, **settings: Any) -> dict[str, Any]:
    """Two updates to a rollout; the uninterrupted run, and one that goes on from each of these checkpoints."""
    settings = {"gradient_accumulation_steps": 3, "max_steps": 4, "beta": 0.1, **settings}
    uninterrupted = tiny_trainer(folder / "whole", **settings, save_strategy="steps", save_steps=1)
    uninterrupted.train()
    found = {"whole": whole(uninterrupted)}
    for at in checkpoints:
        resumed = tiny_trainer(folder / f"from-{at}", **settings)
        resumed.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{at}"))
        found[f"from-{at}"] = whole(resumed)
    return found


def going_on_from_an_adapter(folder: Path, processes: int) -> dict[str, Any]:
    """With a copy of it as the reference."""
    pipe = PIPELINES["flux"][0]()
    torch.manual_seed(5)
    adapters.add_adapter(pipe.transformer, lora(init_lora_weights=False))
    return one_update_for_each_rollout(folder, processes, model=pipe, peft_config=None, beta=0.1, use_ema=True)


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


def components(folder: Path, rank: int) -> dict[str, Any]:
    """A reward's components, and one that only the second process returns; held-out rewards in evaluation."""

    def reward(prompts, images, **columns):
        return {"reward": redness(prompts, images), "rank": [float(rank)] * len(images)}

    def uneven(prompts, images, **columns):
        return {"reward": redness(prompts, images), **({"second": [1.0] * len(images)} if rank else {})}

    def held_out(prompts, images, **columns):
        return [float(len(prompt)) for prompt in prompts]

    data = PROMPTS.select(range(3))
    trainer = tiny_trainer(folder, "sd3", reward, max_steps=1, eval_dataset=data, eval_reward_funcs=held_out)
    trainer.train()
    [line] = [log for log in trainer.state.log_history if "loss" in log]
    expected = sum(len(prompt) for prompt in data["prompt"]) / 3
    try:
        tiny_trainer(folder / "uneven", "sd3", uneven, max_steps=1).train()
    except ValueError as error:
        message = str(error)
    return {**line, "held_out": trainer.evaluate()["eval_rewards/held_out/mean"] / expected, "uneven": message}


def waited_for_both() -> int:
    """How often both look whether something is done, of which the second one is ready at its third look."""
    looks = []

    def done() -> bool:
        looks.append(1)
        return PartialState().process_index == 0 or len(looks) == 3

    wait_together(done)
    return len(looks)


def pushed(folder: Path, **settings: Any) -> dict[str, Any]:
    """A run that pushes from its start to its end, and one whose token the Hub refuses."""
    repo = f"user/{folder.parent.name}-{folder.name}".replace("_", "-")
    settings = {"push_to_hub": True, "hub_model_id": repo, "max_steps": 1, **settings}
    publishing.PATIENCE = 0.01  # so that several looks at an upload are needed
    trainer = tiny_trainer(folder, hub_strategy="checkpoint", save_strategy="steps", save_steps=1, **settings)
    trainer.train()
    trainer.save_model()
    returned = trainer.push_to_hub(commit_message="By both")
    os.environ["HF_TOKEN"], token = "hf_bad", os.environ["HF_TOKEN"]
    refused = ""
    try:
        tiny_trainer(folder / "refused", **settings)
    except ValueError as error:
        refused = str(error)
    os.environ["HF_TOKEN"] = token
    return {"looks": waited_for_both(), "repo": repo, "returned": returned is not None, "refused": refused}


def ddp(folder: Path, state: PartialState) -> dict[str, Any]:
    if not state.is_main_process:

        def save_denoiser(*args: Any) -> None:
            raise PermissionError("the main process writes the weights")

        adapters.LoraBaseMixin.write_lora_layers = save_denoiser
    found = {
        "compared": one_update_for_each_rollout(folder / "compared", state.num_processes),
        # Every group lies half on the one and half on the other.
        "spanning": one_update_for_each_rollout(folder / "spanning", 2, num_generations=8, max_steps=2),
        "resumed": resumed_within_a_rollout(folder / "resumed", 1, 3, full=True),
        "wan2.2": one_of_the_zoo("wan2.2", folder / "experts", 2),
        "sd3.5-slg": one_of_the_zoo("sd3.5-slg", folder / "skipping", 2),
        "continued": going_on_from_an_adapter(folder / "continued", 2),
        "skipped": nan_on_one_process(folder / "skipped", state.process_index),
        "components": components(folder / "components", state.process_index),
        "pushed": pushed(folder / "pushed"),
    }
    uneven = tiny_trainer(folder / "uneven", train_dataset=PROMPTS.select(range(5)), num_train_epochs=2, max_steps=-1)
    uneven.train()
    adapter_saved(folder / "adapter")
    found |= {"uneven": uneven.state.global_step, "gamma": gamma(folder / "gamma", state)}
    return {**found, "failing": failing(folder / "failing", state)}  # the last: who knows what state it leaves


def fsdp(folder: Path, state: PartialState) -> dict[str, Any]:
    found = {
        "lora": one_update_for_each_rollout(folder / "lora", 2, beta=0.1, use_ema=True),
        "full": one_update_for_each_rollout(folder / "full", 2, full=True, beta=0.1, use_ema=True),
    }
    found["continued"] = going_on_from_an_adapter(folder / "continued", 2)
    for kind, full, at in (("lora", False, 1), ("full", True, 3)):
        found[f"{kind} bf16"] = one_update_for_each_rollout(folder / f"{kind}-bf16", 2, full=full, bf16=True, beta=0.1)
        found[f"{kind} resumed"] = resumed_within_a_rollout(folder / f"{kind}-resumed", at, full=full, use_ema=True)
    found |= {"gamma": gamma(folder / "gamma", state), "pushed": pushed(folder / "pushed", full=True)}
    return {**found, "failing": failing(folder / "failing", state)}


def failing(folder: Path, state: PartialState) -> dict[str, Any]:
    """A reward that raises on one process only, in the second rollout."""
    calls = []

    def moody(prompts, images, **columns):
        calls.append(len(images))
        if state.process_index == 1 and len(calls) > 2:  # of two chunks in a rollout
            raise RuntimeError("out of paint")
        return redness(prompts, images)

    trainer = tiny_trainer(folder, "sd3", moody, max_steps=3)
    try:
        trainer.train()
    except ValueError as error:
        return {"error": str(error), "updates": trainer.state.global_step}
    return {"error": None, "logged": logged(folder)}


def gamma(folder: Path, state: PartialState) -> dict[str, Any]:
    """A trust region over three rollouts of two updates each, resumed within the second."""
    settings = {"gamma_schedule": "trust_region", "kl_threshold": 9e-7, "fisher_update_steps": 2,
                "peft_config": lora(r=1, target_modules=["to_q", "to_v"])}  # fmt: skip
    settings |= {"gradient_accumulation_steps": 3, "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    trainer = tiny_trainer(folder / "run", cls=Watched, **settings)
    trainer.train()
    resumed = tiny_trainer(folder / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-3"))
    state.wait_for_everyone()
    found = {
        "weights": whole(trainer),
        "resumed": whole(resumed),
        "gammas": [line["gamma"] for line in logged(folder / "run", "gamma")],
        "resumed gammas": [line["gamma"] for line in logged(folder / "resumed", "gamma")],
        "lambda_max": [line["trust_region/lambda_max"] for line in logged(folder / "run", "trust_region/lambda_max")],
        "vector": [full_tensor(part) for part in trainer._gamma.state.vector],
        "sharded": isinstance(trainer.model, FSDPModule),
    }
    if found["sharded"]:
        return found
    # The dense matrix of the first rollout, before any update.
    fresh = tiny_trainer(folder / "dense", cls=Watched, **{**settings, "learning_rate": 0.0, "max_steps": 2})
    fresh.train()
    outputs = [fresh.replayer.replay(fresh.rollouts[0], step) for step in (0, 2)]
    mine = dense_fisher(outputs, [p for p in fresh.model.parameters() if p.requires_grad])
    both = sum(gathered(mine)) / state.num_processes
    return {**found, "dense": largest(both), "alone": largest(mine)}


def largest(matrix: torch.Tensor) -> float:
    return torch.linalg.eigvalsh(matrix)[-1].item()


def main(what: str, folder: Path) -> None:
    state = PartialState(cpu=True)
    found = {"ddp": ddp, "fsdp": fsdp}[what](folder, state)
    torch.save(found, folder / f"result_{state.process_index}.pt")
    state.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
