"""`slas-trl train --push_to_hub`, `slas-trl push`, and what others then do with the repository."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from slas_trl.cli.main import main
from tests.cli.tiny_run import forked, make_home
from tests.local_hub import REPO
from tests.tiny_pipelines import PIPELINES
from tests.trainer.tiny_trainers import same, tiny_trainer, trained, trained_weights


ADAPTER = "pytorch_lora_weights.safetensors"
PROMPTS = ["a dot", "a box", "<script>alert(1)</script>\u2028", 'dots: "---" | `x` {{ 7*7 }}']
SETTINGS = {"reward_funcs": ["brightness"], "use_peft": True, "lora_r": 4, "learning_rate": "1e-2"}
SETTINGS |= {"save_steps": 1, "report_images_per_prompt": 1, "hub_model_id": REPO}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = make_home(tmp_path_factory.mktemp("home-of-alice"), "push_rewards", **SETTINGS)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def unpushed(home, server):
    """A run, as its user typed it, whose checkpoints and result the Hub did not take; its status, and what it said."""
    server.fail("commit")
    argv = ["train", "--config", "run.yaml", "--push_to_hub", "true", "--hub_strategy", "checkpoint"]
    status = os.waitpid(forked(home, *argv, within=server.in_process()), 0)[1]
    server.heal()
    return os.waitstatus_to_exitcode(status), *((home / name).read_text() for name in ("stdout", "stderr"))


@pytest.fixture
def at_home(home, monkeypatch):
    monkeypatch.chdir(home)


class TestARunThatCouldNotBePushed:
    later = f"slas-trl push run {REPO} --hub_strategy checkpoint"

    def test_ends_well_and_says_how_to_push_it_later(self, unpushed, home):
        status, out, err = unpushed
        assert status == 0, err
        assert "checkpoint 2: Nothing was pushed to 'user/run': the Hub answered 507" in err
        assert f"slas-trl train: Nothing was pushed to '{REPO}'" in err and self.later in err
        assert "Done. Look at run" in out and "Pushed" not in out
        assert (home / "run" / ADAPTER).is_file() and (home / "run" / "evaluation.json").is_file()

    def test_later(self, unpushed, at_home, server, online, capsys):
        assert main(self.later.split()[1:]) == 0
        printed = capsys.readouterr().out
        files = server.files(REPO)
        assert files[ADAPTER] == Path("run", ADAPTER).read_bytes()
        assert files[f"last-checkpoint/{ADAPTER}"] == Path("run/checkpoint-2", ADAPTER).read_bytes()
        assert "last-checkpoint/optimizer.pt" in files
        assert "last-checkpoint/optimizer.pt" in printed and "Pushed: " in printed
        assert f'pipe.load_lora_weights("{REPO}")' in files["README.md"].decode()
        assert not any(b"home-of-alice" in content for content in files.values())
        PIPELINES["sd"][0]().load_lora_weights(REPO)

        # Once more: nothing new.
        commits = server.commits(REPO)
        assert main(self.later.split()[1:]) == 0
        assert server.commits(REPO) == commits

        # Others go on from it, or draw with it.
        argv = ["train", "--config", "run.yaml", "--output_dir", "there", "--max_steps", "3", "--report_prompts", "0"]
        assert main([*argv, "--resume_from_checkpoint", REPO]) == 0
        state = json.loads(Path("there/checkpoint-3/trainer_state.json").read_text())
        assert [log["step"] for log in state["log_history"] if "loss" in log] == [1, 2, 3]
        draw = ["generate", "--model_name_or_path", "model", "--num_inference_steps", "2", "--prompt", "a dot"]
        assert main([*draw, "--adapter", REPO, "--output", "hub.png"]) == 0
        assert main([*draw, "--adapter", "run", "--output", "folder.png"]) == 0
        assert main([*draw, "--output", "plain.png"]) == 0
        hub, folder, plain = (Image.open(f"{name}.png").tobytes() for name in ("hub", "folder", "plain"))
        assert hub == folder != plain

    def test_with_a_base_model_that_is_on_the_hub(self, unpushed, at_home, server, online):
        argv = ["push", "run", REPO, "--base_model", "org/base", "--private", "--revision", "try"]
        assert main([*argv, "--commit_message", "Here it is"]) == 0
        card = server.files(REPO, "try")["README.md"].decode()
        data = yaml.safe_load(card.split("---\n")[1])
        assert (data["base_model"], data["base_model_relation"]) == ("org/base", "adapter")
        assert "license" not in data and "**Unknown.**" in card  # nothing of that name is there to ask
        assert server.store.repos[REPO]["private"] is True
        assert server.commits(REPO, "try")[0]["title"] == "Here it is"

    def test_a_card_that_was_edited_stays(self, unpushed, at_home, server, online, capsys):
        shutil.copytree("run", "edited")
        with Path("edited/README.md").open("a", encoding="utf-8") as card:
            card.write("My own words.")
        assert main(["push", "edited", REPO]) == 0
        assert "My own words." in server.files(REPO)["README.md"].decode()
        assert "README.md was edited" in capsys.readouterr().err

    def test_one_of_its_checkpoints(self, unpushed, at_home, server, online):
        assert main(["push", "run/checkpoint-1", REPO]) == 0
        files = server.files(REPO)
        assert list(files) == ["README.md", ADAPTER]  # the pictures and scores are of another update
        card = files["README.md"].decode()
        assert "`updates` **1**" in card and "1 of 2 updates" in card and "model-index" not in card


def test_weights_of_an_earlier_update_are_not_pushed(tmp_path, server, online, capsys):
    settings = {"save_strategy": "steps", "save_steps": 1}
    first = trained(tmp_path, **settings, max_steps=1)
    first.save_model()
    second = tiny_trainer(tmp_path, **settings, max_steps=2)
    second.train(resume_from_checkpoint=True)  # whose result is in its checkpoint alone
    assert main(["push", str(tmp_path), REPO]) == 0
    assert "the weights are those of checkpoint-2" in capsys.readouterr().err
    files = server.files(REPO)
    assert files[ADAPTER] == (tmp_path / "checkpoint-2" / ADAPTER).read_bytes()
    assert "`updates` **2**" in files["README.md"].decode()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["nowhere", REPO], "model_card.json"),
        (["run", "a/b/c"], "a/b/c"),
        (["run", "other/name"], "the Hub answered 403"),
    ],
)
def test_what_cannot_be_pushed(unpushed, at_home, online, argv, expected, capsys):
    assert main(["push", *argv]) == 2 and expected in capsys.readouterr().err


def test_python_resumes_from_the_hub_what_the_command_line_pushed(tmp_path, server, online):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = trained(tmp_path / "run", **settings)
    whole.save_model()
    assert main(["push", str(tmp_path / "run"), REPO, "--hub_strategy", "all_checkpoints"]) == 0
    second = tiny_trainer(tmp_path / "second", **settings)
    second.train(resume_from_checkpoint=f"{REPO}/checkpoint-1")
    assert same(trained_weights(whole), trained_weights(second))
