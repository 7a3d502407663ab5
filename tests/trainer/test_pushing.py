"""When a run pushes, what is on the Hub then, and what becomes of a run whose pushes fail."""

import json
import os
import re
import shutil
import socket
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from transformers import TrainerCallback

from slas_trl import hub
from slas_trl.trainer.publishing import PublishingTrainer
from tests.local_hub import REPO, HubServer

from .tiny_trainers import PROMPTS, logged, same, tiny_trainer, trained, trained_weights, untimed


EVERY_UPDATE = {"save_strategy": "steps", "save_steps": 1}
PUSHED = {"push_to_hub": True, "hub_model_id": REPO}
ADAPTER = "pytorch_lora_weights.safetensors"


class StopAfter(TrainerCallback):
    """Ends training as a user's Ctrl-C would not: with a checkpoint, and without an end of the schedule."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


# Strategies


@pytest.mark.parametrize("uploads", ["lfs", "regular"])
def test_end(tmp_path, tmp_path_factory, uploads):
    with HubServer(tmp_path_factory.mktemp(uploads), uploads) as server, server.in_process():
        trainer = trained(tmp_path, **PUSHED, hub_strategy="end", **EVERY_UPDATE, hub_private_repo=True)
        assert len(server.commits(REPO)) == 1  # the initial one
        trainer.save_model()
        assert server.info(REPO)["private"] is True
        titles = [commit["title"] for commit in server.commits(REPO)]
        assert titles == ["Model save", "initial commit"]
        trainer.push_to_hub()  # the same again
        trainer.push_to_hub(commit_message="And again")
        assert [commit["title"] for commit in server.commits(REPO)] == titles
        files = server.files(REPO)
        assert all(name == "README.md" or name == ADAPTER or name.startswith("samples/") or name == "training.png"
                   for name in files)  # fmt: skip
        assert files["README.md"] == (tmp_path / "README.md").read_bytes()
        # The list of files in the card is the listing.
        listed = set(re.findall(r"^- `([^`]+)`", files["README.md"].decode().split("## Files")[1], re.MULTILINE))
        assert listed == {name.split("/")[0] + "/" * ("/" in name) for name in files}


def test_every_save(tmp_path, server, online):
    trainer = trained(tmp_path, **PUSHED, hub_strategy="every_save", hub_always_push=True, **EVERY_UPDATE)
    assert [commit["title"] for commit in server.commits(REPO)] == [
        "Training in progress, checkpoint 2",
        "Training in progress, checkpoint 1",
        "initial commit",
    ]
    files = server.files(REPO)
    assert list(files) == ["README.md", ADAPTER]  # no pictures while it goes on
    assert files[ADAPTER] == (tmp_path / "checkpoint-2" / ADAPTER).read_bytes()
    first = server.commits(REPO)[1]["oid"]
    assert server.files(REPO, first)[ADAPTER] == (tmp_path / "checkpoint-1" / ADAPTER).read_bytes()
    assert "1 of 2 updates" in server.files(REPO, first)["README.md"].decode()
    trainer.push_to_hub()
    assert "samples/1_after.png" in server.files(REPO)
    assert not list(tmp_path.glob("_*"))  # nothing is left of the uploads


def test_the_last_checkpoint_resumes_elsewhere_to_the_last_bit(tmp_path, server, online):
    settings = {"gradient_accumulation_steps": 2, "use_ema": True, "max_steps": 4}
    straight = trained(tmp_path / "straight", **settings)
    here = tiny_trainer(tmp_path / "here", **PUSHED, hub_strategy="checkpoint", **EVERY_UPDATE, **settings)
    here.add_callback(StopAfter(2))
    here.train()
    files = server.files(REPO)
    assert {name.split("/")[0] for name in files} == {"README.md", ADAPTER, "last-checkpoint"}
    assert files["last-checkpoint/" + ADAPTER] == files[ADAPTER]
    shutil.rmtree(tmp_path / "here")
    there = tiny_trainer(tmp_path / "there", **PUSHED, hub_strategy="checkpoint", **EVERY_UPDATE, **settings)
    there.train(resume_from_checkpoint=REPO)
    assert same(trained_weights(straight), trained_weights(there))
    lines = [untimed(line) for line in logged(tmp_path / "there")]
    assert lines == [untimed(line) for line in logged(tmp_path / "straight")]  # those from before, too
    assert server.files(REPO)["last-checkpoint/" + ADAPTER] == (tmp_path / "there/checkpoint-4" / ADAPTER).read_bytes()


def test_all_checkpoints(tmp_path, server, online):
    trained(tmp_path / "here", **PUSHED, hub_strategy="all_checkpoints", **EVERY_UPDATE)
    files = server.files(REPO)
    assert {name.split("/")[0] for name in files} == {"README.md", ADAPTER, "checkpoint-1", "checkpoint-2"}
    one = tiny_trainer(tmp_path / "there", max_steps=1)
    one.train(resume_from_checkpoint=f"{REPO}/checkpoint-1")  # at its end already
    assert one.state.global_step == 1
    with pytest.raises(ValueError, match="holds no checkpoint 'checkpoint-9'.*checkpoint-1, checkpoint-2"):
        tiny_trainer(tmp_path / "there").train(resume_from_checkpoint=f"{REPO}/checkpoint-9")
    with pytest.raises(ValueError, match="no checkpoint folder 'runs/none' here, and no repository"):
        tiny_trainer(tmp_path / "there").train(resume_from_checkpoint="runs/none")


def test_the_best_checkpoint_comes_along(tmp_path, server, online):
    settings = {"eval_dataset": PROMPTS, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True,
                "metric_for_best_model": "eval_reward", "greater_is_better": False, "max_steps": 3}  # fmt: skip
    here = tiny_trainer(tmp_path / "here", **PUSHED, hub_strategy="all_checkpoints", **EVERY_UPDATE, **settings)
    here.train()
    best = here.state.best_global_step
    state = json.loads(server.files(REPO)["checkpoint-3/trainer_state.json"])
    assert state["best_model_checkpoint"] == f"checkpoint-{best}"
    there = tiny_trainer(tmp_path / "there", **EVERY_UPDATE, **settings)
    there.train(resume_from_checkpoint=f"{REPO}/checkpoint-3")
    assert there.state.best_model_checkpoint == str(tmp_path / "there" / f"checkpoint-{best}")
    assert same(trained_weights(here), trained_weights(there))


def test_another_checkpoint_of_that_number_is_not_touched(tmp_path, server, online):
    trained(tmp_path / "here", **PUSHED, hub_strategy="checkpoint", **EVERY_UPDATE, max_steps=1)
    other = trained(tmp_path / "there", seed=7, **EVERY_UPDATE, max_steps=1)
    before = (tmp_path / "there/checkpoint-1" / ADAPTER).read_bytes()
    with pytest.raises(ValueError, match="is there already, and is another checkpoint"):
        other.train(resume_from_checkpoint=REPO)
    assert (tmp_path / "there/checkpoint-1" / ADAPTER).read_bytes() == before


def test_a_branch(tmp_path, server, online):
    trainer = trained(tmp_path, **PUSHED, hub_strategy="checkpoint", hub_revision="try/1", **EVERY_UPDATE, max_steps=1)
    trainer.push_to_hub()
    assert server.files(REPO) == {}
    files = server.files(REPO, "try/1")
    assert ADAPTER in files and 'revision="try/1"' in files["README.md"].decode()
    again = tiny_trainer(tmp_path / "again", **PUSHED, hub_revision="try/1", max_steps=1)
    again.train(resume_from_checkpoint=REPO)  # from the branch that it pushes to
    assert again.state.global_step == 1
    with pytest.raises(ValueError, match="holds no checkpoint"):
        tiny_trainer(tmp_path / "main", max_steps=1).train(resume_from_checkpoint=f"{REPO}@main")


def test_a_repository_that_exists(tmp_path, server, online):
    """What others have put there stays, but for our own old pictures, and nothing of it is loaded in our place."""
    api = HfApi(token="hf_good")
    api.create_repo(REPO)
    theirs = {"notes.txt": b"mine", "samples/photo.png": b"mine", "other.safetensors": b"mine"}
    for name, content in {**theirs, "samples/9_before.png": b"old", "samples/comparison.jpg": b"old"}.items():
        api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=REPO)
    trainer = trained(tmp_path, **PUSHED, max_steps=1)
    trainer.push_to_hub()
    files = server.files(REPO)
    assert {name: files.get(name) for name in theirs} == theirs
    assert "samples/9_before.png" not in files and "samples/1_after.png" in files
    from tests.tiny_pipelines import PIPELINES

    PIPELINES["sd3"][0]().load_lora_weights(REPO)  # an error, if it were "other.safetensors"


def test_pictures_are_few_and_small(tmp_path, server, online):
    """Eight for the gallery and a sheet, whatever the number of prompts; none from checkpoints on the way."""
    trainer = tiny_trainer(
        tmp_path, **PUSHED, hub_strategy="all_checkpoints", **EVERY_UPDATE, max_steps=6, log_completions=True
    )
    trainer.train()
    during = {name for commit in server.commits(REPO) for name in server.files(REPO, commit["oid"])}
    assert not {name for name in during if name.endswith(("png", "jpg"))}
    trainer.push_to_hub()
    pictures = {name: content for name, content in server.files(REPO).items() if name.endswith(("png", "jpg"))}
    assert len(pictures) == 8 + 1 + 2  # and two plots
    assert sum(map(len, pictures.values())) < 2_000_000


# Uploads in the background


def test_training_goes_on_during_an_upload_of_a_checkpoint_that_is_removed(tmp_path, server, online):
    server.hold("commit")
    trainer = tiny_trainer(
        tmp_path, **PUSHED, hub_strategy="all_checkpoints", **EVERY_UPDATE, max_steps=3, save_total_limit=1
    )
    seen = []

    class Release(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            server.wait_for_held("commit")
            assert not trainer._uploads.wait(0.1)
            seen.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))
            server.heal()

    trainer.add_callback(Release)
    trainer.train()
    assert seen == [["checkpoint-3"]]
    files = server.files(REPO)
    for number in (1, 2, 3):
        assert f"checkpoint-{number}/optimizer.pt" in files
    assert not list(tmp_path.glob("_*"))


def test_of_those_that_wait_the_newest_is_pushed(tmp_path, server, online):
    server.hold("commit")
    trainer = tiny_trainer(tmp_path, **PUSHED, hub_strategy="every_save", **EVERY_UPDATE, max_steps=4)

    class Release(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            server.heal()

    trainer.add_callback(Release)
    trainer.train()
    titles = [commit["title"] for commit in server.commits(REPO)]
    assert titles == ["Training in progress, checkpoint 4", "Training in progress, checkpoint 1", "initial commit"]


# Failures


@pytest.mark.parametrize("fault", ["put", "commit", "preupload"])
def test_a_server_that_fails_in_the_middle_of_an_upload(tmp_path, server, online, fault, caplog, monkeypatch):
    monkeypatch.setattr(PublishingTrainer, "_draw_gallery", lambda self: None)
    trainer = trained(tmp_path / "run", **PUSHED, hub_private_repo=True, max_steps=1)
    server.fail(fault)
    trainer.save_model()  # by itself, it is told and not raised
    later = f"slas-trl push {tmp_path / 'run'} {REPO} --private"
    assert "Nothing was pushed to 'user/run': " in caplog.text and "507" in caplog.text
    assert f"Not pushed: README.md, {ADAPTER}" in caplog.text and later in caplog.text
    with pytest.raises(hub.PushError, match=re.escape(later)):
        trainer.push_to_hub()
    assert len(server.commits(REPO)) == 1
    assert (tmp_path / "run" / ADAPTER).is_file() and not list((tmp_path / "run").glob("_*"))
    server.heal()
    trainer.push_to_hub()
    assert ADAPTER in server.files(REPO)


def test_a_connection_that_breaks_during_training(tmp_path, server, online, caplog):
    server.drop("put")
    trainer = tiny_trainer(tmp_path, **PUSHED, hub_strategy="checkpoint", **EVERY_UPDATE)
    trainer.train()
    assert trainer.state.global_step == 2
    assert "checkpoint-2: Nothing was pushed" in caplog.text
    assert f"slas-trl push {tmp_path} {REPO} --hub_strategy checkpoint" in caplog.text
    assert len(server.commits(REPO)) == 1


def test_a_connection_that_comes_back(tmp_path, server, online):
    server.fail("commit")
    trainer = tiny_trainer(tmp_path, **PUSHED, hub_strategy="checkpoint", **EVERY_UPDATE)

    class Heal(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            trainer._uploads.wait(60)
            server.heal()

    trainer.add_callback(Heal)
    trainer.train()
    assert [commit["title"] for commit in server.commits(REPO)][0] == "Training in progress, checkpoint 2"


def test_a_checkpoint_that_comes_late_leaves_the_newest_weights_where_they_are(tmp_path, server, online):
    server.fail("commit", times=1)
    trainer = tiny_trainer(tmp_path, **PUSHED, hub_strategy="all_checkpoints", **EVERY_UPDATE, max_steps=3)
    trainer.train()
    titles = [commit["title"].split()[-1] for commit in server.commits(REPO)]
    assert titles == ["1", "3", "2", "commit"]
    files = server.files(REPO)
    assert files[ADAPTER] == (tmp_path / "checkpoint-3" / ADAPTER).read_bytes()
    assert "`updates` **3**" in files["README.md"].decode() and "checkpoint-1/optimizer.pt" in files
    assert "- `checkpoint-1/`" in files["README.md"].decode()


def test_a_late_checkpoint_whose_newest_is_gone(tmp_path, server, online, caplog):
    """The best one is kept, and the newest removed at the end."""
    server.fail("commit", times=1)
    trainer = tiny_trainer(
        tmp_path,
        **PUSHED,
        **EVERY_UPDATE,
        hub_strategy="all_checkpoints",
        max_steps=3,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=PROMPTS.select(range(2)),
    )
    log = trainer.log

    def worse(logs, *args, **kwargs):
        if "eval_reward" in logs:
            logs["eval_reward"] = -float(trainer.state.global_step)  # so that the first is the best
        log(logs, *args, **kwargs)

    trainer.log = worse
    trainer.train()
    assert not (tmp_path / "checkpoint-3").exists() and "was not pushed" not in caplog.text
    assert {f"checkpoint-{i}/optimizer.pt" for i in (1, 2, 3)} <= server.files(REPO).keys()


def test_a_card_whose_base_cannot_be_asked_for_its_license_is_pushed(tmp_path, server, online):
    trainer = trained(tmp_path, **PUSHED, max_steps=1)
    trainer.pipe.register_to_config(_name_or_path="org/base")
    server.fail("info", status=200)
    trainer.push_to_hub()
    assert "**Unknown.**" in server.files(REPO)["README.md"].decode()


def test_checkpoints_that_are_gone_before_they_could_be_pushed(tmp_path, server, online, caplog):
    server.fail("commit", times=2)
    trainer = tiny_trainer(
        tmp_path, **PUSHED, hub_strategy="all_checkpoints", **EVERY_UPDATE, max_steps=3, save_total_limit=1
    )
    trainer.train()
    assert "checkpoint-1, checkpoint-2 could not be pushed, and save_total_limit has removed them" in caplog.text
    assert "checkpoint-3/optimizer.pt" in server.files(REPO)


@pytest.mark.parametrize("route", ["create", "commit"])
def test_an_answer_that_is_not_the_hubs_ends_no_run(tmp_path, server, online, caplog, route):
    server.fail(route, status=200)
    trainer = tiny_trainer(tmp_path, **PUSHED, hub_token="hf_good", max_steps=1)
    trainer.train()
    with pytest.raises(
        hub.PushError, match="the answer was not one of the Hub .*set to the same token, with\n    slas"
    ):
        trainer.push_to_hub()
    server.heal()
    trainer.push_to_hub()
    assert ADAPTER in server.files(REPO)


def test_a_thread_that_gave_up_with_another_is_no_failure(tmp_path, server, online, monkeypatch):
    """What huggingface_hub does when a connection breaks in one of its threads; when, is a matter of chance."""
    commit, calls = HfApi.create_commit, []

    def create_commit(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("Error while uploading") from RuntimeError("as the client has been closed.")
        return commit(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    trained(tmp_path, **PUSHED, max_steps=1).push_to_hub()
    assert len(calls) > 1 and ADAPTER in server.files(REPO)


def test_a_refusal_has_the_hubs_own_words(tmp_path, server, online):
    trainer = trained(tmp_path, **PUSHED, max_steps=1)
    server.fail("commit", status=403)
    with pytest.raises(hub.PushError, match=r"the Hub refused \(403, 'This server was told to fail'\); if it is"):
        trainer.push_to_hub()


def test_a_token_that_may_not_write_is_known_before_training(tmp_path, online):
    refused = f"push_to_hub cannot push to '{REPO}'"
    online.setenv("HF_TOKEN", "hf_bad")
    with pytest.raises(ValueError, match=f"{refused}.*401.*hf auth login"):
        tiny_trainer(tmp_path, **PUSHED)
    online.setenv("HF_TOKEN", "hf_read")
    with pytest.raises(ValueError, match=f"{refused}.*403"):
        tiny_trainer(tmp_path, **PUSHED)
    HfApi(token="hf_good").create_repo(REPO)
    with pytest.raises(ValueError, match=f"{refused}.*may only read"):
        tiny_trainer(tmp_path, **PUSHED)


def test_what_is_private_does_not_go_to_a_public_repository(tmp_path, server, online):
    HfApi(token="hf_good").create_repo(REPO, private=False)
    with pytest.raises(ValueError, match=f"cannot push to '{REPO}': it is there already, and public"):
        tiny_trainer(tmp_path, **PUSHED, hub_private_repo=True)
    trainer = trained(tmp_path, max_steps=1, hub_model_id=REPO, hub_private_repo=True)
    with pytest.raises(hub.PushError, match="it is there already, and public"):
        trainer.push_to_hub()
    assert len(server.commits(REPO)) == 1


def test_a_name_that_cannot_be(tmp_path, online):
    with pytest.raises(ValueError, match="push_to_hub cannot push to 'a/b/c'"):
        tiny_trainer(tmp_path, push_to_hub=True, hub_model_id="a/b/c")


def test_no_network_at_the_start(tmp_path, tmp_path_factory, caplog):
    with HubServer(tmp_path_factory.mktemp("hub")) as server, server.in_process():
        server.stop()
        trainer = tiny_trainer(tmp_path, **PUSHED, hub_strategy="every_save", **EVERY_UPDATE, max_steps=1)
        trainer.train()
        trainer.save_model()
        assert "Training goes on" in caplog.text and "could not be reached" in caplog.text
        assert f"slas-trl push {tmp_path} {REPO}" in caplog.text
        server.start()
        trainer.push_to_hub()
        assert ADAPTER in server.files(REPO)


def test_a_disk_that_is_full_ends_no_run(tmp_path, server, online, caplog, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "keep", full)
    trainer = trained(tmp_path, **PUSHED, hub_strategy="checkpoint", **EVERY_UPDATE)
    assert trainer.state.global_step == 2
    assert "checkpoint-2 was not pushed, and training goes on: [Errno 28]" in caplog.text


def test_the_best_weights_have_their_own_scores_on_the_card(tmp_path):
    settings = {"eval_dataset": PROMPTS, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True,
                "metric_for_best_model": "eval_reward", "max_steps": 3, "learning_rate": 1e-2}  # fmt: skip
    trainer = trained(tmp_path, **EVERY_UPDATE, **settings, greater_is_better=False)
    best = trainer.state.best_global_step
    trainer.save_model()
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert f"after {best} updates" in text and f"`updates` **{best}**" in text
    assert f"{trainer.state.best_metric:.4f}" in text


def test_the_card_lists_all_of_the_repository(tmp_path, server, online):
    api = HfApi(token="hf_good")
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id=REPO)
    trainer = trained(tmp_path, **PUSHED, hub_strategy="all_checkpoints", **EVERY_UPDATE)
    trainer.push_to_hub()
    text = server.files(REPO)["README.md"].decode()
    listed = dict(re.findall(r"^- `([^`]+)`: (.*)", text.split("## Files")[1], re.MULTILINE))
    assert listed.keys() == {name.split("/")[0] + "/" * ("/" in name) for name in server.files(REPO)}
    assert listed["notes.txt"] == "not of this run" and "to go on" in listed["checkpoint-1/"]


# Privacy


def test_nothing_of_the_machine_is_pushed(tmp_path, server, online):
    home = tmp_path / "home-of-alice"
    online.setenv("MY_SECRET", "sesame-open-thyself")
    trainer = tiny_trainer(
        home / "run", **PUSHED, hub_strategy="checkpoint", hub_token="hf_good", **EVERY_UPDATE, log_completions=True,
        eval_dataset=PROMPTS, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_reward", report_to=["tensorboard"],
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub()
    words = [str(tmp_path), "home-of-alice", "sesame-open", "hf_good", os.getcwd(), sys.prefix, f"{Path.home()}/"]
    for name, content in server.files(REPO).items():
        found = [word for word in words if word.encode() in content]
        if name.endswith((".md", ".json")):  # a short host name is in any picture
            found += re.findall(rf"\b{re.escape(socket.gethostname())}\b", content.decode())
        assert not found, f"{name} holds {found}"
        assert name.startswith("last-checkpoint/") or not name.endswith((".pt", ".pth", ".bin", ".pkl"))
    assert "home-of-alice" not in (home / "run" / "README.md").read_text()
    assert "home-of-alice" not in (home / "run" / "model_card.json").read_text()
