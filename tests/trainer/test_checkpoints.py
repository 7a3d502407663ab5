"""What a run leaves on disk, and how it goes on from there."""

import errno
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from slas_trl.trainer import SLASTrainer, checkpoints
from slas_trl.trainer.callbacks import MetricsFileCallback
from slas_trl.trainer.checkpoints import checkpoints_in, last_whole_checkpoint, read_state
from tests.tiny_pipelines import PIPELINES
from tests.trainer.tiny_trainers import (
    PROMPTS,
    Watched,
    logged,
    lora,
    redness,
    same,
    tiny_trainer,
    trained,
    trained_weights,
    untimed,
)


ROOT = Path(__file__).parents[2]
FAMILIES = ["sd", "sd3", "flux"]
EVERY_UPDATE = {"save_strategy": "steps", "save_steps": 1}


def left_in(folder: Path) -> list[str]:
    """What is in the folder of a run, its card aside."""
    return sorted(path.name for path in folder.iterdir() if path.name not in ("README.md", "model_card.json"))


def python(script: str) -> subprocess.Popen:
    """Run `script` in a process of its own, from the repository."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def picture(pipe, family: str) -> torch.Tensor:
    call = PIPELINES[family][1]
    generator = torch.Generator().manual_seed(0)
    return pipe("a red car", num_inference_steps=3, generator=generator, output_type="pt", **call)[0]


def resumed(output_dir: Path, checkpoint: Path, *args, **settings):
    trainer = tiny_trainer(output_dir, *args, **settings)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


# What is written


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_loads_into_the_plain_pipeline(tmp_path, family):
    assert lora().lora_alpha != lora().r
    trainer = trained(tmp_path, family, learning_rate=0.05, **EVERY_UPDATE)
    trainer.save_model()
    ours = picture(trainer.pipe, family)
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        plain = PIPELINES[family][0]()
        before = picture(plain, family)
        plain.load_lora_weights(folder)
        assert torch.equal(picture(plain, family), ours) and not torch.equal(before, ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_denoiser_loads_into_the_plain_pipeline(tmp_path, family):
    trainer = trained(tmp_path, family, full=True, **EVERY_UPDATE)
    plain = PIPELINES[family][0]()
    before = picture(plain, family)
    name = "unet" if family == "sd" else "transformer"
    setattr(plain, name, type(trainer.model).from_pretrained(tmp_path / "checkpoint-2" / name))
    ours = picture(trainer.pipe, family)
    assert all(
        torch.equal(plain.components[name].state_dict()[key], v) for key, v in trainer.model.state_dict().items()
    )
    # What a file is mapped to in memory is aligned otherwise, which some kernels round otherwise for.
    torch.testing.assert_close(picture(plain, family), ours, rtol=0, atol=1e-5)
    assert not torch.allclose(before, ours, rtol=0, atol=1e-4)


def test_files_of_a_checkpoint(tmp_path):
    trained(tmp_path, gradient_accumulation_steps=3, use_ema=True, **EVERY_UPDATE)
    files = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert files == {
        *("pytorch_lora_weights.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"),
        *("slas_state.json", "ema.pt", "weights_before_averaging.pt"),
        "rollout_0.pt",  # between two updates of one rollout
    }
    assert not (tmp_path / "checkpoint-2" / "rollout_0.pt").exists()
    for path in (tmp_path / "checkpoint-1").glob("*.pt"):
        torch.load(path, weights_only=True)  # runs no code of whoever wrote the file


def test_old_checkpoints_go(tmp_path):
    run = tmp_path / "a run [1]"
    trained(run, max_steps=4, save_total_limit=2, **EVERY_UPDATE)
    assert left_in(run) == ["checkpoint-3", "checkpoint-4", "metrics.jsonl"]


@pytest.mark.parametrize(("limit", "kept"), [(1, [2, 4]), (2, [2, 4]), (3, [2, 3, 4]), (None, [1, 2, 3, 4])])
def test_the_best_checkpoint_stays(tmp_path, limit, kept):
    for number in (1, 2, 3, 4):
        small_checkpoint(tmp_path / f"checkpoint-{number}", "run")
    checkpoints.rotate(tmp_path / "checkpoint-4", limit, best=str(tmp_path / "checkpoint-2"))
    assert left_in(tmp_path) == [f"checkpoint-{number}" for number in kept]


def test_the_best_checkpoint_is_known_by_its_name(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, **EVERY_UPDATE}
    trainer = trained(tmp_path, eval_dataset=PROMPTS.select([0]), metric_for_best_model="eval_reward", **settings)
    best = tmp_path / f"checkpoint-{trainer.state.best_global_step}"
    assert trainer.state.best_model_checkpoint == str(best)
    state = json.loads((best / "trainer_state.json").read_text())  # written when it had another name
    assert state["best_model_checkpoint"] == str(best)


# Resuming


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("sd3", {}),  # checkpoints between rollouts
        ("sd3", {"gradient_accumulation_steps": 2}),  # and between the three updates of one rollout
        ("flux", {"gradient_accumulation_steps": 3, "num_iterations": 2}),
        ("sd", {"gradient_accumulation_steps": 2, "use_ema": True}),
        ("sd3", {"full": True, "gradient_accumulation_steps": 3, "beta": 0.1}),
        ("flux", {"gradient_accumulation_steps": 2, "sde_window_size": 3, "init_same_noise": False}),
    ],
    ids=["whole rollouts", "three updates", "two passes", "moving average", "full with kl", "window"],
)
def test_the_resumed_run_is_the_uninterrupted_one(tmp_path, family, settings):
    settings = {"max_steps": 4, "lr_scheduler_type": "linear", **EVERY_UPDATE, **settings}
    whole = trained(tmp_path / "whole", family, **settings)
    whole.save_model(str(tmp_path / "a"))
    for at in (1, 2, 3):
        run, saved = tmp_path / f"from-{at}", tmp_path / f"saved-{at}"
        second = resumed(run, tmp_path / "whole" / f"checkpoint-{at}", family, **settings)
        assert same(trained_weights(whole), trained_weights(second))
        lines = [[untimed(line) for line in logged(folder)] for folder in (tmp_path / "whole", run)]
        assert lines[0] == lines[1]  # with those from before, which are in the checkpoint
        second.save_model(str(saved))
        weights = [load_file(next(folder.rglob("*.safetensors"))) for folder in (tmp_path / "a", saved)]
        assert same(*weights)


@pytest.mark.parametrize(
    "length", [{"max_steps": 2}, {"max_steps": -1, "num_train_epochs": 1}], ids=["steps", "epochs"]
)
def test_a_run_that_is_at_its_end_is_not_trained_further(tmp_path, length, caplog):
    first = trained(tmp_path, **length, **EVERY_UPDATE)
    lines, steps = logged(tmp_path), first.state.global_step
    again = tiny_trainer(tmp_path, **length, **EVERY_UPDATE)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == steps and same(trained_weights(first), trained_weights(again))
    assert f"Nothing is trained: the run ended at update {steps}" in caplog.text
    assert logged(tmp_path) == lines and len(checkpoints_in(tmp_path)) == steps


def test_across_epochs(tmp_path):
    settings = {"cls": Watched, "max_steps": -1, "num_train_epochs": 3, **EVERY_UPDATE}  # three updates each
    whole = trained(tmp_path / "whole", **settings)
    for at in (2, 3, 7):
        second = resumed(tmp_path / f"resumed-{at}", tmp_path / "whole" / f"checkpoint-{at}", **settings)
        assert same(trained_weights(whole), trained_weights(second))
        prompts = [[rollout.call["prompt"] for rollout in run.rollouts] for run in (whole, second)]
        assert prompts[0][2 * at :] == prompts[1]


def test_resuming_twice(tmp_path):
    settings = {"gradient_accumulation_steps": 2, "max_steps": 3, **EVERY_UPDATE}
    whole = trained(tmp_path / "whole", **settings)
    resumed(tmp_path / "once", tmp_path / "whole" / "checkpoint-1", **{**settings, "max_steps": 2})
    second = resumed(tmp_path / "twice", tmp_path / "once" / "checkpoint-2", **settings)
    assert same(trained_weights(whole), trained_weights(second))


def test_true_is_the_newest_checkpoint(tmp_path):
    settings = {"max_steps": 3, **EVERY_UPDATE}
    whole = trained(tmp_path / "whole", **settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-3")
    second = tiny_trainer(tmp_path / "again", **settings)
    second.train(resume_from_checkpoint=True)
    assert same(trained_weights(whole), trained_weights(second))
    assert [line["step"] for line in logged(tmp_path / "again")] == [1, 2, 3]


def test_a_path_will_do(tmp_path):
    trained(tmp_path, max_steps=1, **EVERY_UPDATE)
    trainer = tiny_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-1")
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 7}, "seed 42 -> 7"),
        ({"num_inference_steps": 5}, "num_inference_steps 4 -> 5"),
        ({"num_generations": 2}, "num_generations 4 -> 2"),
        ({"steps_per_generation": 4}, "generation_batch_size 8 -> 16"),
        ({"num_iterations": 2}, "num_iterations 1 -> 2"),
        ({"timestep_fraction": 0.5}, "num_trained_timesteps 3 -> 1"),
        ({"optim": "sgd"}, "optim adamw_torch.* -> .*sgd"),
        ({"reward_funcs": "brightness"}, r"rewards \['redness'\] -> \['brightness'\]"),
    ],
)
def test_other_settings_are_refused(tmp_path, one_update, changed, named):
    trainer = tiny_trainer(tmp_path, **changed)
    with pytest.raises(ValueError, match=f"made with other settings: .*{named}"):
        trainer.train(resume_from_checkpoint=str(one_update / "checkpoint-1"))


def test_another_adapter_is_refused(tmp_path, one_update):
    trainer = tiny_trainer(tmp_path, peft_config=lora(target_modules=["to_q"]))
    with pytest.raises(ValueError, match="made with other settings.*adapter"):
        trainer.train(resume_from_checkpoint=str(one_update / "checkpoint-1"))


@pytest.fixture(scope="module")
def one_update(tmp_path_factory):
    """The folder of a run of one update, with its checkpoint."""
    folder = tmp_path_factory.mktemp("one-update")
    trained(folder, max_steps=1, **EVERY_UPDATE)
    return folder


# Checkpoints that are not whole


HYPERPARAMETERS = {"learning_rate": 1e-6, "weight_decay": 0.5, "adam_beta1": 0.5}


@pytest.mark.parametrize("lr_scheduler_type", ["constant", "cosine"])
def test_the_optimizer_goes_by_the_arguments_of_the_resumed_run(tmp_path, caplog, lr_scheduler_type):
    settings = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": lr_scheduler_type}
    tiny_trainer(tmp_path / "a", max_steps=2, learning_rate=1e-3, optim_args="x=1", **settings).train()
    trainer = tiny_trainer(tmp_path / "b", max_steps=4, **settings, **HYPERPARAMETERS)
    caplog.clear()
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    [group] = [g for g in trainer.optimizer.param_groups if g["weight_decay"]]
    assert (group["weight_decay"], group["betas"]) == (0.5, (0.5, 0.999))
    rates = [line["learning_rate"] for line in logged(tmp_path / "b") if "learning_rate" in line][2:]
    # The schedule of four updates, of which the first two are made.
    factors = [0.5, (1 + math.cos(0.75 * math.pi)) / 2] if lr_scheduler_type == "cosine" else [1, 1]
    assert rates == pytest.approx([1e-6 * factor for factor in factors])
    [listed] = [r.getMessage() for r in caplog.records if "with other settings" in r.getMessage()]
    assert "After update 2" in listed and "weight_decay 0.0001 -> 0.5" in listed and "max_steps 2 -> 4" in listed
    assert "optim_args x=1 -> None" in listed
    assert "gamma" not in listed and "output_dir" not in listed


def test_the_average_goes_by_the_decay_of_the_resumed_run(tmp_path):
    settings = {"use_ema": True, **EVERY_UPDATE}
    trained(tmp_path / "a", max_steps=1, ema_decay=0.5, **settings)
    trainer = tiny_trainer(tmp_path / "b", max_steps=2, ema_decay=0.9, **settings)
    seen = []

    class Averages(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append([average.clone() for average in trainer._ema.model.shadow_params])

    trainer.add_callback(Averages())
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    for before, after, weight in zip(seen[0], trainer._ema.model.shadow_params, trainer._ema.parameters, strict=True):
        torch.testing.assert_close(after, 0.9 * before + 0.1 * weight.detach())


def test_other_options_of_a_reward_are_said(tmp_path, caplog):
    numbers = {"logging_steps": np.int64(1), "beta": np.float32(0.25), "reward_weights": np.array([1.0, 0.5])}
    for number, folder in ((1, "a"), (2, "b")):
        rewards = [partial(redness, scale=number), "brightness"]
        trainer = tiny_trainer(tmp_path / folder, "sd3", rewards, max_steps=number, **numbers, **EVERY_UPDATE)
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1") if number == 2 else None)
    [listed] = [r.getMessage() for r in caplog.records if "with other settings" in r.getMessage()]
    assert "options of redness," in listed and "brightness" not in listed and "beta" not in listed


def test_a_reward_of_the_same_name_from_elsewhere_is_said(tmp_path, caplog):
    for number, name in ((1, "a"), (2, "b")):
        (tmp_path / f"{name}.py").write_text(
            "def score(prompts, images, **columns):\n    return [*range(len(images))]\n"
        )
        trainer = tiny_trainer(tmp_path / name, "sd3", f"{tmp_path}/{name}.py:score", max_steps=number, **EVERY_UPDATE)
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1") if number == 2 else None)
    assert "options of score," in caplog.text


def test_a_learning_rate_that_the_checkpoint_decides_is_refused(tmp_path):
    evaluated = {"eval_dataset": PROMPTS, "eval_strategy": "steps", "metric_for_best_model": "eval_reward"}
    settings = {"lr_scheduler_type": "reduce_lr_on_plateau", **evaluated, **EVERY_UPDATE}
    tiny_trainer(tmp_path, max_steps=1, **settings).train()
    with pytest.raises(ValueError, match="learning_rate 0.001 cannot become 0.5: with a ReduceLROnPlateau"):
        tiny_trainer(tmp_path, max_steps=2, learning_rate=0.5, **settings).train(resume_from_checkpoint=True)


@pytest.fixture(scope="module")
def three_updates(tmp_path_factory):
    """The folder of a run with three checkpoints, each in the middle of a rollout."""
    folder = tmp_path_factory.mktemp("three-updates")
    trained(folder, max_steps=3, gradient_accumulation_steps=1, use_ema=True, **EVERY_UPDATE)
    return folder


FILES = [
    *("pytorch_lora_weights.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"),
    *("slas_state.json", "ema.pt", "weights_before_averaging.pt", "rollout_0.pt"),
]


@pytest.mark.parametrize("damage", ["cut", "gone", "flipped"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint(tmp_path, three_updates, caplog, name, damage):
    run = tmp_path / "run"
    shutil.copytree(three_updates, run)
    file = run / "checkpoint-3" / name
    if damage == "cut":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "gone":
        file.unlink()
    else:  # one bit, and of the same size: of a number, in the files of text
        content = bytearray(file.read_bytes())
        place = content.index(b"3") if file.suffix == ".json" else len(content) // 2
        content[place] ^= 1
        file.write_bytes(content)

    settings = {"max_steps": 3, "gradient_accumulation_steps": 1, "use_ema": True}
    trainer = tiny_trainer(run, **settings)
    before = trained_weights(trainer)
    with pytest.raises(ValueError, match="checkpoint-3' is damaged"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    assert same(before, trained_weights(trainer))

    trainer.train(resume_from_checkpoint=True)
    warning = [record.getMessage() for record in caplog.records if "Looking for an earlier one" in record.getMessage()]
    assert len(warning) == 1 and "checkpoint-3" in warning[0]
    assert [line["step"] for line in logged(run)] == [1, 2, 3]
    expected = load_file(three_updates / "checkpoint-3" / "pytorch_lora_weights.safetensors")
    trainer.save_model(str(tmp_path / "saved"))
    assert same(expected, load_file(tmp_path / "saved" / "pytorch_lora_weights.safetensors"))


@pytest.mark.parametrize("name", ["slas_state.json", "trainer_state.json"])
@pytest.mark.parametrize("text", ["{}", "5", "null", "[]", '"x"', '{"global_step": "2"}', "[" * 10**5])
def test_states_that_are_none(three_updates, tmp_path, name, text):
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(three_updates / "checkpoint-3", folder)
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=f"is damaged, unfinished, or of an earlier version: {name}"):
        checkpoints.read_state(folder)
    assert checkpoints.last_whole_checkpoint(tmp_path) is None


def test_no_checkpoint_at_all(tmp_path):
    trainer = tiny_trainer(tmp_path)
    with pytest.raises(ValueError, match="There is no whole checkpoint in .* to resume from"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="There is no checkpoint folder .*elsewhere"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "elsewhere"))


# Kills (whole runs are killed in test_kills.py)


def small_checkpoint(folder: Path, run: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "weights").write_text(run)
    (folder / "unet").mkdir()
    (folder / "unet" / "weights").write_text(run)
    (folder / checkpoints.TRAINER_STATE_FILE).write_text("{}")
    checkpoints.write_state(folder, run=run)
    return folder


def changes_files(event: str, arguments: tuple) -> bool:
    if event == "open":
        return arguments[2] & os.O_ACCMODE != os.O_RDONLY
    return event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir")


def killed_before(number: int, action: Callable[[], None]) -> bool:
    """Run `action` in a process that SIGKILL ends before its change of files of that number, if there are so many."""
    child = os.fork()
    if child == 0:
        left = iter(range(number))

        def hook(event: str, arguments: tuple) -> None:
            if changes_files(event, arguments) and next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_killed_at_any_moment_of_a_save(tmp_path, monkeypatch):
    """Of one that replaces an earlier run's, and lets an older one go."""
    monkeypatch.setattr(checkpoints, "STARTED", time.time() + 3600)  # whoever tidies starts later
    run, seen = tmp_path / "run", set()
    folder = run / "checkpoint-3"
    writing = run / "_writing-checkpoint-3"

    def save():
        checkpoints.publish(small_checkpoint(writing / folder.name, "new"), folder)
        checkpoints.discard(writing)
        checkpoints.rotate(folder, 2, None)

    killed, moment = True, 0
    while killed:
        shutil.rmtree(run, ignore_errors=True)
        for number, name in ((1, "new"), (2, "new"), (3, "old")):
            small_checkpoint(run / f"checkpoint-{number}", name)
        killed = killed_before(moment, save)
        for found in checkpoints_in(run):
            read_state(found)  # all are whole
        checkpoints.tidy(run)
        names = sorted(path.name for path in run.iterdir())
        assert names in (["checkpoint-2", "checkpoint-3"], ["checkpoint-1", "checkpoint-2", "checkpoint-3"])
        seen.add((len(names), read_state(folder)["run"], (folder / "weights").read_text()))
        moment += 1
    assert seen == {(3, "old", "old"), (3, "new", "new"), (2, "new", "new")} and moment > 20


