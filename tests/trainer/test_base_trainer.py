"""What a run leaves on disk, and how it goes on from there: resuming, kills, full disks, Ctrl-C."""

import json
import math
import os
import resource
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from slas_trl.trainer.checkpoints import checkpoints_in, read_state

from .tiny_trainers import (
    EVALUATED,
    HELD_OUT,
    SAVED,
    Watched,
    alike,
    column,
    logged,
    lora,
    redness,
    resumed,
    same,
    tiny_trainer,
    told,
    trained,
    trained_weights,
)


def left_in(folder: Path) -> list[str]:
    """What is in the folder of a run, its card aside."""
    return sorted(path.name for path in folder.iterdir() if path.name not in ("README.md", "model_card.json"))


def test_old_checkpoints_are_deleted(tmp_path):
    run, settings = tmp_path / "a run [1]", {"save_total_limit": 2, "max_steps": 3, **SAVED}
    trained(run, **settings)
    assert left_in(run) == ["checkpoint-2", "checkpoint-3", "metrics.jsonl"]
    # Also those that a kill has left, but not where an earlier checkpoint is resumed from.
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-1")
    state = json.loads((run / "checkpoint-1" / "slas_state.json").read_text())
    (run / "checkpoint-1" / "slas_state.json").write_text(json.dumps({**state, "written": 0}))
    resumed(run, run / "checkpoint-2", **{**settings, "save_total_limit": 1, "max_steps": 2})
    assert "checkpoint-1" in left_in(run)
    resumed(run, run / "checkpoint-3", **settings)
    assert left_in(run) == ["checkpoint-2", "checkpoint-3", "metrics.jsonl"]


@pytest.mark.parametrize("kind", ["adapter", "all weights", "average"])
def test_the_best_weights_are_loaded_at_the_end(tmp_path, kind):
    scores = iter([0.5, 0.9, 0.1])

    def reward(prompts, images, number=None, **columns):
        return redness(prompts, images) if number is None else [next(scores)] * len(images)

    settings = {"full": kind == "all weights", "use_ema": kind == "average", "eval_dataset": HELD_OUT.select([0])}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward", "max_steps": 3, **EVALUATED}
    trainer = trained(tmp_path, reward_funcs=reward, **settings)
    best = str(tmp_path / "checkpoint-2")
    assert trainer.state.best_metric == pytest.approx(0.9) and trainer.state.best_model_checkpoint == best
    # The checkpoint is known by its final name, though its state is written under another one.
    assert json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["best_model_checkpoint"] == best
    trainer.save_model(str(tmp_path / "saved"))
    folders = [tmp_path / name for name in ("saved", "checkpoint-2", "checkpoint-3")]
    saved, second, third = (load_file(next(folder.rglob("*.safetensors"))) for folder in folders)
    assert same(saved, second) and not same(saved, third)


@pytest.mark.parametrize(
    ("family", "settings", "checkpoints"),
    [
        ("sd3", {}, [2]),  # checkpoints between rollouts
        ("sd3", {"gradient_accumulation_steps": 2}, [1, 2, 3]),  # and between the three updates of one rollout
        ("flux", {"gradient_accumulation_steps": 3, "num_iterations": 2}, [1, 2]),
        ("sd", {"gradient_accumulation_steps": 2, "use_ema": True}, [2]),
        ("sd3", {"full": True, "gradient_accumulation_steps": 3, "beta": 0.1}, [3]),
        ("flux", {"gradient_accumulation_steps": 2, "sde_window_size": 3, "init_same_noise": False}, [1]),
        ("sd3", {"max_steps": -1, "num_train_epochs": 2}, [2, 3]),  # three updates to an epoch
    ],
    ids=["whole rollouts", "three updates", "two passes", "moving average", "full with kl", "window", "epochs"],
)
def test_the_resumed_run_is_the_uninterrupted_one(tmp_path, family, settings, checkpoints):
    settings = {"max_steps": 4, "lr_scheduler_type": "linear", **SAVED, **settings}
    whole = trained(tmp_path / "whole", family, **settings)
    for at in checkpoints:
        run = tmp_path / f"from-{at}"
        second = resumed(run, tmp_path / "whole" / f"checkpoint-{at}", family, **settings)
        assert alike(whole, second)  # with the lines from before, which are in the checkpoint
        name = f"checkpoint-{whole.state.global_step}"
        last = [next((folder / name).rglob("*.safetensors")) for folder in (tmp_path / "whole", run)]
        assert same(*map(load_file, last))


@pytest.mark.parametrize(
    "length", [{"max_steps": 2}, {"max_steps": -1, "num_train_epochs": 1}], ids=["steps", "epochs"]
)
def test_a_run_that_is_at_its_end_is_not_trained_further(tmp_path, length, caplog):
    first = trained(tmp_path, **length, **SAVED)
    lines, steps = logged(tmp_path), first.state.global_step
    again = resumed(tmp_path, True, **length, **SAVED)
    assert again.state.global_step == steps and same(trained_weights(first), trained_weights(again))
    assert "Nothing is trained" in caplog.text
    assert logged(tmp_path) == lines and len(checkpoints_in(tmp_path)) == steps


