"""Adapters that were there before, and pipelines with two denoisers."""

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig

from slas_trl.trainer.lora import ADAPTER_NAME
from tests.policy.zoo.all import FAMILIES
from tests.tiny_pipelines import PIPELINES

from .tiny_trainers import ATTENTION, PROMPTS, Watched, lora, same, tiny_trainer, trained, trained_weights
from .zoo_trainers import zoo_trainer


def picture(pipe, family: str) -> torch.Tensor:
    _, call = PIPELINES[family]
    generator = torch.Generator().manual_seed(3)
    return torch.tensor(pipe("a cat", num_inference_steps=3, generator=generator, output_type="np", **call).images)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """An adapter as a user might load one, by family."""
    folders = {}
    for family in ("sd", "sd3", "flux"):
        folders[family] = tmp_path_factory.mktemp(family)
        pipe = PIPELINES[family][0]()
        denoiser = pipe.unet if family == "sd" else pipe.transformer
        torch.manual_seed(5)
        denoiser.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=ATTENTION[:3], init_lora_weights=False))
        denoiser.save_lora_adapter(folders[family])
    return folders


def loaded(family: str, published, weight: float = 0.7) -> DiffusionPipeline:
    pipe = PIPELINES[family][0]()
    denoiser = pipe.unet if family == "sd" else pipe.transformer
    denoiser.load_lora_adapter(str(published[family]), prefix=None, adapter_name="theirs", use_safetensors=True)
    denoiser.set_adapters(["theirs"], [weight])
    return pipe


@pytest.mark.parametrize("family", ["sd", "sd3", "flux"])
def test_the_reference_keeps_an_adapter_that_was_loaded(tmp_path, family, published):
    plain, theirs = picture(PIPELINES[family][0](), family), picture(loaded(family, published), family)
    assert not torch.equal(plain, theirs)
    trainer = tiny_trainer(tmp_path, family, model=loaded(family, published), cls=Watched, beta=0.1, max_steps=3)
    assert torch.equal(picture(trainer.pipe, family), theirs)  # a new adapter changes nothing at first
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if ".theirs." in name}
    trainer.train()
    assert len(before) > 4
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters() if ".theirs." in name)
    kl = [log["kl"] for log in trainer.state.log_history if "kl" in log]
    assert kl[0] == 0.0 and kl[-1] > 0.0  # to the model with their adapter: not to the one without
    assert not torch.equal(picture(trainer.pipe, family), theirs)
    # What is saved is ours alone, and goes on top of theirs.
    trainer.save_model()
    fresh = loaded(family, published)
    fresh.load_lora_weights(tmp_path, adapter_name="ours")
    fresh.set_adapters(["theirs", "ours"], [0.7, 1.0])
    torch.testing.assert_close(picture(fresh, family), picture(trainer.pipe, family), rtol=0, atol=1e-5)


def test_the_reference_is_a_mean_of_the_model_that_was_loaded(tmp_path, published):
    """By hand: the step's mean with their adapter, before ours is trained."""
    trainer = tiny_trainer(tmp_path, "sd3", model=loaded("sd3", published), beta=0.1)
    rollout = trainer.replayer.sample(**trainer.calls.call(PROMPTS, [0, 1], [torch.Generator() for _ in range(2)]))
    with torch.no_grad():
        expected = trainer.replayer.replay(rollout, 1).mean
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                assert f".{ADAPTER_NAME}." in name
                parameter += 0.5
        assert not torch.equal(trainer.replayer.replay(rollout, 1).mean, expected)
    assert torch.equal(trainer.replayer.reference(rollout, 1, adapter=ADAPTER_NAME).mean, expected)
    assert not torch.equal(trainer.replayer.reference(rollout, 1).mean, expected)  # without any


