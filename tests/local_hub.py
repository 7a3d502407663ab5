"""The Hub for tests: `tests.hub_server` as a process, what it was given, what it does wrong, and who talks to it.

    with HubServer(tmp_path) as hub, hub.in_process():
        huggingface_hub.create_repo("user/repo")
        hub.fail("commit")
        ...

or `{**os.environ, **hub.environ}` for a process. The two kinds of `uploads` make huggingface_hub go different ways:
    lfs      Xet is off.
    regular  Xet is on, as users have it, and finds nothing to do.

huggingface_hub 2.4 repeats "preupload", "batch", "put", "verify" and "tree" 5 times, for up to 23 seconds, after 408,
429, 500, 502, 503, 504, or no answer; another status, such as 507, fails at once. `in_process` does not wait between.
"""

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import diffusers.loaders.lora_base
import diffusers.utils.hub_utils
import huggingface_hub.utils._detect_agent
import huggingface_hub.utils._http
import pytest
import transformers.utils.hub
from huggingface_hub import constants, hf_api

from tests.hub_server import ROUTES


ROOT = Path(__file__).parents[1]
REPO = "user/run"  # what tests push to


class HubServer:
    """The server in a process of its own, for the length of a `with`.

    Args:
        folder (`Path`): Where the server keeps what it is given, and where clients have their home.
        uploads (`str`, *optional*, defaults to `"lfs"`): `"lfs"` or `"regular"`, as told above.
    """

    def __init__(self, folder: Path, uploads: str = "lfs"):
        self.folder, self.uploads, self.port = folder, uploads, 0

    def __enter__(self) -> "HubServer":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the server, or starts it again: at the same address, with the same repositories."""
        argv = ["tests.hub_server", str(self.folder / "hub"), "--port", str(self.port), "--uploads", self.uploads]
        self.process = subprocess.Popen([sys.executable, "-m", *argv], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        self.port = int(self.url.rpartition(":")[2])

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()

    # What the server was given.

    def ask(self, path: str, content: object = None) -> bytes:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.url + path, data, {"Authorization": "Bearer hf_good"})
        with urllib.request.urlopen(request) as answer:
            return answer.read()

    def commits(self, repo: str, revision: str = "main") -> list[dict[str, str]]:
        """The commits of a branch, the newest first, each with `oid` and `title`. The last is "initial commit"."""
        found = json.loads(self.ask(f"/api/models/{repo}/commits/{quote(revision, safe='')}"))
        return [{"oid": commit["id"], "title": commit["title"]} for commit in found]

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The contents of all files by their paths, without the `.gitattributes` that every repository has."""
        rev = quote(revision, safe="")
        tree = json.loads(self.ask(f"/api/models/{repo}/tree/{rev}?recursive=true"))
        paths = [entry["path"] for entry in tree if entry["type"] == "file" and entry["path"] != ".gitattributes"]
        return {path: self.ask(f"/{repo}/resolve/{rev}/{quote(path)}") for path in paths}

    def info(self, repo: str, revision: str = "main") -> dict:
        """What the page of a repository is made of: `private`, `cardData`, `tags`, `siblings`, ..."""
        return json.loads(self.ask(f"/api/models/{repo}/revision/{quote(revision, safe='')}"))

    def requests(self, route: str | None = None) -> list[dict]:
        """The requests so far, each with `method`, `path` and `route`."""
        log = json.loads(self.ask("/_control/requests"))
        return [request for request in log if route in (None, request["route"])]

    # What it does wrong.

    def fail(self, route: str, status: int = 507) -> None:
        """From now on requests of a route fail with a status."""
        self.fault(route, kind="status", status=status)

    def drop(self, route: str) -> None:
        """As `fail`, but the connection is closed when half of the request is read."""
        self.fault(route, kind="drop")

    def hold(self, route: str) -> None:
        """Requests of a route wait until `heal`."""
        self.fault(route, kind="hold")

    def heal(self) -> None:
        """Ends all faults. What was held goes on."""
        self.ask("/_control/faults", dict.fromkeys(ROUTES))

    def fault(self, route: str, **fault: object) -> None:
        assert route in ROUTES, f"{route} is none of {', '.join(ROUTES)}"
        self.ask("/_control/faults", {route: fault})

    def wait_for_held(self, route: str, timeout: float = 60) -> None:
        """Until a request of a route is being held."""
        end = time.monotonic() + timeout
        while not any(request.get("held") for request in self.requests(route)):
            assert time.monotonic() < end, f"no {route} came: {self.requests()}"
            time.sleep(0.02)

    # Who talks to it.

    @property
    def environ(self) -> dict[str, str]:
        """Environment variables of a process that talks to this server, with an empty home and a token that writes."""
        home = self.folder / "home"
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": "hf_good",
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1" if self.uploads == "lfs" else "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    @contextlib.contextmanager
    def in_process(self) -> Iterator[pytest.MonkeyPatch]:
        """This process talks to the server, and to no other address. Gives what undoes the patches at the end.

        huggingface_hub and those who use it read their settings from the environment when they are imported, which was
        long ago; so all copies of them are changed. To be somebody else, `setenv("HF_TOKEN", "hf_read")`.
        """
        strays, resolve = [], socket.getaddrinfo

        def resolve_local(host: Any, *args: Any, **kwargs: Any) -> Any:
            if host in ("127.0.0.1", b"127.0.0.1", "localhost", None):
                return resolve(host, *args, **kwargs)
            strays.append(host)
            raise OSError(f"a test asked for {host}, and may ask for {self.url} only")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket, "getaddrinfo", resolve_local)
            for name, value in self.environ.items():
                patch.setenv(name, value)
            patch.setattr(constants, "ENDPOINT", self.url)
            patch.setattr(
                constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}"
            )
            for name in ("HF_HOME", "HF_HUB_CACHE", "HF_TOKEN_PATH"):
                patch.setattr(constants, name, self.environ[name])
            patch.setattr(constants, "HF_HUB_DISABLE_XET", self.uploads == "lfs")
            for module in (constants, diffusers.loaders.lora_base, diffusers.utils.hub_utils):
                patch.setattr(module, "HF_HUB_OFFLINE", False)
            # The instances behind `huggingface_hub.create_repo` and so on, and of transformers' own calls.
            patch.setattr(hf_api.api, "endpoint", self.url)
            patch.setattr(transformers.utils.hub, "_hf_api", None)
            # Nobody is asked which program this is, and no attempt waits for the next.
            patch.setattr(huggingface_hub.utils._detect_agent, "_registry", {"standardEnvVars": [], "harnesses": {}})
            patch.setattr(huggingface_hub.utils._http, "time", SimpleNamespace(sleep=lambda seconds: None))
            yield patch
            assert not strays, f"a test asked for {strays}"
