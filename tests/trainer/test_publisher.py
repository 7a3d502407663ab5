"""When a run pushes, what is on the Hub and beside the weights then, and what becomes of a run whose pushes fail."""

import io
import json
import os
import re
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from datasets import Image as HFImage
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from transformers import TrainerCallback

from slas_trl.publishing.facts import read_facts
from slas_trl.publishing.repository import PushError
from slas_trl.run_files import ADAPTER
from tests.local_hub import REPO, HubServer
from tests.policy.zoo.all import FAMILIES
from tests.tiny_pipelines import PIPELINES

from .tiny_trainers import PROMPTS, SAVED, alike, lora, redness, resumed, same, tiny_trainer, trained, trained_weights
from .zoo_trainers import zoo_trainer


BEST = {"eval_dataset": PROMPTS, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
PUSHED = {"push_to_hub": True, "hub_model_id": REPO}


class AtTheEnd(TrainerCallback):
    def __init__(self, act, step: int | None = None):
        self.act, self.step = act, step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step

    def on_train_end(self, args, state, control, **kwargs):
        self.act()


def titles(server) -> list[str]:
    return [commit["title"] for commit in server.commits(REPO)]


def card_of(server, revision: str = "main") -> str:
    return server.files(REPO, revision)["README.md"].decode()


def metadata_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def python_in(card: str) -> str:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]


def drawn(pipe, family: str) -> bytes:
    call = {**FAMILIES[family].arguments(PROMPTS["prompt"][:2]), "num_inference_steps": 4}
    return np.asarray(pipe(**call)[0]).tobytes()


def first_picture(trainer, data: Dataset = PROMPTS) -> Image.Image:
    return trainer.evaluator.draw(data, [0], [torch.Generator().manual_seed(0)], 1)[0]


@pytest.mark.parametrize("uploads", ["lfs", "regular"])
def test_end(tmp_path, tmp_path_factory, uploads):
    with HubServer(tmp_path_factory.mktemp(uploads), uploads) as server, server.in_process():
        trainer = trained(tmp_path, **PUSHED, hub_strategy="end", **SAVED, hub_private_repo=True)
        assert titles(server) == ["initial commit"]
        trainer.save_model()
        assert titles(server) == ["Model save", "initial commit"] and server.store.repos[REPO]["private"] is True
        files = server.files(REPO)
        pictures = {f"samples/{i}_{when}.png" for i in range(1, 5) for when in ("before", "after")}
        assert files.keys() == {"README.md", ADAPTER, "training.png", "samples/comparison.png", *pictures}
        assert files["README.md"] == (tmp_path / "README.md").read_bytes()


def test_every_save(tmp_path, server, online):
    trainer = trained(tmp_path, **PUSHED, hub_strategy="every_save", hub_always_push=True, **SAVED)
    assert titles(server)[:2] == [f"Training in progress, checkpoint {i}" for i in (2, 1)]
    files = server.files(REPO)
    assert list(files) == ["README.md", ADAPTER]  # no pictures while it goes on
    assert files[ADAPTER] == (tmp_path / "checkpoint-2" / ADAPTER).read_bytes()
    first = server.commits(REPO)[1]["oid"]
    assert server.files(REPO, first)[ADAPTER] == (tmp_path / "checkpoint-1" / ADAPTER).read_bytes()
    assert "1 of 2 updates" in card_of(server, first)
    trainer.push_to_hub()
    assert "samples/1_after.png" in server.files(REPO) and "of 2 updates" not in card_of(server)
    assert not list(tmp_path.glob("_*"))  # nothing is left of the uploads


