"""The Hub of the tests, asked by the clients that users have: huggingface_hub and diffusers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from tests.local_hub import HubServer
from tests.tiny_pipelines import sd_pipeline


NAME = "user/repo"
WEIGHTS = bytes(range(256)) * 8
CARD = b"---\nlibrary_name: diffusers\ntags: [lora, slas]\n---\n# A card\n"


@pytest.fixture(params=["lfs", "regular"])
def hub(request, tmp_path):
    with HubServer(tmp_path / "server", uploads=request.param) as server, server.in_process():
        yield server


@pytest.fixture
def lfs_hub(tmp_path):
    with HubServer(tmp_path / "server") as server, server.in_process():
        yield server


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run as it is pushed: a card, weights, and a file in a folder."""
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    (folder / "README.md").write_bytes(CARD)
    (folder / "weights.safetensors").write_bytes(WEIGHTS)
    (folder / "samples" / "a b.txt").write_bytes(b"two words")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def add(path: str, content: bytes | Path) -> CommitOperationAdd:
    return CommitOperationAdd(path, content)


def test_a_folder_goes_up_and_comes_back(hub, folder):
    api = HfApi()
    assert api.whoami()["name"] == "user"
    assert str(api.create_repo(NAME)) == f"{hub.url}/{NAME}"
    made = api.upload_folder(repo_id=NAME, folder_path=folder, commit_message="First")
    assert [commit["title"] for commit in hub.commits(NAME)] == ["First", "initial commit"]
    assert made.oid == hub.commits(NAME)[0]["oid"] and made.commit_url == f"{hub.url}/{NAME}/commit/{made.oid}"
    assert hub.files(NAME) == contents(folder)
    assert [request["method"] for request in hub.requests("put")] == ["PUT"] * (hub.uploads == "lfs")

    # The same again is no commit; one more file is one, and only this file goes up.
    assert api.upload_folder(repo_id=NAME, folder_path=folder).oid == made.oid
    (folder / "more.bin").write_bytes(b"\0more")
    later = api.upload_folder(repo_id=NAME, folder_path=folder, run_as_future=True).result()
    assert [commit["oid"] for commit in hub.commits(NAME)[:2]] == [later.oid, made.oid]
    assert len(hub.requests("put")) == (2 if hub.uploads == "lfs" else 0)

    for revision, files in {"main": contents(folder), made.oid: contents(folder).keys() - {"more.bin"}}.items():
        got = contents(Path(snapshot_download(NAME, revision=revision)))
        assert got.pop(".gitattributes") and got.keys() == set(files)
    path = hf_hub_download(NAME, "weights.safetensors", revision=made.oid)
    assert Path(path).read_bytes() == WEIGHTS and path.startswith(str(hub.folder))


def test_what_a_repository_tells_of_itself(hub, folder):
    huggingface_hub.create_repo(NAME, private=True)
    huggingface_hub.upload_folder(repo_id=NAME, folder_path=folder)
    info = huggingface_hub.model_info(NAME)
    assert info.private and info.library_name == "diffusers" and info.tags == ["lora", "slas"]
    assert info.card_data and info.card_data.library_name == "diffusers"
    assert info.sha == hub.commits(NAME)[0]["oid"]
    assert {sibling.rfilename for sibling in info.siblings or []} == {".gitattributes", *contents(folder)}
    assert huggingface_hub.list_repo_files(NAME) == sorted([".gitattributes", *contents(folder)])
    top = {entry.path for entry in huggingface_hub.list_repo_tree(NAME)}
    assert top == {".gitattributes", "README.md", "samples", "weights.safetensors"}
    assert [file.path for file in huggingface_hub.list_repo_tree(NAME, "samples")] == ["samples/a b.txt"]
    weights, below, *rest = huggingface_hub.get_paths_info(NAME, ["weights.safetensors", "samples", "none"])
    assert isinstance(weights, RepoFile) and weights.size == len(WEIGHTS)
    assert below.path == "samples" and not rest
    assert (weights.lfs is not None) == (hub.uploads == "lfs")
    assert [commit.title for commit in huggingface_hub.list_repo_commits(NAME)][1:] == ["initial commit"]
    assert huggingface_hub.file_exists(NAME, "README.md") and not huggingface_hub.file_exists(NAME, "config.json")
    huggingface_hub.delete_repo(NAME)
    assert not huggingface_hub.repo_exists(NAME)