@pytest.fixture(scope="module")
def one_update(tmp_path_factory):
    """The checkpoint of a run of one update."""
    folder = tmp_path_factory.mktemp("one-update")
    trained(folder, max_steps=1, **SAVED)
    return folder / "checkpoint-1"


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 7}, "seed 42 -> 7"),
        ({"noise_level": 0.3}, "noise_level"),
        ({"steps_per_generation": 4}, "generation_batch_size 8 -> 16"),
        ({"timestep_fraction": 0.5}, "num_trained_timesteps 3 -> 1"),
        ({"optim": "sgd"}, "optim adamw_torch.* -> .*sgd"),
        ({"reward_funcs": "brightness"}, r"rewards \['redness'\] -> \['brightness'\]"),
        ({"peft_config": lora(r=8)}, "adapter"),
    ],
)
def test_other_settings_are_refused(tmp_path, one_update, changed, named):
    with pytest.raises(ValueError, match=named):
        resumed(tmp_path, one_update, **changed)


@pytest.mark.parametrize("lr_scheduler_type", ["constant", "cosine"])
def test_other_hyperparameters_are_told_and_hold(tmp_path, caplog, lr_scheduler_type):
    """Those of the optimizer come along in its state, and are this run's nevertheless."""

    def rewards(scale):
        return [partial(redness, scale=scale), "brightness"]

    settings = {"beta": np.float32(0.25), "reward_weights": np.array([1.0, 0.5])}  # can be written too
    settings |= {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": lr_scheduler_type}
    trained(tmp_path / "a", optim_args="x=1", reward_funcs=rewards(1), **settings)
    settings["reward_funcs"] = rewards(2)
    caplog.clear()
    changes = {"max_steps": 4, "learning_rate": 1e-6, "weight_decay": 0.5, "adam_beta1": 0.5}
    trainer = resumed(tmp_path / "b", tmp_path / "a" / "checkpoint-2", **settings, **changes)
    [group] = [g for g in trainer.optimizer.param_groups if g["weight_decay"]]
    assert (group["weight_decay"], group["betas"]) == (0.5, (0.5, 0.999))
    rates = [line["learning_rate"] for line in logged(tmp_path / "b")][2:]
    # The schedule of four updates, of which the first two are made.
    factors = [0.5, (1 + math.cos(0.75 * math.pi)) / 2] if lr_scheduler_type == "cosine" else [1, 1]
    assert rates == pytest.approx([1e-6 * factor for factor in factors])
    [differences] = told(caplog, "with other settings")
    for part in ("After update 2", "weight_decay 0.0001 -> 0.5", "max_steps 2 -> 4", "optim_args x=1 -> None"):
        assert part in differences
    assert "options of redness" in differences
    assert not any(name in differences for name in ("brightness", "gamma", "beta ", "output_dir"))


def test_a_learning_rate_that_the_checkpoint_decides_is_refused(tmp_path):
    settings = {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "eval_reward", **EVALUATED}
    trained(tmp_path, max_steps=1, eval_dataset=HELD_OUT, **settings)
    with pytest.raises(ValueError, match="learning_rate 0.001 cannot change"):
        resumed(tmp_path, True, max_steps=2, learning_rate=0.5, eval_dataset=HELD_OUT, **settings)


def test_a_damaged_checkpoint(tmp_path, caplog):
    settings = {"gradient_accumulation_steps": 1, "use_ema": True}
    whole = trained(tmp_path, **settings, **SAVED)
    os.truncate(tmp_path / "checkpoint-2" / "ema.pt", 100)
    trainer = tiny_trainer(tmp_path, **settings)
    before = trained_weights(trainer)
    with pytest.raises(ValueError, match="checkpoint-2' is damaged.*ema.pt"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(before, trained_weights(trainer))
    trainer.train(resume_from_checkpoint=True)
    assert len(told(caplog, "Looking for an earlier one")) == 1
    assert same(trained_weights(whole), trained_weights(trainer)) and column(tmp_path, "step") == [1, 2]
    shutil.rmtree(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match="no whole checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="no checkpoint folder .*elsewhere"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "elsewhere"))


def test_a_full_disk_at_the_end(tmp_path):
    trainer = trained(tmp_path, max_steps=1, **SAVED)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, before[1]))  # which needs no rights
    try:
        with pytest.raises(OSError, match="The weights in .* could not be written.*checkpoint-1'"):
            trainer.save_model()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("owner", "name", "failure", "message"),
    [
        (Path, "rename", OSError("No space left"), "checkpoint-2' could not be written .*checkpoint-1'; resume"),
        (torch, "save", KeyboardInterrupt(), None),
    ],
)
def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch, owner, name, failure, message):
    """An earlier run's checkpoint of the same name stays where it is."""
    trained(tmp_path, max_steps=2, seed=1, **SAVED)
    before, works = read_state(tmp_path / "checkpoint-2"), getattr(owner, name)

    def fails(*arguments):
        if any(isinstance(each, str | Path) and "_writing-checkpoint-2/" in str(each) for each in arguments):
            raise failure
        return works(*arguments)

    monkeypatch.setattr(owner, name, fails)
    with pytest.raises(type(failure), match=message):
        trained(tmp_path, max_steps=2, **SAVED)
    assert left_in(tmp_path) == ["checkpoint-1", "checkpoint-2", "metrics.jsonl"]
    assert read_state(tmp_path / "checkpoint-2") == before