def test_the_last_checkpoint_resumes_elsewhere_to_the_last_bit(tmp_path, server, online):
    settings = {"gradient_accumulation_steps": 2, "use_ema": True, "max_steps": 4}
    straight = trained(tmp_path / "straight", **settings)
    pushed = {**PUSHED, "hub_strategy": "checkpoint", **SAVED, **settings}
    trained(tmp_path / "here", **pushed, callbacks=[AtTheEnd(lambda: None, step=2)])
    files = server.files(REPO)
    assert {name.split("/")[0] for name in files} == {"README.md", ADAPTER, "last-checkpoint"}
    assert files["last-checkpoint/" + ADAPTER] == files[ADAPTER] and "last-checkpoint/model_card.json" not in files
    shutil.rmtree(tmp_path / "here")
    there = resumed(tmp_path / "there", REPO, **pushed)
    assert alike(straight, there)  # with the lines from before
    assert server.files(REPO)["last-checkpoint/" + ADAPTER] == (tmp_path / "there/checkpoint-4" / ADAPTER).read_bytes()


def test_all_checkpoints_and_the_best_one_comes_along(tmp_path, server, online):
    settings = {**SAVED, **BEST, "greater_is_better": False, "max_steps": 3}
    here = trained(tmp_path / "here", **PUSHED, hub_strategy="all_checkpoints", **settings)
    best = here.state.best_global_step
    state = json.loads(server.files(REPO)["checkpoint-3/trainer_state.json"])
    assert state["best_model_checkpoint"] == f"checkpoint-{best}"
    there = resumed(tmp_path / "there", f"{REPO}/checkpoint-3", **settings)  # at its end already
    assert there.state.best_model_checkpoint == str(tmp_path / "there" / f"checkpoint-{best}")
    assert same(trained_weights(here), trained_weights(there))
    for source in (f"{REPO}/checkpoint-9", "runs/none"):
        with pytest.raises(ValueError, match=source.split("/")[-1]):
            there.train(resume_from_checkpoint=source)


def test_another_checkpoint_of_that_number_is_not_touched(tmp_path, server, online):
    trained(tmp_path / "here", **PUSHED, hub_strategy="checkpoint", **SAVED, max_steps=1)
    other = trained(tmp_path / "there", seed=7, **SAVED, max_steps=1)
    before = (tmp_path / "there/checkpoint-1" / ADAPTER).read_bytes()
    with pytest.raises(ValueError, match="another checkpoint"):
        other.train(resume_from_checkpoint=REPO)
    assert (tmp_path / "there/checkpoint-1" / ADAPTER).read_bytes() == before


def test_a_branch(tmp_path, server, online):
    trainer = trained(tmp_path, **PUSHED, hub_strategy="checkpoint", hub_revision="try/1", **SAVED, max_steps=1)
    trainer.push_to_hub()
    assert server.files(REPO) == {}
    assert ADAPTER in server.files(REPO, "try/1") and 'revision="try/1"' in card_of(server, "try/1")
    again = resumed(tmp_path / "again", REPO, **PUSHED, hub_revision="try/1", max_steps=1)
    assert again.state.global_step == 1  # from the branch that it pushes to
    with pytest.raises(ValueError, match="checkpoint"):
        resumed(tmp_path / "main", f"{REPO}@main", max_steps=1)


def test_a_repository_that_exists(tmp_path, server, online):
    """What others have put there stays, but for our own old pictures."""
    api = HfApi(token="hf_good")
    api.create_repo(REPO)
    theirs = {"notes.txt": b"mine", "samples/photo.png": b"mine", "other.safetensors": b"mine"}
    for name, content in {**theirs, "samples/9_before.png": b"old", "samples/comparison.jpg": b"old"}.items():
        api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=REPO)
    trained(tmp_path, **PUSHED, max_steps=1).push_to_hub()
    files = server.files(REPO)
    assert {name: files.get(name) for name in theirs} == theirs
    assert not {"samples/9_before.png", "samples/comparison.jpg"} & files.keys() and "samples/1_after.png" in files
    PIPELINES["sd3"][0]().load_lora_weights(REPO)  # an error, if it were "other.safetensors"


