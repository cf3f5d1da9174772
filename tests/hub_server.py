"""A small server that speaks the Hub's HTTP interface, for uploads and downloads on loopback.

It knows what `huggingface_hub` asks for when a model is published and loaded: creating repositories
and branches, the preupload question, LFS batches (single and in parts), commits, listings, and
`resolve` with etags, commits, redirects and ranges. Private repositories are hidden from callers
without the token. Contents live in memory and in a folder; nothing is checked that no test needs.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".png")
LARGE_FILE = 10_000_000
PART_BYTES = 3_000_000  # small, so that ordinary files go up in parts
SIGNATURE = "secret-of-the-address"
MODEL = r"/api/models/(?P<id>[^/]+/[^/]+)"


@dataclass(frozen=True)
class StoredFile:
    """A file of a commit: small contents in `content`, large ones in the store, by `oid`."""

    oid: str
    size: int
    content: bytes | None = None


@dataclass
class Repository:
    """Commits are whole trees; branches name commits."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, StoredFile]] = field(default_factory=dict)

    def commit(self, branch: str, tree: dict[str, StoredFile]) -> str:
        listing = json.dumps([branch, len(self.commits), sorted(tree)])
        oid = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[oid] = tree
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        oid = self.branches.get(revision, revision)
        return oid if oid in self.commits else None