def test_branches(hub, folder):
    api = HfApi()
    api.create_repo(NAME)
    api.create_branch(NAME, branch="runs/one")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(NAME, branch="runs/one")
    api.create_branch(NAME, branch="runs/one", exist_ok=True)
    api.upload_folder(repo_id=NAME, folder_path=folder, revision="runs/one")
    assert [branch.name for branch in api.list_repo_refs(NAME).branches] == ["main", "runs/one"]
    assert hub.files(NAME) == {} and hub.files(NAME, "runs/one") == contents(folder)
    assert Path(hf_hub_download(NAME, "README.md", revision="runs/one")).read_bytes() == CARD
    with pytest.raises(RevisionNotFoundError):
        api.upload_folder(repo_id=NAME, folder_path=folder, revision="none")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(NAME, "README.md", revision="none")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(NAME, "samples/none.png", revision="runs/one")


def test_a_commit_deletes_and_copies(hub, folder):
    api = HfApi()
    api.create_repo(NAME)
    first = api.upload_folder(repo_id=NAME, folder_path=folder)
    moves = [CommitOperationCopy("weights.safetensors", "last/weights.safetensors"), CommitOperationDelete("samples/")]
    api.create_commit(NAME, moves, commit_message="Moves")
    kept = {"README.md": CARD, "weights.safetensors": WEIGHTS}
    assert hub.files(NAME) == {**kept, "last/weights.safetensors": WEIGHTS}
    assert hub.files(NAME, first.oid) == contents(folder)
    api.upload_folder(repo_id=NAME, folder_path=folder / "samples", path_in_repo="last", delete_patterns="*")
    assert hub.files(NAME) == {**kept, "last/a b.txt": b"two words"}
    for gone in ("samples/", "samples/a b.txt"):
        with pytest.raises(RemoteEntryNotFoundError, match="with this name doesn't exist"):
            api.create_commit(NAME, [CommitOperationDelete(gone)], commit_message="Nothing")
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(NAME, [add("a", b"a")], commit_message="Late", parent_commit=first.oid)


def test_who_may_do_what(hub, folder):
    api = HfApi()
    with pytest.MonkeyPatch.context() as patch:
        for name, private in ((NAME, False), ("org/private", True)):
            api.create_repo(name, private=private)
            with pytest.raises(HfHubHTTPError, match="409"):
                api.create_repo(name)
            api.create_repo(name, exist_ok=True)
            api.upload_folder(repo_id=name, folder_path=folder)
        with pytest.raises(HfHubHTTPError, match="403 Forbidden: You don't have the rights .* 'other'"):
            api.create_repo("other/repo")

        patch.setenv("HF_TOKEN", "hf_read")
        hf_hub_download("org/private", "README.md")
        for refused in (
            lambda: api.upload_folder(repo_id=NAME, folder_path=folder),
            lambda: api.create_branch(NAME, branch="b"),
            lambda: api.create_repo("user/new"),
        ):
            with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
                refused()
        api.create_repo(NAME, exist_ok=True)  # which can be read, and so is taken for one that exists

        patch.delenv("HF_TOKEN")
        hf_hub_download(NAME, "README.md")
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("org/private")
        with pytest.raises(HfHubHTTPError, match="401"):
            api.create_repo("user/new")

        patch.setenv("HF_TOKEN", "hf_bad")
        for refused in (api.whoami, lambda: api.model_info(NAME), lambda: api.create_repo(NAME, exist_ok=True)):
            with pytest.raises(HfHubHTTPError) as caught:
                refused()
            assert caught.value.response.status_code == 401 and not isinstance(caught.value, RepositoryNotFoundError)


@pytest.mark.parametrize(
    "card, message",
    [("---\na: [\n---\n", "no YAML"), ("---\n- a\n---\n", "must be a mapping")],
)
def test_a_card_that_is_broken(lfs_hub, card, message):
    huggingface_hub.create_repo(NAME)
    with pytest.raises(ValueError, match=message):
        huggingface_hub.create_commit(NAME, [add("README.md", card.encode())], commit_message="Card")
    huggingface_hub.ModelCard(CARD.decode()).validate()


# What goes wrong.


@pytest.mark.parametrize("route", ["preupload", "batch", "put", "verify", "commit"])
def test_an_upload_that_fails_leaves_nothing(lfs_hub, folder, route):
    huggingface_hub.create_repo(NAME)
    lfs_hub.fail(route)
    with pytest.raises((HfHubHTTPError, RuntimeError)) as caught:
        huggingface_hub.upload_folder(repo_id=NAME, folder_path=folder)
    error = caught.value.__cause__ if isinstance(caught.value, RuntimeError) else caught.value
    assert "507" in str(error) and len(lfs_hub.requests(route)) == 1
    assert len(lfs_hub.commits(NAME)) == 1
    lfs_hub.heal()
    huggingface_hub.upload_folder(repo_id=NAME, folder_path=folder)
    assert lfs_hub.files(NAME) == contents(folder) and len(lfs_hub.commits(NAME)) == 2


