"""A server on this machine that speaks the Hub's HTTP protocol, as far as huggingface_hub 2.4 asks for it.

`python -m tests.hub_server FOLDER [--port 0] [--uploads lfs|regular]` prints its address and serves what is in the
folder until it is killed: it may be started again with the same folder and port. Tests start it by `tests.local_hub`.

Tokens: "hf_good" writes, "hf_read" reads, any other is refused (401). Without one, public repositories can be read.
Both belong to the user "user", who may also create repositories under "org" (elsewhere: 403).

`--uploads lfs` lets binary files, by their ending or a NUL in the first 512 bytes, go by git-lfs and the others in the
commit; `--uploads regular` lets all go in the commit.

`/_control/faults` is told which routes go wrong from now on, `/_control/requests` tells what was asked.
"""

import argparse
import base64
import hashlib
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


BINARY = (".safetensors", ".bin", ".pt", ".pth", ".png", ".jpg")

# Paths end at "?"; a revision or branch is one percent-encoded part.
REPO = r"/api/models/(?P<repo>[^/]+/[^/]+)"
PLAIN = r"/(?P<repo>[^/]+/[^/]+)"
ROUTES = {
    "whoami": ("GET", r"/api/whoami-v2"),
    "create": ("POST", r"/api/repos/create"),
    "delete": ("DELETE", r"/api/repos/delete"),
    "validate": ("POST", r"/api/validate-yaml"),
    "preupload": ("POST", REPO + r"/preupload/(?P<rev>[^/]+)"),
    "batch": ("POST", PLAIN + r"\.git/info/lfs/objects/batch"),
    "put": ("PUT", r"/_lfs/(?P<repo>[^/]+/[^/]+)/(?P<oid>\w+)"),
    "verify": ("POST", r"/_lfs/(?P<repo>[^/]+/[^/]+)/(?P<oid>\w+)/verify"),
    "commit": ("POST", REPO + r"/commit/(?P<rev>[^/]+)"),
    "branch": ("POST", REPO + r"/branch/(?P<rev>[^/]+)"),
    "commits": ("GET", REPO + r"/commits/(?P<rev>[^/]+)"),
    "tree": ("GET", REPO + r"/tree/(?P<rev>[^/]+)"),
    "info": ("GET", REPO + r"(?:/revision/(?P<rev>[^/]+))?"),
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
    """Repositories and their commits in a folder: `state.json`, and the contents of files by their sha256."""

    def __init__(self, folder: Path):
        self.folder, self.lock = folder, threading.RLock()
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        self.state = folder / "state.json"
        self.repos: dict[str, dict] = json.loads(self.state.read_text()) if self.state.exists() else {}

    def save(self) -> None:
        self.state.with_suffix(".new").write_text(json.dumps(self.repos))
        self.state.with_suffix(".new").replace(self.state)

    def put(self, content: bytes) -> str:
        sha = hashlib.sha256(content).hexdigest()
        (self.folder / "blobs" / sha).write_bytes(content)
        return sha

    def content(self, entry: dict) -> bytes:
        return (self.folder / "blobs" / entry["sha256"]).read_bytes()

    def entry(self, sha: str, lfs: bool) -> dict:
        """A file in a commit: `oid` is that of git, for git-lfs that of the pointer."""
        content = (self.folder / "blobs" / sha).read_bytes()
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
        self.save()
        return oid

    def revision(self, name: str, rev: str) -> tuple[str, dict]:
        repo = self.repos[name]
        oid = repo["branches"].get(rev, rev)
        if oid not in repo["commits"]:
            raise Refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return oid, repo["commits"][oid]


class Handler(BaseHTTPRequestHandler):
    """One request: its route's method `on_...` returns what is sent as JSON, or None where it has answered."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in two packets waits 40 ms for the client's acknowledgement of the first
    server: "Server"

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
            if path.startswith("/_control/"):
                asked = path.removeprefix("/_control/")
                return self.answer(200, self.server.control(asked, json.loads(self.body() or b"{}")))
            fault = self.server.meet(route, {"method": self.command, "path": self.path, "route": route})
            self.close_connection = fault.get("kind") == "drop"
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
        self.server.store.save()
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
        self.server.store.save()
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
        self.server.store.save()
        return {}

    # Reading.

    def on_info(self, repo: str, rev: str = "main") -> dict:
        store = self.server.store
        oid, commit = store.revision(repo, rev)
        files = commit["files"]
        try:
            card = front_matter(store.content(files["README.md"]).decode()) if "README.md" in files else None
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
        told, oid = [], self.server.store.revision(repo, rev)[0]
        while oid:
            commit = self.server.store.repos[repo]["commits"][oid]
            told.append({"id": oid, "title": commit["title"], "message": commit["message"]})
            told[-1] |= {"authors": [{"user": "user"}], "date": "2026-01-01T00:00:00.000Z"}
            oid = commit["parent"]
        return told

    def on_resolve(self, repo: str, rev: str, path: str) -> None:
        oid, commit = self.server.store.revision(repo, rev)
        told = {"X-Repo-Commit": oid}
        if path not in commit["files"]:
            raise Refusal(404, "Entry not found", "EntryNotFound", **told)
        entry = commit["files"][path]
        told |= {"ETag": f'"{entry["sha256"] if entry["lfs"] else entry["oid"]}"'}
        if entry["lfs"]:
            told |= {"X-Linked-Size": str(entry["size"]), "X-Linked-ETag": told["ETag"]}
        self.answer(200, self.server.store.content(entry), **told)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 32

    def __init__(self, folder: Path, port: int, uploads: str):
        super().__init__(("127.0.0.1", port), Handler)
        self.store, self.uploads = Store(folder), uploads
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.faults: dict[str, dict | None] = {}
        self.log: list[dict] = []
        self.changed = threading.Condition()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that went away
            super().handle_error(request, client_address)

    def control(self, what: str, given: dict) -> Any:
        """`/_control/requests` tells the log; `/_control/faults` takes faults by route, null for none."""
        if what == "requests":
            return self.log
        with self.changed:
            self.faults |= given
            self.changed.notify_all()
        return {}

    def meet(self, route: str, request: dict) -> dict:
        """Logs a request, and returns the fault that it meets: {} for none."""
        with self.changed:
            self.log.append(request)
            fault = self.faults.get(route)
            if fault is None:
                return {}
            if fault["kind"] == "hold":
                request["held"] = True
                self.changed.wait_for(lambda: self.faults[route] is not fault)
                request["held"] = False
                return {}
            return fault


def main() -> None:
    parser = argparse.ArgumentParser(description="Serves the Hub's protocol on 127.0.0.1, out of a folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--uploads", choices=("lfs", "regular"), default="lfs")
    given = parser.parse_args()
    server = Server(given.folder, given.port, given.uploads)
    print(server.url, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
