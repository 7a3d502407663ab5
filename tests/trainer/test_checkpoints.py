"""What a run leaves on disk, and how it goes on from there."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from slas_trl.trainer.checkpoints import checkpoints_in, last_whole_checkpoint, read_state
from tests.tiny_pipelines import PIPELINES
from tests.trainer.tiny_trainers import (
    Watched,
    logged,
    lora,
    redness,
    same,
    tiny_trainer,
    trained,
    trained_weights,
)


ROOT = Path(__file__).parents[2]
FAMILIES = ["sd", "sd3", "flux"]
EVERY_UPDATE = {"save_strategy": "steps", "save_steps": 1}


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
    trained(tmp_path, max_steps=4, save_total_limit=2, **EVERY_UPDATE)
    assert [folder.name for folder in checkpoints_in(tmp_path)] == ["checkpoint-4", "checkpoint-3"]


# Resuming


@pytest.mark.parametrize("at", [1, 2, 3])
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
def test_the_resumed_run_is_the_uninterrupted_one(tmp_path, family, settings, at):
    settings = {"max_steps": 4, "lr_scheduler_type": "linear", **EVERY_UPDATE, **settings}
    whole = trained(tmp_path / "whole", family, **settings)
    second = resumed(tmp_path / "resumed", tmp_path / "whole" / f"checkpoint-{at}", family, **settings)
    assert same(trained_weights(whole), trained_weights(second))
    timings = ("step_time", "images_per_second")
    lines = [
        [{k: v for k, v in line.items() if k not in timings} for line in logged(tmp_path / run)]
        for run in ("whole", "resumed")
    ]
    assert lines[0][at:] == lines[1]
    whole.save_model(str(tmp_path / "a"))
    second.save_model(str(tmp_path / "b"))
    saved = [next((tmp_path / run).rglob("*.safetensors")) for run in ("a", "b")]
    assert same(load_file(saved[0]), load_file(saved[1]))


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
        ({"seed": 7}, r"'seed': \(42, 7\)"),
        ({"num_inference_steps": 5}, r"'num_inference_steps': \(4, 5\)"),
        ({"num_generations": 2}, r"'num_generations': \(4, 2\)"),
        ({"steps_per_generation": 4}, r"'generation_batch_size': \(8, 16\)"),
        ({"num_iterations": 2}, r"'num_iterations': \(1, 2\)"),
        ({"timestep_fraction": 0.5}, r"'num_trained_timesteps': \(3, 1\)"),
    ],
)
def test_other_settings_are_refused(tmp_path, one_update, changed, named):
    trainer = tiny_trainer(tmp_path, **changed)
    with pytest.raises(ValueError, match=f"made with other settings .then, now.: .*{named}"):
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


@pytest.mark.parametrize("damage", ["cut", "gone"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint(tmp_path, three_updates, caplog, name, damage):
    run = tmp_path / "run"
    shutil.copytree(three_updates, run)
    file = run / "checkpoint-3" / name
    if damage == "cut":
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.unlink()

    settings = {"max_steps": 3, "gradient_accumulation_steps": 1, "use_ema": True}
    trainer = tiny_trainer(run, **settings)
    before = trained_weights(trainer)
    with pytest.raises(ValueError, match="checkpoint-3' (was not written to its end|is damaged)"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    assert same(before, trained_weights(trainer))

    trainer.train(resume_from_checkpoint=True)
    warning = [record.getMessage() for record in caplog.records if "Looking for an earlier one" in record.getMessage()]
    assert len(warning) == 1 and "checkpoint-3" in warning[0]
    assert [line["step"] for line in logged(run)] == [1, 2, 3]
    expected = load_file(three_updates / "checkpoint-3" / "pytorch_lora_weights.safetensors")
    trainer.save_model(str(tmp_path / "saved"))
    assert same(expected, load_file(tmp_path / "saved" / "pytorch_lora_weights.safetensors"))


def test_no_checkpoint_at_all(tmp_path):
    trainer = tiny_trainer(tmp_path)
    with pytest.raises(ValueError, match="There is no whole checkpoint in .* to resume from"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="There is no checkpoint folder .*elsewhere"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "elsewhere"))


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
    assert [folder.name for folder in checkpoints_in(small_disk)] == ["checkpoint-1"]

    (small_disk / "filler").unlink()
    again = tiny_trainer(small_disk, **ON_SMALL_DISK, max_steps=2)
    again.train(resume_from_checkpoint=True)
    assert same(trained_weights(again), two_updates)


def test_a_full_disk_at_the_first_checkpoint(tmp_path):
    """By a limit on the size of files, which needs no rights."""
    run = python(
        f"""
        import resource
        from tests.trainer.tiny_trainers import trained

        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        trained({str(tmp_path)!r}, save_strategy="steps", save_steps=1)
        """
    )
    _, error = run.communicate(timeout=300)
    assert run.returncode == 1 and "OSError: The checkpoint" in error
    assert "could not be written" in error and "there is no earlier one" in error
    assert not checkpoints_in(tmp_path)


# Ctrl-C


def interrupted_at(moment: int) -> type[Watched]:
    """A trainer that gets Ctrl-C in the micro-step of that number, from 0."""

    class Interrupted(Watched):
        def compute_loss(self, *args, **kwargs):
            if len(self.micro_steps) == moment:
                os.kill(os.getpid(), signal.SIGINT)
            return super().compute_loss(*args, **kwargs)

    return Interrupted


@pytest.mark.parametrize(
    ("moment", "update"),
    [(2, 1), (3, 2), (5, 3), (6, 3), (7, 4)],
    ids=["within an update", "its end", "end of a rollout", "within the next one's first update", "and its end"],
)
def test_ctrl_c_saves_what_was_learned(tmp_path, caplog, moment, update):
    """Three updates of two micro-steps to a rollout."""
    settings = {"gradient_accumulation_steps": 2, "max_steps": 5}
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "run", cls=interrupted_at(moment), **settings)
    [folder] = checkpoints_in(tmp_path / "run")
    assert folder.name == f"checkpoint-{update}" and read_state(folder)
    said = [record.getMessage() for record in caplog.records]
    assert any("saving a checkpoint as soon as" in text and "Press again" in text for text in said)
    assert f"train(resume_from_checkpoint={str(folder)!r})" in said[-1]
    assert f"--resume_from_checkpoint {folder}" in said[-1]

    second = tiny_trainer(tmp_path / "run", **settings)
    second.train(resume_from_checkpoint=True)
    whole = trained(tmp_path / "whole", **settings)
    assert same(trained_weights(whole), trained_weights(second))
    assert [line["step"] for line in logged(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_ctrl_c_while_sampling(tmp_path):
    class Reward:
        calls = 0

        def __call__(self, prompts, images, **columns):
            self.calls += 1
            if self.calls == 2:
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


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    """Perhaps in the middle of an update, so that the weights are those of no update."""

    class Twice(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, callbacks=[Twice()])
    assert not checkpoints_in(tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_from_outside(tmp_path):
    """As in a terminal: one signal at any time, the message, and a run that goes on from there."""
    run = python(
        f"""
        from tests.trainer.tiny_trainers import trained

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
        calls = 0

        def __call__(self, prompts, images, **columns):
            self.calls += 1
            return redness(prompts, images) if self.calls < 3 else ["broken"] * len(images)

    with pytest.raises(TypeError, match="Reward 'Reward' returned 'broken'"):
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
    ids=str,
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
        if len(calls) > 1:
            raise OSError("server away")
        return redness(prompts, images)

    trainer = tiny_trainer(tmp_path, reward_funcs=fails_later, max_steps=2, learning_rate=1e-2)
    with pytest.raises(ValueError, match="server away"):
        trainer.train()
    saved = load_file(tmp_path / "checkpoint-1" / "pytorch_lora_weights.safetensors")
    now = trained_weights(trainer)
    assert {float(v.double().sum()) for v in saved.values()} == {float(v.double().sum()) for v in now.values()}
