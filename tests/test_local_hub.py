"""The Hub of the tests, asked by the clients that users have: huggingface_hub and diffusers."""

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import RemoteEntryNotFoundError

from tests.local_hub import HubServer


NAME = "user/repo"
CARD = b"---\nlibrary_name: diffusers\ntags: [lora, slas]\n---\n# A card\n"
FILES = {"README.md": CARD, "weights.safetensors": bytes(range(256)) * 8, "samples/a b.txt": b"two words"}


def commit(files: dict[str, bytes], *deleted: str, **kwargs):
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    operations += [CommitOperationDelete(name) for name in deleted]
    return HfApi().create_commit(NAME, operations, commit_message="Files", **kwargs)


@pytest.fixture(params=["lfs", "regular"])
def hub(request, tmp_path):
    with HubServer(tmp_path / "server", uploads=request.param) as server, server.in_process():
        yield server


def test_files_go_up_and_come_back(hub):
    api = HfApi()
    assert api.whoami()["name"] == "user"
    assert api.create_repo(NAME, private=True).repo_id == NAME
    made = commit(FILES)
    assert [entry["title"] for entry in hub.commits(NAME)] == ["Files", "initial commit"]
    assert commit(FILES).oid == made.oid and hub.files(NAME) == FILES  # the same again is no commit
    info = api.model_info(NAME)
    assert info.private and info.tags == ["lora", "slas"] and info.sha == made.oid
    assert api.list_repo_files(NAME) == sorted([".gitattributes", *FILES])
    folder = snapshot_download(NAME, revision=made.oid)
    with open(f"{folder}/samples/a b.txt", "rb") as file:
        assert file.read() == b"two words"
    api.create_branch(NAME, branch="try/1", exist_ok=True)
    api.create_branch(NAME, branch="try/1", exist_ok=True)
    commit({}, "samples/a b.txt", revision="try/1")
    assert hub.files(NAME) == FILES and hub.files(NAME, "try/1").keys() == FILES.keys() - {"samples/a b.txt"}
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(NAME, "none.png")
    api.delete_repo(NAME)
    assert not api.repo_exists(NAME)
