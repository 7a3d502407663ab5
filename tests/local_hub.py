"""The Hub for tests: a server on this machine that speaks its HTTP protocol, as huggingface_hub 2.4 asks for it.

    with HubServer(tmp_path) as hub, hub.in_process():
        huggingface_hub.create_repo("user/repo")
        hub.fail("commit")
        ...

or `{**os.environ, **hub.environ}` for a process.

Tokens: "hf_good" writes, "hf_read" reads, any other is refused (401). Without one, public repositories can be read.
Both belong to the user "user", who may also create repositories under "org" (elsewhere: 403).

The two kinds of `uploads` make huggingface_hub go different ways:
    lfs      Xet is off. Binary files, by their ending or a NUL in the first 512 bytes, go by git-lfs, the others in
             the commit.
    regular  Xet is on, as users have it, and finds nothing to do: all files go in the commit.

huggingface_hub 2.4 repeats "preupload", "batch", "put", "verify" and "tree" 5 times, for up to 23 seconds, after 408,
429, 500, 502, 503, 504, or no answer; another status, such as 507, fails at once. `in_process` does not wait between.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import diffusers.loaders.lora_base
import diffusers.utils.hub_utils
import huggingface_hub.utils._detect_agent
import huggingface_hub.utils._http
import pytest
import transformers.utils.hub
import yaml
from huggingface_hub import constants, hf_api


REPO = "user/run"  # what tests push to


BINARY = (".safetensors", ".bin", ".pt", ".pth", ".png", ".jpg")

# Paths end at "?"; a revision or branch is one percent-encoded part.
API = r"/api/models/(?P<repo>[^/]+/[^/]+)"
PLAIN = r"/(?P<repo>[^/]+/[^/]+)"
ROUTES = {
    "whoami": ("GET", r"/api/whoami-v2"),
    "create": ("POST", r"/api/repos/create"),
    "delete": ("DELETE", r"/api/repos/delete"),
    "validate": ("POST", r"/api/validate-yaml"),
    "preupload": ("POST", API + r"/preupload/(?P<rev>[^/]+)"),
    "batch": ("POST", PLAIN + r"\.git/info/lfs/objects/batch"),
    "put": ("PUT", r"/_lfs/(?P<repo>[^/]+/[^/]+)/(?P<oid>\w+)"),
    "verify": ("POST", r"/_lfs/(?P<repo>[^/]+/[^/]+)/(?P<oid>\w+)/verify"),
    "commit": ("POST", API + r"/commit/(?P<rev>[^/]+)"),
    "branch": ("POST", API + r"/branch/(?P<rev>[^/]+)"),
    "commits": ("GET", API + r"/commits/(?P<rev>[^/]+)"),
    "tree": ("GET", API + r"/tree/(?P<rev>[^/]+)"),
    "info": ("GET", API + r"(?:/revision/(?P<rev>[^/]+))?"),
    "resolve": ("GET|HEAD", PLAIN + r"/resolve/(?P<rev>[^/]+)/(?P<path>.+)"),
}
WRITES = {"create", "delete", "preupload", "batch", "commit", "branch"}


class Refusal(Exception):
    """An answer that is an error: status, message, and the code by which huggingface_hub tells errors apart."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        self.status, self.message = status, message
        plain = message.encode("ascii", "replace").decode()
        self.headers = {"X-Error-Message": plain, **({"X-Error-Code": code} if code else {}), **headers}


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def front_matter(card: str) -> Any:
    """What stands between the two "---" of a model card, None without them. Raises ValueError if it is no YAML."""
    found = re.match(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*$", card, re.DOTALL | re.MULTILINE)
    try:
        return yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError as error:
        raise ValueError(f"the metadata is no YAML: {error}") from error


class Store:
    """Repositories with their commits, and the contents of files by their sha256."""

    def __init__(self):
        self.lock = threading.RLock()
        self.repos: dict[str, dict] = {}
        self.blobs: dict[str, bytes] = {}

    def put(self, content: bytes) -> str:
        sha = hashlib.sha256(content).hexdigest()
        self.blobs[sha] = content
        return sha

    def entry(self, sha: str, lfs: bool) -> dict:
        """A file in a commit: `oid` is that of git, for git-lfs that of the pointer."""
        content = self.blobs[sha]
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {len(content)}\n".encode()
        return {"sha256": sha, "size": len(content), "lfs": lfs, "oid": git_oid(pointer if lfs else content)}

    def create(self, name: str, private: bool) -> None:
        if name in self.repos:
            raise Refusal(409, "You already created this repo")
        self.repos[name] = {"private": private, "objects": [], "branches": {}, "commits": {}}
        attributes = "".join(f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in BINARY)
        files = {".gitattributes": self.entry(self.put(attributes.encode()), lfs=False)}
        self.commit(name, "main", "initial commit", "", files)

    def commit(self, name: str, branch: str, title: str, message: str, files: dict) -> str:
        repo = self.repos[name]
        parent = repo["branches"].get(branch)
        made = {"title": title, "message": message, "parent": parent, "files": files}
        oid = hashlib.sha1(f"{len(repo['commits'])} {json.dumps(made)}".encode()).hexdigest()
        repo["commits"][oid], repo["branches"][branch] = made, oid
        return oid

    def revision(self, name: str, rev: str) -> tuple[str, dict]:
        repo = self.repos[name]
        oid = repo["branches"].get(rev, rev)
        if oid not in repo["commits"]:
            raise Refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return oid, repo["commits"][oid]

    def commits(self, name: str, rev: str) -> list[dict]:
        """The newest first."""
        found, oid = [], self.revision(name, rev)[0]
        while oid:
            commit = self.repos[name]["commits"][oid]
            found.append({"oid": oid, **commit})
            oid = commit["parent"]
        return found


class Handler(BaseHTTPRequestHandler):
    """One request: its route's method `on_...` returns what is sent as JSON, or None where it has answered."""

    server: "HubServer"

    def log_message(self, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        """Every method: finds the route, meets its fault, checks the token, and answers."""
        path = urlsplit(self.path).path
        route, parts = "", {}
        for name, (methods, pattern) in ROUTES.items():
            found = re.fullmatch(pattern, path)
            if found and self.command in methods.split("|"):
                route, parts = name, {key: unquote(value) for key, value in found.groupdict().items() if value}
                break
        try:
            fault = self.server.meet(route)
            if fault.get("kind") == "drop":
                self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
                return
            self.content = self.body()
            if fault.get("kind") == "status":
                raise Refusal(fault["status"], "This server was told to fail")
            if not route:
                raise Refusal(404, f"Sorry, we can't find {path}")
            with self.server.store.lock:
                self.authorize(route, parts.get("repo"))
                result = getattr(self, f"on_{route}")(**parts)
            if result is not None:
                self.answer(200, result)
        except Refusal as refusal:
            self.answer(refusal.status, {"error": refusal.message}, **refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, status: int, content: Any, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def authorize(self, route: str, repo: str | None) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if route in ("put", "verify", "validate"):  # of addresses that only a writer is told, and of no repository
            return
        if token not in ("", "hf_good", "hf_read"):
            raise Refusal(401, "Invalid credentials in Authorization header")
        if not token and (route in WRITES or route == "whoami"):
            raise Refusal(401, "Invalid username or password.")
        known = self.server.store.repos.get(repo or "")
        if repo and (known is None or (known["private"] and not token)):
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if token == "hf_read" and route in WRITES:
            raise Refusal(403, "Forbidden: you must use a write token to upload to a repository")

    # The user, and repositories as a whole.

    def on_whoami(self) -> dict:
        role = "read" if "hf_read" in self.headers["Authorization"] else "write"
        auth = {"accessToken": {"displayName": "test", "role": role}}
        orgs = [{"type": "org", "name": "org", "fullname": "Org", "roleInOrg": "admin"}]
        return {"type": "user", "name": "user", "fullname": "User", "email": "u@x", "orgs": orgs, "auth": auth}

    def named(self) -> tuple[str, dict]:
        given = json.loads(self.content)
        return f"{given.get('organization') or 'user'}/{given['name']}", given

    def on_create(self) -> dict | None:
        name, given = self.named()
        owner, url = name.split("/")[0], f"{self.server.url}/{name}"
        if owner not in ("user", "org"):
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        try:
            self.server.store.create(name, given.get("visibility") == "private" or given.get("private", False))
        except Refusal as refusal:
            return self.answer(refusal.status, {"error": refusal.message, "url": url}, **refusal.headers)
        return {"url": url, "name": name, "id": hashlib.sha1(name.encode()).hexdigest()[:24]}

    def on_delete(self) -> dict:
        if self.server.store.repos.pop(self.named()[0], None) is None:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return {}

    def on_validate(self) -> dict | None:
        try:
            metadata = front_matter(json.loads(self.content)["content"])
            if metadata is not None and not isinstance(metadata, dict):
                raise ValueError("the metadata must be a mapping")
        except ValueError as error:
            return self.answer(400, {"errors": [{"message": str(error)}], "warnings": []})
        empty = [{"message": "empty or missing yaml metadata in repo card"}]
        return {"errors": [], "warnings": [] if metadata else empty}

    # Uploads, in the order in which they are asked for.

    def branch(self, repo: str, rev: str) -> dict:
        _, commit = self.server.store.revision(repo, rev)
        if rev not in self.server.store.repos[repo]["branches"]:
            raise Refusal(400, f"{rev} is no branch")
        return commit

    def on_preupload(self, repo: str, rev: str) -> dict:
        present, answers = self.branch(repo, rev)["files"], []
        for file in json.loads(self.content)["files"]:
            binary = file["path"].endswith(BINARY) or b"\0" in base64.b64decode(file["sample"])
            mode = "lfs" if binary and self.server.uploads == "lfs" else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            if entry := present.get(file["path"]):
                answers[-1]["oid"] = entry["sha256"] if entry["lfs"] else entry["oid"]
        return {"files": answers}

    def on_batch(self, repo: str) -> dict:
        objects, known = json.loads(self.content)["objects"], self.server.store.repos[repo]["objects"]
        for asked in objects:
            if asked["oid"] not in known:
                href = f"{self.server.url}/_lfs/{repo}/{asked['oid']}"
                asked["actions"] = {"upload": {"href": href, "header": {}}, "verify": {"href": href + "/verify"}}
        return {"transfer": "basic", "objects": objects}

    def on_put(self, repo: str, oid: str) -> bytes:
        if hashlib.sha256(self.content).hexdigest() != oid:
            raise Refusal(400, "The content does not have the announced sha256")
        self.server.store.repos[repo]["objects"].append(self.server.store.put(self.content))
        return b""

    def on_verify(self, repo: str, oid: str) -> dict:
        if oid not in self.server.store.repos[repo]["objects"]:
            raise Refusal(404, f"Object {oid} was not uploaded")
        return {}

    def on_commit(self, repo: str, rev: str) -> dict:
        store = self.server.store
        files, header = dict(self.branch(repo, rev)["files"]), {}
        for line in self.content.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            path = value.get("path", "").rstrip("/")
            if key == "header":
                header = value
            elif key == "file":
                files[path] = store.entry(store.put(base64.b64decode(value["content"])), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in store.repos[repo]["objects"]:
                    raise Refusal(400, f"Object {value['oid']} of {path} was not uploaded")
                files[path] = store.entry(value["oid"], lfs=True)
            elif key == "deletedFile":
                if files.pop(path, None) is None:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                raise Refusal(400, f"This server does not know {key}")
        oid = store.commit(repo, rev, header["summary"], header.get("description", ""), files)
        return {
            "success": True,
            "commitOid": oid,
            "commitUrl": f"{self.server.url}/{repo}/commit/{oid}",
            "hookOutput": "",
        }

    def on_branch(self, repo: str, rev: str) -> dict:
        branches = self.server.store.repos[repo]["branches"]
        if rev in branches:
            raise Refusal(409, f"Reference already exists: {rev}")
        branches[rev] = branches["main"]
        return {}

    # Reading.

    def on_info(self, repo: str, rev: str = "main") -> dict:
        store = self.server.store
        oid, commit = store.revision(repo, rev)
        files = commit["files"]
        try:
            card = front_matter(store.blobs[files["README.md"]["sha256"]].decode()) if "README.md" in files else None
        except ValueError:
            card = None
        card = card or {}
        info = {"id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": oid, "cardData": card}
        info |= {"private": store.repos[repo]["private"], "gated": False, "disabled": False}
        info |= {"tags": card.get("tags") or [], "siblings": [{"rfilename": path} for path in sorted(files)]}
        return info | {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}

    def on_tree(self, repo: str, rev: str) -> list:
        """All files; nobody here asks for the folders."""
        found = []
        for path, entry in sorted(self.server.store.revision(repo, rev)[1]["files"].items()):
            found.append({"type": "file", "path": path, "oid": entry["oid"], "size": entry["size"]})
            if entry["lfs"]:
                found[-1]["lfs"] = {"oid": entry["sha256"], "size": entry["size"], "pointerSize": 130}
        return found

    def on_commits(self, repo: str, rev: str) -> list:
        told = {"message": "", "authors": [{"user": "user"}], "date": "2026-01-01T00:00:00.000Z"}
        commits = self.server.store.commits(repo, rev)
        return [{"id": commit["oid"], "title": commit["title"], **told} for commit in commits]

    def on_resolve(self, repo: str, rev: str, path: str) -> None:
        oid, commit = self.server.store.revision(repo, rev)
        told = {"X-Repo-Commit": oid}
        if path not in commit["files"]:
            raise Refusal(404, "Entry not found", "EntryNotFound", **told)
        entry = commit["files"][path]
        told |= {"ETag": f'"{entry["sha256"] if entry["lfs"] else entry["oid"]}"'}
        if entry["lfs"]:
            told |= {"X-Linked-Size": str(entry["size"]), "X-Linked-ETag": told["ETag"]}
        self.answer(200, self.server.store.blobs[entry["sha256"]], **told)


class HubServer(ThreadingHTTPServer):
    """The server, for the length of a `with`.

    Args:
        folder (`Path`): where clients have their home.
        uploads (`str`, *optional*, defaults to `"lfs"`): `"lfs"` or `"regular"`, as told above.
    """

    daemon_threads = True
    request_queue_size = 32

    def __init__(self, folder: Path, uploads: str = "lfs"):
        super().__init__(("127.0.0.1", 0), Handler, bind_and_activate=False)
        self.folder, self.uploads, self.store = folder, uploads, Store()
        self.faults: dict[str, dict] = {}
        self.held: set[str] = set()
        self.changed = threading.Condition()

    def __enter__(self) -> "HubServer":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts, or starts again: at the same address, with the same repositories."""
        if self.socket.fileno() < 0:
            self.socket = socket.socket(self.address_family, self.socket_type)
        self.server_bind()
        self.server_activate()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that went away
            super().handle_error(request, client_address)

    # What the server was given.

    def commits(self, repo: str, revision: str = "main") -> list[dict[str, Any]]:
        """The commits of a branch, the newest first, each with `oid` and `title`. The last is "initial commit"."""
        return self.store.commits(repo, revision)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The contents of all files by their paths, without the `.gitattributes` that every repository has."""
        files = self.store.revision(repo, revision)[1]["files"]
        return {path: self.store.blobs[files[path]["sha256"]] for path in sorted(files) if path != ".gitattributes"}

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

    def fault(self, route: str, **fault: object) -> None:
        assert route in ROUTES, f"{route} is none of {', '.join(ROUTES)}"
        self.faults[route] = fault

    def heal(self) -> None:
        """Ends all faults. What was held goes on."""
        with self.changed:
            self.faults.clear()
            self.changed.notify_all()

    def wait_for_held(self, route: str, timeout: float = 60) -> None:
        """Until a request of a route is being held."""
        with self.changed:
            assert self.changed.wait_for(lambda: route in self.held, timeout), f"no {route} came"

    def meet(self, route: str) -> dict:
        """The fault that a request meets: {} for none."""
        with self.changed:
            if self.faults.get(route, {}).get("kind") != "hold":
                return self.faults.get(route, {})
            self.held.add(route)
            self.changed.notify_all()
            self.changed.wait_for(lambda: route not in self.faults)
            self.held.discard(route)
            return {}

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