def test_an_adapter_of_the_users_own_name(tmp_path):
    pipe = PIPELINES["sd3"][0]()
    pipe.transformer.add_adapter(lora(init_lora_weights=False))  # peft calls it "default"
    trainer = trained(tmp_path, model=pipe)
    assert {name.split(".")[-2] for name in trained_weights(trainer)} == {ADAPTER_NAME}


def test_an_adapter_that_was_switched_off_stays_off(tmp_path, published):
    pipe = loaded("sd3", published)
    pipe.transformer.disable_adapters()
    plain = picture(PIPELINES["sd3"][0](), "sd3")
    trainer = tiny_trainer(tmp_path, model=pipe)
    assert torch.equal(picture(trainer.pipe, "sd3"), plain)
    before = trained_weights(trainer)
    trainer.train()
    assert not same(before, trained_weights(trainer)) and not torch.equal(picture(trainer.pipe, "sd3"), plain)


def test_a_fused_adapter_is_refused(tmp_path, published):
    pipe = loaded("sd3", published)
    pipe.fuse_lora()
    with pytest.raises(ValueError, match=r"is fused into the denoiser.*pipe.unload_lora_weights\(\)"):
        tiny_trainer(tmp_path, model=pipe)


# What is written


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_nothing_tells_where_the_model_was(tmp_path, full):
    PIPELINES["sd"][0]().save_pretrained(tmp_path / "model")
    trainer = trained(tmp_path / "run", "sd", model=str(tmp_path / "model"), full=full, max_steps=1)
    trainer.save_model()
    written = [path for path in (tmp_path / "run").rglob("*") if path.suffix in (".safetensors", ".json")]
    assert written and not any(str(tmp_path).encode() in path.read_bytes() for path in written)
    if full:
        UNet2DConditionModel.from_pretrained(tmp_path / "run" / "unet")


# Two denoisers


def test_both_experts_are_trained_and_saved(tmp_path):
    family = FAMILIES["wan2.2"]
    settings = {"num_inference_steps": 4, "beta": 0.1, "use_ema": True, "save_strategy": "steps", "save_steps": 1}
    trainer = zoo_trainer(family, tmp_path, **settings, max_steps=3)
    assert trainer.denoiser_names == ["transformer", "transformer_2"]
    before = trained_weights(trainer)
    trainer.train()
    after = trained_weights(trainer)
    for name in trainer.denoiser_names:
        ours = [key for key in after if key.startswith(f"{name}.")]
        assert ours and any(not torch.equal(before[key], after[key]) for key in ours), name
    assert [log["ratio/max_deviation"] for log in trainer.state.log_history if "loss" in log] == [0.0] * 3

    expected = trainer.draw(PROMPTS, [0], [torch.Generator().manual_seed(0)], 1)[0]  # by the moving average
    pipe = family.build()
    pipe.load_lora_weights(tmp_path / "checkpoint-3")
    second = "pytorch_lora_weights_transformer_2.safetensors"
    pipe.load_lora_weights(tmp_path / "checkpoint-3", weight_name=second, load_into_transformer_2=True)
    call = {**family.call, "num_inference_steps": 4, "output_type": "pil"}
    (frames,) = pipe(prompt=[PROMPTS[0]["prompt"]], generator=[torch.Generator().manual_seed(0)], **call).frames
    assert frames[0].tobytes() == expected.tobytes()

    resumed = zoo_trainer(family, tmp_path / "resumed", **settings, max_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert same(trained_weights(resumed), after)


def test_all_weights_of_both_experts(tmp_path):
    trainer = zoo_trainer(FAMILIES["wan2.2"], tmp_path, peft_config=None, num_inference_steps=4, beta=0.1)
    trainer.train()
    trainer.save_model()
    for name in trainer.denoiser_names:
        saved = type(trainer.pipe.components[name]).from_pretrained(tmp_path / name)
        assert all(
            torch.equal(a, b)
            for a, b in zip(saved.parameters(), trainer.pipe.components[name].parameters(), strict=True)
        )
