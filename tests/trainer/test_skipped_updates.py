"""NaN and infinity: the update is skipped, the image named, and the run ends when it goes on."""

import math

import pytest
import torch
from transformers import TrainerCallback

from .tiny_trainers import logged, same, tiny_trainer, trained_weights


class Break(TrainerCallback):
    """Multiplies the trained weights by a factor after some updates, and puts them right again after others."""

    def __init__(self, after: dict[int, float]):
        self.after, self.kept = after, None

    def on_step_end(self, args, state, control, model, **kwargs):
        parameters = [p for p in model.parameters() if p.requires_grad]
        if self.kept is not None:
            for parameter, kept in zip(parameters, self.kept, strict=True):
                parameter.data.copy_(kept)
            self.kept = None
        if state.global_step in self.after:
            self.kept = [p.detach().clone() for p in parameters]
            parameters[0].data.mul_(self.after[state.global_step])


def adam_steps(trainer) -> set[float]:
    return {state["step"].item() for state in trainer.optimizer.state.values()}


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_an_update_with_nan_is_skipped_and_the_image_named(tmp_path, caplog, factor):
    trainer = tiny_trainer(tmp_path, callbacks=[Break({1: factor})], max_steps=3, weight_decay=0.1)
    trainer.train()
    assert [line["update_skipped"] for line in logged(tmp_path)] == [0.0, 1.0, 0.0]
    assert all(math.isfinite(line["loss"]) for line in logged(tmp_path)[::2])  # NaN is not carried on
    (warning,) = [r.getMessage() for r in caplog.records if "is skipped" in r.getMessage()]
    assert "Update 2 is skipped: it had NaN or infinity, first for '" in warning
    assert "(image 0 of its chunk, step" in warning and any(p in warning for p in trainer.train_dataset["prompt"])
    assert adam_steps(trainer) == {2.0}
    assert all(weight.isfinite().all() for weight in trained_weights(trainer).values())


def test_a_skipped_update_changes_nothing(tmp_path):
    class Keep(TrainerCallback):
        weights, changed = {}, {}

        def on_step_begin(self, args, state, control, model, **kwargs):
            self.weights[state.global_step] = [p.detach().clone() for p in model.parameters() if p.requires_grad]

        def on_optimizer_step(self, args, state, control, model, **kwargs):
            after = [p.detach() for p in model.parameters() if p.requires_grad]
            self.changed[state.global_step] = [
                not torch.equal(a, b)
                for a, b in zip(self.weights[state.global_step], after, strict=True)
                if a.isfinite().all()
            ]

    keep = Keep()
    trainer = tiny_trainer(tmp_path, callbacks=[Break({2: math.nan}), keep], max_steps=4, weight_decay=0.1)
    trainer.train()
    assert any(keep.changed[1]) and not any(keep.changed[2])  # not by momentum or decay either


def test_the_last_update_is_never_skipped(tmp_path):
    """Whoever reads "done" takes the weights that are written for what training made of them."""
    trainer = tiny_trainer(tmp_path, callbacks=[Break({2: math.nan})], max_steps=3)
    with pytest.raises(ValueError, match="Update 3 of 3 had NaN"):
        trainer.train()
    assert (tmp_path / "checkpoint-2" / "pytorch_lora_weights.safetensors").is_file()


def test_a_loss_that_is_not_finite_is_no_update_even_where_its_gradient_is(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.args.epsilon = math.nan  # min(x, nan) has the gradient of nan, a constant
    before = trained_weights(trainer)
    with pytest.raises(ValueError, match="Update 1 of 1 had NaN or infinity"):
        trainer.train()
    assert same(trained_weights(trainer), before)


def test_too_many_in_a_row_end_the_run_and_keep_what_was_learned(tmp_path, caplog):
    trainer = tiny_trainer(
        tmp_path,
        callbacks=[Break(dict.fromkeys(range(1, 9), math.nan))],
        max_steps=9,
        max_skipped_updates=2,
        save_strategy="no",
    )
    with pytest.raises(ValueError, match=r"Update 4 of 9 had NaN .* after 2 others in a row .*learning_rate"):
        trainer.train()
    assert (tmp_path / "checkpoint-3" / "pytorch_lora_weights.safetensors").is_file()
    assert [line["update_skipped"] for line in logged(tmp_path)] == [0.0, 1.0, 1.0]


def test_single_ones_do_not_end_it(tmp_path):
    trainer = tiny_trainer(
        tmp_path, callbacks=[Break({1: math.nan, 3: math.nan, 5: math.nan})], max_steps=7, max_skipped_updates=1
    )
    trainer.train()
    assert sum(line["update_skipped"] for line in logged(tmp_path)) == 3


def test_an_image_that_is_nan_has_no_part_in_the_rewards(tmp_path):
    """One generator of one image makes NaN noise, as a denoiser that overflows for one prompt would."""
    trainer = tiny_trainer(tmp_path, max_steps=2)
    sample = trainer.replayer.sample

    def poisoned(**call):
        rollout = sample(**call)
        if not trainer.poisoned:
            trainer.poisoned = True
            rollout.log_probs[1] = math.nan
        return rollout

    trainer.poisoned, trainer.replayer.sample = False, poisoned
    trainer.train()
    line, _ = logged(tmp_path)
    assert line["update_skipped"] == 1.0 and math.isfinite(line["reward"]) and math.isfinite(line["advantages/std"])


def test_nan_before_any_update_is_no_divergence(tmp_path):
    trainer = tiny_trainer(tmp_path)
    next(p for p in trainer.model.parameters() if not p.requires_grad).data.fill_(math.nan)
    with pytest.raises(ValueError, match="NaN or infinite before any update. Check the pipeline and its dtype"):
        trainer.train()