def test_training_goes_on_during_an_upload_of_a_checkpoint_that_is_removed(tmp_path, server, online):
    server.hold("commit")
    seen = []

    def release():
        server.wait_for_held("commit")
        seen.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))
        server.heal()

    settings = {"hub_strategy": "all_checkpoints", "max_steps": 3, "save_total_limit": 1}
    trained(tmp_path, **PUSHED, **SAVED, **settings, callbacks=[AtTheEnd(release)])
    assert seen == [["checkpoint-3"]]
    assert {f"checkpoint-{number}/optimizer.pt" for number in (1, 2, 3)} <= server.files(REPO).keys()
    assert not list(tmp_path.glob("_*"))


def test_of_those_that_wait_the_newest_is_pushed(tmp_path, server, online):
    server.hold("commit")

    class Waits(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            server.wait_for_held("commit")

    settings = {"hub_strategy": "every_save", "max_steps": 4, "callbacks": [Waits(), AtTheEnd(server.heal)]}
    trained(tmp_path, **PUSHED, **SAVED, **settings)
    assert titles(server)[:-1] == [f"Training in progress, checkpoint {i}" for i in (4, 1)]
    assert not list(tmp_path.glob("_*"))


def test_a_server_that_fails_in_the_middle_of_an_upload(tmp_path, server, online, caplog):
    trainer = trained(tmp_path / "run", **PUSHED, hub_private_repo=True, max_steps=1)
    server.fail("commit")
    trainer.save_model()  # by itself, it is logged and not raised
    later = f"slas-trl push {tmp_path / 'run'} {REPO} --private"
    assert "'user/run'" in caplog.text and "507" in caplog.text and later in caplog.text
    with pytest.raises(PushError, match=re.escape(later)):
        trainer.push_to_hub()
    assert len(server.commits(REPO)) == 1
    assert (tmp_path / "run" / ADAPTER).is_file() and not list((tmp_path / "run").glob("_*"))
    server.heal()
    trainer.push_to_hub()
    assert ADAPTER in server.files(REPO)


def test_a_connection_that_breaks_during_training(tmp_path, server, online, caplog):
    server.drop("put")
    trainer = trained(tmp_path, **PUSHED, hub_strategy="checkpoint", **SAVED)
    assert trainer.state.global_step == 2 and len(server.commits(REPO)) == 1
    assert "checkpoint 2: Nothing was pushed" in caplog.text
    assert f"slas-trl push {tmp_path} {REPO} --hub_strategy checkpoint" in caplog.text


def test_what_is_refused_is_known_before_training(tmp_path, online):
    def refused(token: str, why: str, **settings):
        online.setenv("HF_TOKEN", token)
        with pytest.raises(ValueError, match=f"cannot push to {why}"):
            tiny_trainer(tmp_path, **{**PUSHED, **settings})

    refused("hf_bad", f"'{REPO}'.*401")
    refused("hf_read", f"'{REPO}'.*403")
    HfApi(token="hf_good").create_repo(REPO, private=False)
    refused("hf_read", f"'{REPO}'.*may only read")
    refused("hf_read", "'a/b/c'", hub_model_id="a/b/c")
    refused("hf_good", f"'{REPO}'.*public", hub_private_repo=True)


def test_no_network_at_the_start(tmp_path, tmp_path_factory, caplog):
    with HubServer(tmp_path_factory.mktemp("hub")) as server, server.in_process():
        server.stop()
        trainer = trained(tmp_path, **PUSHED, hub_strategy="every_save", **SAVED, max_steps=1)
        trainer.save_model()
        assert "Training goes on" in caplog.text and f"slas-trl push {tmp_path} {REPO}" in caplog.text
        server.start()
        trainer.push_to_hub()
        assert ADAPTER in server.files(REPO)


def test_facts_are_beside_every_set_of_weights(tmp_path):
    settings = {**SAVED, **BEST, "greater_is_better": False, "max_steps": 3, "eval_on_start": True}
    trainer = trained(tmp_path, **settings, learning_rate=1e-2)
    assert [read_facts(tmp_path / f"checkpoint-{i}").step for i in (1, 2, 3)] == [1, 2, 3]
    best = trainer.state.best_global_step
    trainer.save_model()
    facts = read_facts(tmp_path)
    assert (facts.step, facts.max_steps, facts.samples) == (best, best, [])
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert f"after {best} updates" in card and f"`updates` **{best}**" in card and "(training.png)" in card
    [metric] = metadata_of(card)["model-index"][0]["results"][0]["metrics"]
    [log] = [log for log in trainer.state.log_history if log["step"] == best and "eval_reward" in log]
    half = log["eval_rewards/redness/half_width"]
    assert metric["type"] == "redness" and metric["value"] == trainer.state.best_metric == log["eval_reward"]
    assert metric["args"]["confidence_interval_95"] == pytest.approx([metric["value"] - half, metric["value"] + half])
    assert metric["args"]["prompts"] == 6 and metric["args"]["before_training"] != metric["value"]


def test_a_card_that_no_run_has_written_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    trainer = trained(tmp_path, max_steps=1)
    trainer.save_model()
    assert (tmp_path / "README.md").read_text() == "mine" and read_facts(tmp_path).step == 1


def test_what_a_reward_says_of_itself_is_in_the_card(tmp_path):
    def reward(prompts, images, **columns):
        return redness(prompts, images)

    reward.blind_to, reward.measures = "green", "red"
    pipe = PIPELINES["sd3"][0]()
    pipe.transformer.add_adapter(lora(init_lora_weights=False), adapter_name="theirs")
    tiny_trainer(tmp_path, reward_funcs=[reward, "brightness"], model=pipe).create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "| `reward`<br>red | 1 | green |" in card and "| `brightness`<br>how bright" in card
    assert "`theirs`" in card  # an adapter that has to be there too


@pytest.mark.parametrize("family", ["sd3", "ovis-image"], ids=["load_lora_weights", "load_lora_adapter"])
def test_the_adapter_gives_the_trained_images(tmp_path, server, online, family):
    """With lora_alpha that is not the rank; the card's own lines, for one who has the base model."""
    trainer = zoo_trainer(FAMILIES[family], tmp_path, **PUSHED, learning_rate=1e-2)
    trainer.train()
    trainer.push_to_hub()
    pipe = FAMILIES[family].build()
    before = drawn(pipe, family)
    code = python_in(card_of(server))
    exec(code[code.index("\npipe.") : code.index("pipe.to(")], {"pipe": pipe})
    assert drawn(pipe, family) == drawn(trainer.pipe, family) != before


def test_a_pipeline_that_edits(tmp_path, server, online, monkeypatch):
    """Its gallery has the pictures of the data set edited; its quick start edits the first of them, as pasted."""
    base = tmp_path / "base"
    FAMILIES["kontext"].build().save_pretrained(base)
    pictures = []
    for i in range(4):
        image, exif = Image.new("RGB", (16, 16), (40 * i, 90, 200)), Image.Exif()
        exif[0x010E] = "taken at home"
        image.save(tmp_path / f"{i}.png", exif=exif, icc_profile=b"at home")
        pictures.append(str(tmp_path / f"{i}.png"))
    data = Dataset.from_dict({"prompt": PROMPTS["prompt"][:4], "image": pictures}).cast_column("image", HFImage())
    settings = {"pipe": DiffusionPipeline.from_pretrained(base), "train_dataset": data, "learning_rate": 1e-2}
    trainer = zoo_trainer(FAMILIES["kontext"], tmp_path / "run", **settings, **PUSHED)
    trainer.train()
    trainer.push_to_hub()
    files, card = server.files(REPO), card_of(server)
    assert "samples/4_before.png" in files and metadata_of(card)["pipeline_tag"] == "image-to-image"
    assert [name for name in files if "input" in name] == ["samples/1_input.png"]
    with Image.open(io.BytesIO(files["samples/1_input.png"])) as pushed, Image.open(pictures[0]) as given:
        assert not pushed.info and pushed.tobytes() == given.tobytes()
    monkeypatch.chdir(tmp_path)
    exec(python_in(card).replace('"path/to/base"', '"base"'), {})
    with Image.open("edited.png") as edited:
        assert edited.tobytes() == first_picture(trainer, data).tobytes()


def test_all_weights_are_a_folder_of_the_denoiser(tmp_path, server, online):
    base = tmp_path / "secret-place" / "base"
    PIPELINES["flux"][0]().save_pretrained(base)
    model, original = (DiffusionPipeline.from_pretrained(base) for _ in range(2))
    settings = {**PUSHED, **SAVED, "full": True, "learning_rate": 1e-2, "hub_strategy": "end"}
    trainer = trained(tmp_path / "run", "flux", model=model, **settings)
    trainer.push_to_hub()
    files = server.files(REPO)
    names = ["transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"]
    assert [name for name in files if name.startswith("transformer")] == names and ADAPTER not in files
    assert not any(b"secret-place" in content for content in files.values())
    # The pictures before training were drawn then: there is no adapter to leave out.
    [batch] = trainer.inputs.batches(PROMPTS, [0], [torch.Generator().manual_seed(0)], 1)
    with Image.open(tmp_path / "run" / "samples" / "1_before.png") as shown:
        np.testing.assert_array_equal(np.asarray(shown)[::10, ::10], np.asarray(original(**batch.call).images[0]))
    data = ModelCard(card_of(server)).data
    assert "lora" not in data.tags and data.library_name == "diffusers"


def test_the_card_names_the_base_model_and_its_license(tmp_path, server, online, monkeypatch):
    base = tmp_path / "base"
    PIPELINES["sd3"][0]().save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE.md\n---\nx")
    api = HfApi(token="hf_good")
    api.create_repo("org/base", exist_ok=True)
    api.upload_folder(repo_id="org/base", folder_path=base)
    left_out = {"text_encoder_3": None, "tokenizer_3": None}
    trainer = trained(tmp_path / "run", model="org/base", **PUSHED, max_steps=1, model_init_kwargs=left_out)
    trainer.push_to_hub(dataset_name="org/prompts", tags=["mine"])
    text, data = card_of(server), metadata_of(card_of(server))
    assert (data["base_model"], data["base_model_relation"]) == ("org/base", "adapter")
    assert (data["license"], data["license_name"]) == ("other", "mine")
    assert data["datasets"] == ["org/prompts"] and "mine" in data["tags"]
    assert "`optim` **adamw_torch" in text and (tmp_path / "run" / "README.md").read_text() == text
    # The quick start, as pasted: base and adapter both come from the server.
    monkeypatch.chdir(tmp_path)
    exec(python_in(text), {})
    with Image.open("image.png") as image, Image.open(tmp_path / "run" / data["widget"][0]["output"]["url"]) as shown:
        assert (np.asarray(image)[::10, ::10] == np.asarray(shown.resize((16, 16), 0))[::10, ::10]).all()
    assert [entry["output"]["url"] in server.files(REPO) for entry in data["widget"]] == [True] * 8


def test_nothing_of_the_machine_is_pushed(tmp_path, server, online):
    home = tmp_path / "home-of-alice"
    online.setenv("MY_SECRET", "sesame-open-thyself")
    settings = {**BEST, **SAVED, "log_completions": True, "report_to": ["tensorboard"]}
    trainer = tiny_trainer(home / "run", **PUSHED, hub_strategy="checkpoint", hub_token="hf_good", **settings)
    trainer.train()
    trainer.push_to_hub()
    words = [str(tmp_path), "home-of-alice", "sesame-open", "hf_good", os.getcwd(), sys.prefix, f"{Path.home()}/"]
    files = server.files(REPO)
    assert "calibration.png" in files and sum(name.endswith(("png", "jpg")) for name in files) == 8 + 1 + 2
    for name, content in files.items():
        found = [word for word in words if word.encode() in content]
        if name.endswith((".md", ".json")):  # a short host name is in any picture
            found += re.findall(rf"\b{re.escape(socket.gethostname())}\b", content.decode())
        assert not found, f"{name} holds {found}"
        assert name.startswith("last-checkpoint/") or not name.endswith((".pt", ".pth", ".bin", ".pkl"))
    for name in ("README.md", "model_card.json"):
        assert "home-of-alice" not in (home / "run" / name).read_text()