def test_killed_at_any_moment_of_dropping_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}, "loss": 0.0}}\n' for step in range(1, 5)]
    killed, moment = True, 0
    while killed:
        path.write_text("".join(lines) + '{"step": 5, "lo')
        killed = killed_before(moment, lambda: MetricsFileCallback._forget_after(path, 3))
        assert path.read_text().startswith("".join(lines[:3]))
        moment += 1
    assert path.read_text() == "".join(lines[:3]) and moment > 2


def test_what_a_killed_run_left_goes_at_the_next_start(tmp_path):
    trained(tmp_path, max_steps=1, **EVERY_UPDATE)
    dead = small_checkpoint(tmp_path / "_writing-checkpoint-2" / "checkpoint-2", "killed").parent
    for path in (dead, *dead.rglob("*")):
        os.utime(path, (0, 0))
    alive = small_checkpoint(tmp_path / "_writing-checkpoint-3" / "checkpoint-3", "of another process").parent
    (tmp_path / "_removed-checkpoint-1").mkdir()
    tiny_trainer(tmp_path, max_steps=1).train(resume_from_checkpoint=True)
    assert left_in(tmp_path) == [alive.name, "checkpoint-1", "metrics.jsonl"]
    assert read_state(alive / "checkpoint-3")


def test_a_half_written_checkpoint_is_none(tmp_path):
    small_checkpoint(tmp_path / "_writing-checkpoint-2" / "checkpoint-2", "killed")
    assert get_last_checkpoint(tmp_path) is None and not checkpoints_in(tmp_path)
    with pytest.raises(ValueError, match="There is no whole checkpoint"):
        tiny_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_old_checkpoints_go_that_a_kill_has_left(tmp_path):
    settings = {"save_total_limit": 2, "max_steps": 3, **EVERY_UPDATE}
    trained(tmp_path / "first", **{**settings, "save_total_limit": None})
    shutil.copytree(tmp_path / "first", tmp_path / "run")  # as if killed before the oldest was removed
    tiny_trainer(tmp_path / "run", **settings).train(resume_from_checkpoint=True)
    assert left_in(tmp_path / "run") == ["checkpoint-2", "checkpoint-3", "metrics.jsonl"]
    # But not where an earlier one is resumed from: the later ones are somebody's.
    shutil.copytree(tmp_path / "first", tmp_path / "again")
    one = {**settings, "save_total_limit": 1, "max_steps": 1}
    tiny_trainer(tmp_path / "again", **one).train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-1"))
    assert "checkpoint-3" in left_in(tmp_path / "again")