class HubServer(ThreadingHTTPServer):
    """The server and all it holds.

    Attributes:
        store: folder of large contents.
        token: of the one user.
        repositories: by Hub id.
        requests: method and path of every request.
        failing: paths that match get an error that repeats the caller's authorization.
        on_request: called with method and path before each answer.
    """

    daemon_threads = True

    def __init__(self, store: Path, token: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.store = store
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.failing: re.Pattern | None = None
        self.on_request = lambda request: None
        self.lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repository: str, revision: str = "main") -> dict[str, StoredFile]:
        held = self.repositories[repository]
        return held.commits[held.resolve(revision)]

    def content(self, file: StoredFile, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes `start` to `stop` (excluded) of a file, by default all."""
        if file.content is not None:
            return file.content[start:stop]
        with (self.store / file.oid).open("rb") as stored:
            stored.seek(start)
            return stored.read() if stop is None else stored.read(stop - start)

    def handle_error(self, request, client_address):
        """Clients that are killed in the middle are expected."""


@contextmanager
def running(store: Path, token: str):
    """A server that answers while the block runs."""
    server = HubServer(store, token)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request: the first route that matches answers it."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create_repository"),
        ("POST", r"/api/validate-yaml", "validate_card"),
        ("POST", rf"{MODEL}/branch/(?P<revision>.+)", "create_branch"),
        ("POST", rf"{MODEL}/preupload/(?P<revision>.+)", "preupload"),
        ("POST", rf"{MODEL}/commit/(?P<revision>.+)", "commit"),
        ("POST", rf"{MODEL}/paths-info/(?P<revision>.+)", "paths_info"),
        ("GET", rf"{MODEL}/refs", "refs"),
        ("GET", rf"{MODEL}/tree/(?P<revision>[^/]+)/?(?P<path>.*)", "tree"),
        ("GET", rf"{MODEL}/revision/(?P<revision>.+)", "info"),
        ("GET", rf"{MODEL}", "info"),
        ("POST", r"/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>\w+)(/(?P<part>\d+))?", "lfs_put"),
        ("POST", r"/lfs/(?P<oid>\w+)/complete", "lfs_complete"),
        ("POST", r"/lfs/verify", "lfs_verify"),
        ("GET", r"/cdn/(?P<oid>\w+)", "download_large"),
        ("GET", r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "download"),
    )

    def do_GET(self):
        self.answer("GET")

    def do_HEAD(self):
        self.answer("GET")

    def do_POST(self):
        self.answer("POST")

    def do_PUT(self):
        self.answer("PUT")

    def log_message(self, *arguments):
        pass

    def answer(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(f"{self.command} {path}")
        self.server.on_request(f"{self.command} {path}")
        if self.server.failing is not None and self.server.failing.search(path):
            leak = f"rejected {self.headers.get('Authorization')} at {self.path}?sig={SIGNATURE}"
            self.send(403, {"error": leak}, {"X-Error-Message": leak})
            return
        for verb, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if verb == method and match:
                groups = {key: value for key, value in match.groupdict().items() if value}
                if "id" in groups and not self.may_see(groups["id"], method):
                    self.refuse(401, "RepoNotFound")
                else:
                    getattr(self, name)(**groups)
                return
        self.send(404, {"error": f"no route for {method} {path}"})

    def may_see(self, repository: str, method: str) -> bool:
        held = self.server.repositories.get(repository)
        if held is None:
            return False
        return self.authorized or (not held.private and method == "GET")

    @property
    def authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.server.token}"

    def send(self, status: int, content: object = None, headers: dict | None = None) -> None:
        body = json.dumps({} if content is None else content).encode()
        self.send_bytes(status, body, {"Content-Type": "application/json"} | (headers or {}))

    def send_bytes(self, status: int, body: bytes, headers: dict) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.send(status, {"error": code}, {"X-Error-Code": code})

    def whoami(self) -> None:
        self.send(200, {"type": "user", "name": "org", "orgs": []})

    def create_repository(self) -> None:
        if not self.authorized:
            self.refuse(401, "Unauthorized")
            return
        given = json.loads(self.body)
        name = f"{given.get('organization') or 'org'}/{given['name']}"
        url = f"{self.server.endpoint}/{name}"
        with self.server.lock:
            if name in self.server.repositories:
                self.send(409, {"error": "exists", "url": url})
                return
            private = given.get("private", given.get("visibility") == "private")
            held = self.server.repositories[name] = Repository(bool(private))
            held.commit("main", {".gitattributes": _small(b"*.safetensors filter=lfs\n")})
        self.send(200, {"url": url, "name": name, "id": name})

    def validate_card(self) -> None:
        self.send(200, {"errors": [], "warnings": []})

    def create_branch(self, id: str, revision: str) -> None:
        held = self.server.repositories[id]
        if revision in held.branches:
            self.send(409, {"error": "exists"})
            return
        held.branches[revision] = held.branches["main"]
        self.send(201)

    def preupload(self, id: str, revision: str) -> None:
        tree = self.server.files(id, revision)
        files = []
        for given in json.loads(self.body)["files"]:
            large = given["path"].endswith(LFS_SUFFIXES) or given["size"] > LARGE_FILE
            stored = tree.get(given["path"])
            files.append(
                {
                    "path": given["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": stored.oid if stored else None,
                }
            )
        self.send(200, {"files": files})

    def lfs_batch(self, id: str) -> None:
        objects = []
        for given in json.loads(self.body)["objects"]:
            entry = {"oid": given["oid"], "size": given["size"]}
            if not (self.server.store / given["oid"]).exists():
                entry["actions"] = self.upload_actions(given["oid"], given["size"])
            objects.append(entry)
        self.send(200, {"transfer": "basic", "objects": objects})

    def upload_actions(self, oid: str, size: int) -> dict:
        address = f"{self.server.endpoint}/lfs/{oid}"
        verify = {"href": f"{self.server.endpoint}/lfs/verify"}
        if size <= PART_BYTES:
            return {"upload": {"href": f"{address}?sig={SIGNATURE}"}, "verify": verify}
        header = {"chunk_size": str(PART_BYTES)}
        for part in range(1, -(-size // PART_BYTES) + 1):
            header[str(part)] = f"{address}/{part}?sig={SIGNATURE}"
        return {"upload": {"href": f"{address}/complete", "header": header}, "verify": verify}

    def lfs_put(self, oid: str, part: str | None = None) -> None:
        name = oid if part is None else f"{oid}.{part}"
        if part is None and hashlib.sha256(self.body).hexdigest() != oid:
            self.send(400, {"error": "the content is not what was announced"})
            return
        unfinished = self.server.store / f"{name}.{threading.get_ident()}.unfinished"
        unfinished.write_bytes(self.body)
        unfinished.replace(self.server.store / name)
        self.send_bytes(200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def lfs_complete(self, oid: str) -> None:
        numbers = [entry["partNumber"] for entry in json.loads(self.body)["parts"]]
        digest, unfinished = hashlib.sha256(), self.server.store / f"{oid}.unfinished"
        with unfinished.open("wb") as whole:
            for part in (self.server.store / f"{oid}.{number}" for number in numbers):
                content = part.read_bytes()
                digest.update(content)
                whole.write(content)
                part.unlink()
        if digest.hexdigest() != oid:
            self.send(400, {"error": "the parts are not what was announced"})
            return
        unfinished.replace(self.server.store / oid)
        self.send(200)

    def lfs_verify(self) -> None:
        given = json.loads(self.body)
        stored = self.server.store / given["oid"]
        sound = stored.exists() and stored.stat().st_size == given["size"]
        self.send(200 if sound else 404)

    def commit(self, id: str, revision: str) -> None:
        held = self.server.repositories[id]
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        with self.server.lock:
            tree = dict(self.server.files(id, revision))
            for line in lines:
                value = line["value"]
                if line["key"] == "deletedFile":
                    tree.pop(value["path"], None)
                elif line["key"] == "file":
                    tree[value["path"]] = _small(base64.b64decode(value["content"]))
                elif line["key"] == "lfsFile":
                    if not (self.server.store / value["oid"]).exists():
                        self.send(400, {"error": f"{value['path']} was not uploaded"})
                        return
                    size = (self.server.store / value["oid"]).stat().st_size
                    tree[value["path"]] = StoredFile(value["oid"], size)
            oid = held.commit(revision, tree)
        url = f"{self.server.endpoint}/{id}/commit/{oid}"
        self.send(200, {"success": True, "commitOid": oid, "commitUrl": url})

    def info(self, id: str, revision: str = "main") -> None:
        held = self.server.repositories[id]
        commit = held.resolve(revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound")
            return
        siblings = [{"rfilename": path} for path in held.commits[commit]]
        content = {"id": id, "modelId": id, "sha": commit, "private": held.private}
        self.send(200, content | {"siblings": siblings, "tags": [], "downloads": 0})

    def refs(self, id: str) -> None:
        branches = self.server.repositories[id].branches.items()
        listed = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in branches
        ]
        self.send(200, {"branches": listed, "tags": [], "converts": []})

    def tree(self, id: str, revision: str, path: str = "") -> None:
        if self.server.repositories[id].resolve(revision) is None:
            self.refuse(404, "RevisionNotFound")
            return
        files = self.server.files(id, revision)
        listed = [name for name in files if not path or name.startswith(f"{path}/")]
        if listed:
            self.send(200, [_entry(name, files[name]) for name in listed])
        else:
            self.refuse(404, "EntryNotFound")

    def paths_info(self, id: str, revision: str) -> None:
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(self.body)["paths"]
        else:
            paths = parse_qs(self.body.decode())["paths"]
        files = self.server.files(id, revision)
        self.send(200, [_entry(path, files[path]) for path in paths if path in files])

    def download(self, id: str, revision: str, path: str) -> None:
        commit = self.server.repositories[id].resolve(revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound")
            return
        headers = {"X-Repo-Commit": commit}
        file = self.server.repositories[id].commits[commit].get(path)
        if file is None:
            self.send(404, {"error": path}, headers | {"X-Error-Code": "EntryNotFound"})
        elif file.content is not None:
            self.send_file(file, headers)
        else:
            place = f"http://localhost:{self.server.server_port}/cdn/{file.oid}?sig={SIGNATURE}"
            linked = {"X-Linked-Size": file.size, "X-Linked-Etag": f'"{file.oid}"'}
            self.send_bytes(302, b"", headers | linked | {"Location": place})

    def download_large(self, oid: str) -> None:
        self.send_file(StoredFile(oid, (self.server.store / oid).stat().st_size), {})

    def send_file(self, file: StoredFile, headers: dict) -> None:
        headers = headers | {"ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            self.send_bytes(200, self.server.content(file), headers)
            return
        start = int(wanted[1])
        stop = min(int(wanted[2] or file.size) + 1, file.size)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{file.size}"
        self.send_bytes(206, self.server.content(file, start, stop), headers)


def _small(content: bytes) -> StoredFile:
    blob = b"blob %d\0" % len(content) + content
    return StoredFile(hashlib.sha1(blob).hexdigest(), len(content), content)


def _entry(path: str, file: StoredFile) -> dict:
    entry = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
    if file.content is None:
        entry["lfs"] = {"oid": file.oid, "size": file.size, "pointerSize": 130}
    return entry
