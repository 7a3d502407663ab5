"""What every process of `test_distributed.py` runs, by name; what it found goes into `result_<rank>.pt`."""

import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from diffusers.loaders.lora_base import LoraBaseMixin
from torch.distributed.tensor import DTensor

from tests.policy.zoo.all import FAMILIES
from tests.tiny_pipelines import PIPELINES
from tests.trainer.tiny_sharding import shard_on_cpus
from tests.trainer.tiny_trainers import (
    PROMPTS,
    SAVED,
    Watched,
    logged,
    lora,
    redness,
    resumed,
    tiny_trainer,
    trained,
    trained_weights,
)
from tests.trainer.zoo_trainers import zoo_trainer


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def whole(trainer) -> dict[str, torch.Tensor]:
    """The trained weights, also of a model that is sharded."""
    weights = trained_weights(trainer).items()
    return {name: weight.full_tensor() if isinstance(weight, DTensor) else weight for name, weight in weights}


def one_update_for_each_rollout(folder: Path, processes: int, **settings: Any) -> dict[str, Any]:
    """
    Sixteen images in four groups, in chunks of four, over one process or two. By SGD, whose weights say what the
    gradients were: Adam makes 7e-6 of the last bits of gradients that are nearly 0, whatever their cause.
    """
    settings = {"steps_per_generation": 4 // processes, "max_steps": 2, "ema_decay": 0.5, **settings}
    settings = {"optim": "sgd", "learning_rate": 10.0, "cls": Watched, **settings}
    # Nine images to evaluate: one process has a surplus one.
    evaluation = {"eval_dataset": PROMPTS.select(range(3)), "num_generations_eval": 3, "per_device_eval_batch_size": 2}
    trainer = tiny_trainer(folder, "flux", **evaluation, **settings)
    before, initial = trainer.evaluate()["eval_reward"], whole(trainer)
    trainer.train()
    trainer.save_model()
    chunks = {id(inputs["rollout"]): inputs["advantages"] for inputs in trainer.micro_steps}
    return {
        "images": torch.cat([rollout.steps[-1].prev_sample for rollout in trainer.rollouts]),
        "advantages": torch.cat([chunks[id(rollout)] for rollout in trainer.rollouts]),
        "weights": whole(trainer),
        "moved": max((weight - initial[name]).abs().max().item() for name, weight in whole(trainer).items()),
        "evaluated": [before, trainer.evaluate()["eval_reward"]],
        "shards": sum(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in trainer.model.parameters()),
        "logs": [log for log in trainer.state.log_history if "loss" in log],
    }


def going_on_from_an_adapter(folder: Path, processes: int) -> dict[str, Any]:
    """With a copy of it as the reference."""
    pipe = PIPELINES["flux"][0]()
    torch.manual_seed(5)
    pipe.transformer.add_adapter(lora(init_lora_weights=False))
    return one_update_for_each_rollout(folder, processes, model=pipe, peft_config=None, beta=0.1, use_ema=True)


def one_of_the_zoo(name: str, folder: Path, processes: int) -> dict[str, torch.Tensor]:
    """
    Of two experts, the last step of an update calls only one; skip-layer guidance calls the denoiser twice for a step,
    the second time without some layers. DDP alone can do neither.
    """
    settings = {"num_inference_steps": 4, "num_generations": 4, "per_device_train_batch_size": 2}
    trainer = zoo_trainer(FAMILIES[name], folder, steps_per_generation=4 // processes, optim="sgd", **settings)
    trainer.train()
    return trained_weights(trainer)


def nan_on_one_process(folder: Path, rank: int) -> list[float]:
    """Both skip the update. Of five prompts, one is left out: an epoch is one rollout of four groups."""
    trainer = tiny_trainer(folder, train_dataset=PROMPTS.select(range(5)), num_train_epochs=2, max_steps=-1)
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
    """A reward's components, and one that only the second process returns; held-out rewards; what is saved."""

    def reward(prompts, images, **columns):
        return {"reward": redness(prompts, images), "rank": [float(rank)] * len(images)}

    def uneven(prompts, images, **columns):
        return {"reward": redness(prompts, images), **({"second": [1.0] * len(images)} if rank else {})}

    def held_out(prompts, images, **columns):
        return [float(len(prompt)) for prompt in prompts]

    settings = {"gradient_accumulation_steps": 3, "max_steps": 1, "log_completions": True, **SAVED}
    settings |= {"eval_dataset": PROMPTS.select(range(3)), "eval_reward_funcs": held_out, "num_generations_eval": 2}
    trainer = trained(folder, reward_funcs=reward, **settings)
    trainer.save_model()
    [line] = [log for log in trainer.state.log_history if "loss" in log]
    try:
        trained(folder / "uneven", reward_funcs=uneven, max_steps=1)
    except ValueError as error:
        message = str(error)
    return {**line, "held_out": trainer.evaluate()["eval_rewards/held_out/mean"], "uneven": message}


def pushed(folder: Path) -> dict[str, Any]:
    """A run that pushes from its start to its end, and one whose token the Hub refuses."""
    repo = f"user/{folder.parent.name}-{folder.name}".replace("_", "-")
    settings = {"push_to_hub": True, "hub_model_id": repo, "max_steps": 1}
    trainer = trained(folder, hub_strategy="checkpoint", **SAVED, **settings)
    trainer.save_model()
    returned = trainer.push_to_hub(commit_message="By both")
    os.environ["HF_TOKEN"], token = "hf_bad", os.environ["HF_TOKEN"]
    try:
        tiny_trainer(folder / "refused", **settings)
    except ValueError as error:
        refused = str(error)
    os.environ["HF_TOKEN"] = token
    return {"repo": repo, "returned": returned is not None, "refused": refused}


def failing(folder: Path, rank: int) -> dict[str, Any]:
    """A reward that raises on one process only, in the second rollout."""
    calls = []

    def moody(prompts, images, **columns):
        calls.append(len(images))
        if rank == 1 and len(calls) > 2:  # of two chunks in a rollout
            raise RuntimeError("out of paint")
        return redness(prompts, images)

    trainer, message = tiny_trainer(folder, "sd3", moody, max_steps=3), ""
    try:
        trainer.train()
    except ValueError as error:
        message = str(error)
    return {"error": message, "updates": trainer.state.global_step}


def gamma(folder: Path) -> dict[str, Any]:
    """All weights in a trust region over two rollouts of two updates each, resumed within the second."""
    settings = {"gamma_schedule": "trust_region", "kl_threshold": 0.025, "fisher_update_steps": 4, "full": True}
    settings |= {"gradient_accumulation_steps": 3, "max_steps": 4, "beta": 0.1, "use_ema": True, **SAVED}
    trainer = trained(folder / "run", **settings)
    second = resumed(folder / "resumed", folder / "run" / "checkpoint-3", **settings)
    PartialState().wait_for_everyone()
    return {
        "weights": [whole(trainer), whole(second)],
        "gammas": [[line["gamma"] for line in logged(folder / run, "gamma")] for run in ("run", "resumed")],
        "lambda_max": [line["trust_region/lambda_max"] for line in logged(folder / "run", "trust_region/lambda_max")],
    }


def ddp(folder: Path, rank: int) -> dict[str, Any]:
    if rank:

        def write_lora_layers(*args: Any, **kwargs: Any) -> None:
            raise PermissionError("the main process writes the weights")

        LoraBaseMixin.write_lora_layers = write_lora_layers
    return {
        # Every group lies half on the one and half on the other.
        "compared": one_update_for_each_rollout(folder / "compared", 2, num_generations=8),
        "wan2.2": one_of_the_zoo("wan2.2", folder / "experts", 2),
        "sd3.5-slg": one_of_the_zoo("sd3.5-slg", folder / "skipping", 2),
        "skipped": nan_on_one_process(folder / "skipped", rank),
        "components": components(folder / "components", rank),
        "pushed": pushed(folder / "pushed"),
        "gamma": gamma(folder / "gamma"),
    }


def fsdp(folder: Path) -> dict[str, Any]:
    return {
        "full": one_update_for_each_rollout(folder / "full", 2, full=True, beta=0.1, use_ema=True),
        "continued": going_on_from_an_adapter(folder / "continued", 2),
        "bf16": one_update_for_each_rollout(folder / "bf16", 2, full=True, bf16=True, beta=0.1),
        "gamma": gamma(folder / "gamma"),
    }


def main(folder: Path) -> None:
    state = PartialState(cpu=True)
    found = {"ddp": ddp(folder / "ddp", state.process_index)}
    AcceleratorState._reset_state()  # it reads the environment anew
    os.environ.update(FSDP2)
    found |= {"fsdp": fsdp(folder / "fsdp")}
    found |= {"failing": failing(folder / "failing", state.process_index)}  # the last: who knows what state it leaves
    torch.save(found, folder / f"result_{state.process_index}.pt")
    state.destroy_process_group()


if __name__ == "__main__":
    shard_on_cpus()
    main(Path(sys.argv[1]))