def test_a_write_that_is_interrupted_leaves_nothing(tmp_path):
    class Interrupted(SLASTrainer):
        def _save_rng_state(self, output_dir):
            super()._save_rng_state(output_dir)
            if self.state.global_step == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, cls=Interrupted, **EVERY_UPDATE)
    assert left_in(tmp_path) == ["checkpoint-1", "metrics.jsonl"]


# Disk full


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few hundred kilobytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # what failed may not have closed its files yet


def fill(folder: Path, all_but: int) -> None:
    """Leave so many bytes on the disk of `folder`."""
    disk = os.statvfs(folder)
    (folder / "filler").write_bytes(bytes(disk.f_bavail * disk.f_frsize - all_but))


@pytest.fixture(scope="module")
def two_updates(tmp_path_factory):
    """The weights after two updates of the run that runs out of disk."""
    return trained_weights(trained(tmp_path_factory.mktemp("two-updates"), **ON_SMALL_DISK, max_steps=2))


ON_SMALL_DISK = {"gradient_accumulation_steps": 2, "use_ema": True, **EVERY_UPDATE}  # each with a rollout


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_full_disk_leaves_the_last_checkpoint_usable(small_disk, two_updates, share):
    trained(small_disk, **ON_SMALL_DISK, max_steps=1)
    size = sum(path.stat().st_size for path in (small_disk / "checkpoint-1").iterdir())
    fill(small_disk, all_but=int(share * size))
    with pytest.raises(OSError, match="checkpoint-2' could not be written .*last whole one is .*checkpoint-1'"):
        tiny_trainer(small_disk, **ON_SMALL_DISK, max_steps=4).train(resume_from_checkpoint=True)
    assert left_in(small_disk) == ["checkpoint-1", "filler", "metrics.jsonl"]

    (small_disk / "filler").unlink()
    again = tiny_trainer(small_disk, **ON_SMALL_DISK, max_steps=2)
    again.train(resume_from_checkpoint=True)
    assert same(trained_weights(again), two_updates)