@pytest.mark.parametrize("wrong", ["fail", "drop", "lose"])
def test_attempts(lfs_hub, folder, wrong):
    huggingface_hub.create_repo(NAME)
    again = {"fail": {"status": 503}}.get(wrong, {})
    {"fail": lfs_hub.fail, "drop": lfs_hub.drop, "lose": lfs_hub.lose}[wrong]("put", after=1, times=2, **again)
    for number in (1, 2):
        (folder / f"{number}.bin").write_bytes(WEIGHTS + bytes(1000 * number))
    huggingface_hub.upload_folder(repo_id=NAME, folder_path=folder)
    assert len(lfs_hub.requests("put")) == 3 + 2 and lfs_hub.files(NAME) == contents(folder)


@pytest.mark.parametrize("wrong", ["drop", "lose"])
def test_an_answer_that_does_not_come(lfs_hub, folder, wrong):
    huggingface_hub.create_repo(NAME)
    {"drop": lfs_hub.drop, "lose": lfs_hub.lose}[wrong]("commit")
    with pytest.raises(httpx2.RemoteProtocolError):
        huggingface_hub.upload_folder(repo_id=NAME, folder_path=folder)
    assert len(lfs_hub.commits(NAME)) == (1 if wrong == "drop" else 2)
    lfs_hub.heal()
    huggingface_hub.upload_folder(repo_id=NAME, folder_path=folder)  # to find that nothing is left to do, or to do it
    assert len(lfs_hub.commits(NAME)) == 2 and lfs_hub.files(NAME) == contents(folder)


def test_a_folder_that_is_removed_during_its_upload(hub, folder):
    huggingface_hub.create_repo(NAME)
    hub.hold("preupload")
    upload = huggingface_hub.upload_folder(repo_id=NAME, folder_path=folder, run_as_future=True)
    hub.wait_for_held("preupload")
    assert not upload.done()
    shutil.rmtree(folder)
    hub.heal("preupload")
    with pytest.raises(FileNotFoundError):
        upload.result()
    assert len(hub.commits(NAME)) == 1


def test_a_server_that_is_gone_and_comes_back(hub, folder):
    huggingface_hub.create_repo(NAME)
    hub.stop()
    with pytest.raises(httpx2.ConnectError):
        huggingface_hub.upload_folder(repo_id=NAME, folder_path=folder)
    hub.start()
    huggingface_hub.upload_folder(repo_id=NAME, folder_path=folder)
    assert hub.files(NAME) == contents(folder)


def test_no_other_address(hub):
    # An attempt is an error at once, and another at the end for those who took the first for a network that is down.
    refused = pytest.raises(httpx2.ConnectError, match="may ask for http://127.0.0.1")
    with pytest.raises(AssertionError, match="huggingface.co"), hub.in_process(), refused:
        httpx2.get("https://huggingface.co")
    with hub.in_process() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(OfflineModeIsEnabled):
            huggingface_hub.create_repo(NAME)
    assert not hub.requests("create")


# Whole pipelines and adapters.


def images_of(pipe) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipe("a dog", num_inference_steps=2, generator=generator, output_type="np").images)


def test_diffusers_loads_what_was_pushed(hub, tmp_path):
    pipe = sd_pipeline()
    pipe.push_to_hub("user/base", private=True)
    plain = images_of(pipe)
    loaded = type(pipe).from_pretrained("user/base")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(images_of(loaded), plain)

    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipe.save_lora_weights(tmp_path / "lora", dict(get_peft_model_state_dict(pipe.unet)))
    huggingface_hub.create_repo(NAME)
    huggingface_hub.upload_folder(repo_id=NAME, folder_path=tmp_path / "lora")
    loaded.load_lora_weights(NAME)
    assert torch.allclose(images_of(loaded), images_of(pipe), atol=1e-6)
    assert not torch.allclose(images_of(loaded), plain, atol=1e-3)


def test_another_process(hub, folder):
    code = f"""
import huggingface_hub
assert huggingface_hub.whoami()["auth"]["accessToken"]["role"] == "write"
huggingface_hub.create_repo({NAME!r})
huggingface_hub.upload_folder(repo_id={NAME!r}, folder_path={str(folder)!r})
print(huggingface_hub.hf_hub_download({NAME!r}, "README.md"))
"""
    environ = {**os.environ, **hub.environ}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == CARD and done.stdout.startswith(str(hub.folder))
    assert hub.files(NAME) == contents(folder)
