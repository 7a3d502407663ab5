"""What every process of `test_distributed.py` runs; what it found goes into `result_<rank>.pt`."""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from slas_trl.trainer import lora
from tests.trainer.tiny_trainers import PROMPTS, Watched, tiny_trainer, trained_weights


def one_update_for_each_rollout(folder: Path, processes: int) -> dict[str, Any]:
    """Sixteen images in four groups, in chunks of four, over one process or two."""
    trainer = tiny_trainer(
        folder,
        "flux",
        cls=Watched,
        steps_per_generation=4 // processes,
        max_steps=3,
        eval_dataset=PROMPTS.select(range(3)),
        num_generations_eval=3,  # nine images: one process has a surplus one
        per_device_eval_batch_size=2,
    )
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    chunks = {id(inputs["rollout"]): inputs["advantages"] for inputs in trainer.micro_steps}
    return {
        "images": torch.cat([rollout.steps[-1].prev_sample for rollout in trainer.rollouts]),
        "advantages": torch.cat([chunks[id(rollout)] for rollout in trainer.rollouts]),
        "weights": trained_weights(trainer),
        "evaluated": [before, trainer.evaluate()["eval_reward"]],
    }


def resumed_within_a_rollout(folder: Path) -> dict[str, Any]:
    """Two updates to a rollout, all weights; the uninterrupted run, and two that go on from its checkpoints."""
    settings = {"full": True, "gradient_accumulation_steps": 3, "max_steps": 4, "beta": 0.1}
    whole = tiny_trainer(folder / "whole", **settings, save_strategy="steps", save_steps=1)
    whole.train()
    found = {"whole": trained_weights(whole)}
    for at in (1, 3):
        resumed = tiny_trainer(folder / f"from-{at}", **settings)
        resumed.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{at}"))
        found[f"from-{at}"] = trained_weights(resumed)
    return found


def adapter_saved(folder: Path) -> None:
    trainer = tiny_trainer(folder, max_steps=1, gradient_accumulation_steps=3, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()


def main(folder: Path) -> None:
    state = PartialState(cpu=True)
    if not state.is_main_process:

        def save_weights(*args: Any) -> None:
            raise PermissionError("the main process writes the weights")

        lora.save_weights = save_weights
    found = {
        "compared": one_update_for_each_rollout(folder / "compared", state.num_processes),
        "resumed": resumed_within_a_rollout(folder / "resumed"),
    }
    adapter_saved(folder / "adapter")
    torch.save(found, folder / f"result_{state.process_index}.pt")
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