def interrupted_at(moment: int, *signals: signal.Signals) -> type[Watched]:
    """A trainer that gets these signals, Ctrl-C by default, in the micro-step of that number, from 0."""

    class Interrupted(Watched):
        def compute_loss(self, *args, **kwargs):
            for number in (signals or [signal.SIGINT]) if len(self.micro_steps) == moment else ():
                os.kill(os.getpid(), number)
            return super().compute_loss(*args, **kwargs)

    return Interrupted


THREE_TO_A_ROLLOUT = {"gradient_accumulation_steps": 2, "max_steps": 5}


@pytest.fixture(scope="module")
def five_updates(tmp_path_factory):
    """The weights after a run that nothing interrupts."""
    return trained_weights(trained(tmp_path_factory.mktemp("five-updates"), **THREE_TO_A_ROLLOUT))


@pytest.mark.parametrize(
    ("moment", "update"),
    [(2, 1), (5, 3), (6, 3), (9, 5)],
)
def test_ctrl_c_saves_what_was_learned(tmp_path, caplog, five_updates, moment, update):
    """Three updates of two micro-steps to a rollout."""
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        trained(run, cls=interrupted_at(moment), **THREE_TO_A_ROLLOUT)
    [folder] = checkpoints_in(run)
    assert folder.name == f"checkpoint-{update}" and read_state(folder)
    assert told(caplog, "Press again") and told(caplog, f"--resume_from_checkpoint {folder}")
    second = resumed(run, True, **THREE_TO_A_ROLLOUT)
    assert same(five_updates, trained_weights(second)) and column(run, "step") == [1, 2, 3, 4, 5]


def test_ctrl_c_before_the_first_update(tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, cls=interrupted_at(0))
    assert "nothing to save" in caplog.text and not checkpoints_in(tmp_path)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_stops_at_once(tmp_path, first):
    """Perhaps in the middle of an update, so that the weights are those of no update."""

    class Twice(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), first)
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, callbacks=[Twice()])
    assert not checkpoints_in(tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("signals", "status"), [([signal.SIGHUP], 129), ([signal.SIGTERM, signal.SIGHUP, signal.SIGTERM], 143)]
)
def test_sigterm_and_sighup_save_too(tmp_path, caplog, signals, status):
    """However often a scheduler sends them. Those who call `train` in Python are told by an exception."""
    with pytest.raises(SystemExit) as end:
        trained(tmp_path, cls=interrupted_at(3, *signals), **THREE_TO_A_ROLLOUT)
    assert end.value.code == status
    assert [folder.name for folder in checkpoints_in(tmp_path)] == ["checkpoint-2"]
    assert "--resume_from_checkpoint" in caplog.text
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == [signal.SIG_DFL] * 2


def test_what_nohup_ignores_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trained(tmp_path, cls=interrupted_at(0, signal.SIGHUP), max_steps=1)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_outside_the_main_thread_leaves_signals_alone(tmp_path):
    with ThreadPoolExecutor(1) as thread:
        before = signal.getsignal(signal.SIGTERM)
        thread.submit(trained, tmp_path, max_steps=1).result()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("then", "error"), [(OSError("server away"), ValueError), (None, KeyboardInterrupt)])
def test_a_run_that_ends_while_it_samples_costs_nothing(tmp_path, caplog, then, error):
    calls = iter(range(9))

    def late(prompts, images, **columns):
        if next(calls) >= 4:  # two chunks in each of two rollouts
            if then:
                raise then
            os.kill(os.getpid(), signal.SIGINT)
        return redness(prompts, images)

    late.__name__ = "redness"
    run = tmp_path / "run"
    trained(run, max_steps=2, seed=1, **SAVED)  # another run's checkpoints, which are not taken for this one's
    with pytest.raises(error):
        trained(run, reward_funcs=late, max_steps=3)
    assert "after update 2" in caplog.text
    second = resumed(run, run / "checkpoint-2", max_steps=3)
    assert same(trained_weights(trained(tmp_path / "whole", max_steps=3)), trained_weights(second))