def test_a_full_disk_at_the_first_checkpoint(tmp_path):
    """By a limit on the size of files, which needs no rights."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match="The checkpoint .* could not be written.* there is no earlier one"):
            trained(tmp_path, **EVERY_UPDATE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not checkpoints_in(tmp_path) and not list(tmp_path.glob("_*"))


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "all weights"])
def test_a_full_disk_at_the_end(tmp_path, full):
    trainer = trained(tmp_path, full=full, max_steps=1, **EVERY_UPDATE)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, before[1]))
    try:
        with pytest.raises(
            OSError, match="The weights in .* could not be written.* last whole one is .*checkpoint-1'"
        ):
            trainer.save_model()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("place", ["file", "file/run", "/proc/run"])
def test_a_folder_that_cannot_be_written_to_is_known_before_the_run(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"The output_dir .*{place}' cannot be written to"):
        tiny_trainer(tmp_path / place, model="no such model")


def test_a_disk_that_is_full_for_a_name_keeps_what_had_it(tmp_path, monkeypatch):
    trained(tmp_path, max_steps=2, seed=1, **EVERY_UPDATE)
    before = read_state(tmp_path / "checkpoint-1")
    rename = Path.rename

    def full(self, target):
        if self.parent.name.startswith("_writing"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="checkpoint-1' could not be written .*No space left"):
        trained(tmp_path, max_steps=2, **EVERY_UPDATE)
    assert left_in(tmp_path) == ["checkpoint-1", "checkpoint-2", "metrics.jsonl"]
    assert read_state(tmp_path / "checkpoint-1") == before


# Ctrl-C


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
    [(2, 1), (3, 2), (5, 3), (6, 3), (7, 4), (9, 5)],
    ids=[
        "within an update",
        "its end",
        "end of a rollout",
        "within the next one's first update",
        "and its end",
        "last",
    ],
)
def test_ctrl_c_saves_what_was_learned(tmp_path, caplog, five_updates, moment, update):
    """Three updates of two micro-steps to a rollout."""
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "run", cls=interrupted_at(moment), **THREE_TO_A_ROLLOUT)
    [folder] = checkpoints_in(tmp_path / "run")
    assert folder.name == f"checkpoint-{update}" and read_state(folder)
    said = [record.getMessage() for record in caplog.records]
    assert any("saving a checkpoint as soon as" in text and "Press again" in text for text in said)
    assert f"train(resume_from_checkpoint={str(folder)!r})" in said[-1]
    assert f"--resume_from_checkpoint {folder}" in said[-1]

    second = tiny_trainer(tmp_path / "run", **THREE_TO_A_ROLLOUT)
    second.train(resume_from_checkpoint=True)
    assert same(five_updates, trained_weights(second))
    assert [line["step"] for line in logged(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_ctrl_c_while_sampling(tmp_path):
    class Reward:
        __name__ = "redness"
        calls = 0

        def __call__(self, prompts, images, **columns):
            self.calls += 1
            if self.calls == 3:  # the first chunk of the second rollout
                os.kill(os.getpid(), signal.SIGINT)
            return redness(prompts, images)

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "run", reward_funcs=Reward(), max_steps=3)
    second = tiny_trainer(tmp_path / "run", max_steps=3)
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert same(trained_weights(trained(tmp_path / "whole", max_steps=3)), trained_weights(second))


def test_ctrl_c_before_the_first_update(tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, cls=interrupted_at(0))
    assert "before the first update; there is nothing to save" in caplog.text and not checkpoints_in(tmp_path)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
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
    ("signals", "status"),
    [([signal.SIGTERM], 143), ([signal.SIGHUP], 129), ([signal.SIGTERM, signal.SIGHUP, signal.SIGTERM], 143)],
)
@pytest.mark.parametrize(("moment", "update"), [(0, 0), (3, 2)])
def test_sigterm_and_sighup_save_too(tmp_path, caplog, signals, status, moment, update):
    """However often a scheduler sends them. Those who call `train` in Python are told by an exception."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(SystemExit) as end:
        trained(tmp_path, cls=interrupted_at(moment, *signals), **THREE_TO_A_ROLLOUT)
    assert end.value.code == status
    assert [folder.name for folder in checkpoints_in(tmp_path)] == ([f"checkpoint-{update}"] if update else [])
    assert ("--resume_from_checkpoint" if update else "nothing to save") in caplog.text
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_what_nohup_ignores_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trained(tmp_path, cls=interrupted_at(0, signal.SIGHUP), max_steps=1)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_are_the_main_threads(tmp_path):
    with ThreadPoolExecutor(1) as thread:
        before = signal.getsignal(signal.SIGTERM)
        thread.submit(trained, tmp_path, max_steps=1).result()
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_from_outside(tmp_path):
    """As in a terminal: one signal at any time, the message, and a run that goes on from there."""
    run = python(
        f"""
        import sys
        from tests.trainer.tiny_trainers import trained

        assert "matplotlib" not in sys.modules  # before there is something to draw
        trained({str(tmp_path / "run")!r}, gradient_accumulation_steps=2, max_steps=10_000)
        """
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while run.poll() is None and not (metrics.is_file() and len(logged(metrics.parent)) >= 2):
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, error = run.communicate(timeout=300)
    [folder] = checkpoints_in(tmp_path / "run")
    assert run.returncode in (1, -signal.SIGINT) and "KeyboardInterrupt" in error
    assert f"Resume with train(resume_from_checkpoint={str(folder)!r})" in error

    update = int(folder.name.removeprefix("checkpoint-"))
    settings = {"gradient_accumulation_steps": 2, "max_steps": update + 2}
    second = resumed(tmp_path / "run", folder, **settings)
    assert same(trained_weights(trained(tmp_path / "whole", **settings)), trained_weights(second))


def test_a_reward_that_fails_late_costs_nothing(tmp_path, caplog):
    class Reward:
        __name__ = "redness"
        calls = 0

        def __call__(self, prompts, images, **columns):
            self.calls += 1
            return redness(prompts, images) if self.calls < 5 else ["broken"] * len(images)

    with pytest.raises(TypeError, match="Reward 'redness' returned 'broken'"):
        trained(tmp_path / "run", reward_funcs=Reward(), max_steps=4)
    assert "A reward failed after update 2" in caplog.text
    second = resumed(tmp_path / "run", tmp_path / "run" / "checkpoint-2", max_steps=4)
    assert same(trained_weights(trained(tmp_path / "whole", max_steps=4)), trained_weights(second))


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_level": 0.3},
        {"guidance_scale": 1.5},
        {"use_ema": True},
        {"peft_config": lora(r=8)},
        {"learning_rate": 1e-2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_resumed_run_keeps_what_decides_its_ratio(tmp_path, changes):
    tiny_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    other = tiny_trainer(tmp_path, max_steps=2, **changes)
    if "learning_rate" in changes:  # may change
        other.train(resume_from_checkpoint=True)
    else:
        with pytest.raises(ValueError, match="other settings"):
            other.train(resume_from_checkpoint=True)


def test_the_newest_checkpoint_is_the_last_written_one(tmp_path):
    tiny_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=2).train()
    tiny_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()  # another run, in the same folder
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-1"


def test_an_earlier_runs_checkpoint_is_not_taken_for_this_runs(tmp_path):
    tiny_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=2).train()
    calls = []

    def fails_later(prompts, images, **columns):
        calls.append(1)
        if len(calls) > 2:  # chunks of the first rollout
            raise OSError("server away")
        return redness(prompts, images)

    trainer = tiny_trainer(tmp_path, reward_funcs=fails_later, max_steps=2, learning_rate=1e-2)
    with pytest.raises(ValueError, match="server away"):
        trainer.train()
    saved = load_file(tmp_path / "checkpoint-1" / "pytorch_lora_weights.safetensors")
    now = trained_weights(trainer)
    assert {float(v.double().sum()) for v in saved.values()} == {float(v.double().sum()) for v in now.values()}
