"""What saves memory or time, and must not change the result."""

import importlib.util

import pytest
import torch

from .tiny_trainers import logged, same, tiny_trainer, trained, trained_weights


class Traffic:
    """Where a frozen component is told to go, and what else happens, in order."""

    def __init__(self, trainer, name: str):
        self.events, self.trainer = [], trainer
        component, device, sample, loss = (
            trainer.pipe.components[name],
            trainer.accelerator.device,
            trainer.replayer.sample,
            trainer.compute_loss,
        )
        # On a machine without accelerators both are the CPU; the objects tell them apart.
        component.to = lambda to: self.events.append("here" if to is device else "away")
        trainer.replayer.sample = lambda **call: (self.note("sample"), sample(**call))[1]
        trainer.compute_loss = lambda *args, **kwargs: (self.note("train"), loss(*args, **kwargs))[1]

    def note(self, event: str) -> None:
        if self.events[-1:] != [event]:
            self.events.append(event)


def test_frozen_components_are_away_while_the_denoiser_is_trained(tmp_path):
    trainer = tiny_trainer(tmp_path, offload_frozen_components=True, max_steps=2)
    traffic = [Traffic(trainer, name) for name in ("text_encoder", "text_encoder_2", "vae")]
    trainer.train()
    for each in traffic:
        assert each.events == ["here", "sample", "away", "train"] * 2
    traffic[0].events.clear()
    trainer.evaluate(trainer.train_dataset.select(range(2)))
    assert traffic[0].events == ["here"]
    assert same(trained_weights(trainer), trained_weights(trained(tmp_path / "plain", max_steps=2)))


def test_they_stay_where_they_are_unless_asked_for(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1)
    traffic = Traffic(trainer, "vae")
    trainer.train()
    assert traffic.events == ["sample", "train"]


def test_they_come_back_for_a_rollout_that_is_resumed(tmp_path):
    settings = {"gradient_accumulation_steps": 3, "max_steps": 3}
    whole = trained(tmp_path / "whole", **settings, save_strategy="steps", save_steps=1)
    trainer = tiny_trainer(tmp_path, **settings, offload_frozen_components=True)
    traffic = Traffic(trainer, "text_encoder")
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert traffic.events == ["here", "away", "train", "here", "sample", "away", "train"]
    assert same(trained_weights(trainer), trained_weights(whole))


@pytest.mark.parametrize(
    ("family", "settings"),
    [("sd3", {"full": True}), ("flux", {"use_ema": True, "beta": 0.1})],
    ids=["full", "lora-kl"],
)
def test_a_compiled_denoiser(tmp_path, family, settings):
    """By the backend that compiles nothing but traces everything, for which no compiler is needed."""
    compiled = tiny_trainer(tmp_path, family, torch_compile=True, torch_compile_backend="eager", **settings)
    compiled.train()
    assert isinstance(compiled.model_wrapped, torch._dynamo.OptimizedModule)
    assert all(line["ratio/max_deviation"] == 0.0 for line in logged(tmp_path))
    plain = trained(tmp_path / "plain", family, **settings)
    for ours, expected in zip(trained_weights(compiled).values(), trained_weights(plain).values(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    compiled.save_model()
    assert list(tmp_path.glob("*.safetensors")) or list(tmp_path.glob("*/diffusion_pytorch_model.safetensors"))


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_gradient_checkpointing(tmp_path, family):
    plain, checkpointed = (
        trained(tmp_path / "plain", family),
        tiny_trainer(tmp_path, family, activation_checkpointing=True),
    )
    assert checkpointed.model.is_gradient_checkpointing
    checkpointed.train()
    assert all(line["ratio/max_deviation"] == 0.0 for line in logged(tmp_path))
    for ours, expected in zip(trained_weights(checkpointed).values(), trained_weights(plain).values(), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_an_optimizer_in_8_bits_says_what_it_needs(tmp_path):
    trainer = tiny_trainer(tmp_path, optim="adamw_bnb_8bit")
    with pytest.raises(ImportError, match="pip install.*bitsandbytes"):
        trainer.train()
    assert not list(tmp_path.iterdir())  # before anything was sampled


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_an_optimizer_in_8_bits(tmp_path):
    trainer = tiny_trainer(tmp_path, optim="adamw_bnb_8bit")
    before = trained_weights(trainer)
    trainer.train()
    assert not same(trained_weights(trainer), before)
