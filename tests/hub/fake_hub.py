"""The part of the Hugging Face Hub's HTTP API that a push and a download speak, on localhost.

It takes one token, keeps repositories in memory, and writes down what it is asked. Large files are
taken as the Hub takes them: first their hashes, to which it says what it lacks; then the content of
that, in one request or in parts; a commit names them by hash.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_right"
LICENSES = ("apache-2.0", "mit", "other")
SIGNATURE = "s1gned"  # of the addresses to which large files go


class FakeHub(ThreadingHTTPServer):
    """A server whose repositories are dicts from file name to content.

    Attributes:
        url: its address, for HF_ENDPOINT.
        repositories: name -> {"files": {name: bytes}, "commits": [...], "private": bool}; of one
            to download, "gated" as well, and "revisions", name -> files, beside the main one.
        objects: hash -> content of the large files that went up, committed or not.
        requests: (method, path) of all there were.
        role: what the token may do, "write" or "read".
        part_size: bytes; larger files go up in parts. None: no file does.
        max_objects: so many large files are taken, and the connection is dropped in the middle of
            each other one. None: all are taken.
        trouble: (method, path) -> a status to answer with, or "drop" to hang up; None: as usual.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories, self.objects, self.requests = {}, {}, []
        self.role, self.part_size, self.max_objects = "write", None, None
        self.trouble = lambda method, path: None
        self.parts, self.taking = {}, threading.Lock()

    def handle_error(self, request, client_address):
        """A client that went away is nothing to tell of."""

    def create(self, name, private=False, files=(), gated=False, revisions=()):
        """A repository as the Hub makes it: its first commit holds .gitattributes."""
        content = {".gitattributes": b"*.safetensors filter=lfs\n", **dict(files)}
        first = {"title": "initial commit", "oid": _sha("first")}
        self.repositories[name] = {"files": content, "commits": [first], "private": private}
        self.repositories[name] |= {"gated": gated, "revisions": dict(revisions)}
        return self.repositories[name]


@contextmanager
def running_hub():
    """A hub that answers until the block ends."""
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


def _sha(text):
    return hashlib.sha1(str(text).encode()).hexdigest()


def _blob(content):
    """git's name for a small file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_large(name):
    return name.endswith(".safetensors")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):  # noqa: N802
        self._route("POST")

    def do_PUT(self):  # noqa: N802
        self._route("PUT")

    def do_GET(self):  # noqa: N802
        self._route("GET")

    def do_HEAD(self):  # noqa: N802
        self._route("HEAD")

    def _route(self, method):
        hub, path = self.server, self.path.split("?")[0]
        hub.requests.append((method, path))
        trouble = hub.trouble(method, path)
        if trouble == "drop" or (method == "PUT" and not self._may_come(path)):
            return self._hang_up()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if trouble is not None:
            return self._answer({"error": "trouble"}, trouble)
        if method == "PUT":
            return self._take(path, body)
        if path.startswith("/lfs/"):  # all of a file's parts are there
            oid = path.split("/")[-1]
            parts = [hub.parts[oid, n["partNumber"]] for n in json.loads(body)["parts"]]
            return self._keep(oid, b"".join(parts))
        if self.headers.get("Authorization") not in (f"Bearer {TOKEN}", None):
            return self._answer({"error": "Invalid username or password."}, 401)
        for pattern, answer in _ROUTES:
            if match := re.fullmatch(pattern, f"{method} {path}"):
                return answer(self, *match.groups(), body)
        return self._answer({"error": f"no {path}"}, 404)

    def _may_come(self, path):
        """Whether a large file is taken. Its place is kept, as many come at once."""
        hub, oid = self.server, path.split("/")[2]
        with hub.taking:
            if hub.max_objects is None or oid in hub.objects:
                return True
            may_come = len(hub.objects) < hub.max_objects
            if may_come:
                hub.objects[oid] = None
            return may_come

    def _hang_up(self):
        """Goes away in the middle of what the client says."""
        self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _take(self, path, body):
        oid, _, part = path.removeprefix("/lfs/").partition("/")
        if not part:
            return self._keep(oid, body)
        self.server.parts[oid, int(part)] = body
        return self._answer({}, headers={"ETag": f'"{part}"'})

    def _keep(self, oid, content):
        if hashlib.sha256(content).hexdigest() != oid:
            return self._answer({"error": "another hash"}, 400)
        self.server.objects[oid] = content
        return self._answer({})

    def _answer(self, value, status=200, headers=()):
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": len(content), **dict(headers)}.items():
            self.send_header(name, str(text))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _create(self, body):
        fields = json.loads(body)
        name = "/".join(x for x in (fields.get("organization"), fields["name"]) if x)
        if fields.get("organization") == "them":
            # As careless as a proxy can be.
            error = f"{self.headers['Authorization']} may not create under them"
            return self._answer({"error": error}, 403)
        answer = {"url": f"{self.server.url}/{name}", "name": name}
        if name in self.server.repositories:
            return self._answer({**answer, "error": "You already created this model repo"}, 409)
        is_private = fields.get("private") or fields.get("visibility") == "private"
        self.server.create(name, bool(is_private))
        return self._answer(answer)

    def _who(self, _body):
        token = {"displayName": "test", "role": self.server.role}
        auth = {"type": "access_token", "accessToken": token}
        return self._answer({"type": "user", "name": "me", "orgs": [], "auth": auth})

    def _at(self, name, revision):
        """The files and the commit of a revision; None, and an answer is given, if it is hidden."""
        found = self.server.repositories.get(name)
        if found is None:
            headers = {"X-Error-Code": "RepoNotFound"}
            return self._answer({"error": "Repository not found"}, 404, headers)
        if found["private"] and self.headers.get("Authorization") is None:
            # As the Hub says it: whether there is such a repository is no stranger's business.
            return self._answer({"error": "Invalid username or password."}, 401)
        head = found["commits"][-1]["oid"]
        commits = {_sha((name, n)): files for n, files in found["revisions"].items()}
        if revision in found["revisions"]:
            revision = _sha((name, revision))
        if revision in commits:
            return commits[revision], revision
        if revision not in (None, "main", head):
            headers = {"X-Error-Code": "RevisionNotFound"}
            return self._answer({"error": f"Invalid rev id: {revision}"}, 404, headers)
        return found["files"], head

    def _info(self, name, revision=None, _body=b""):
        if (at := self._at(name, revision)) is None:
            return
        (files, sha), found = at, self.server.repositories[name]
        siblings = []
        for file, content in sorted(files.items()):
            siblings.append({"rfilename": file})
            if "blobs=" in self.path:
                siblings[-1] |= {"blobId": _blob(content), "size": len(content)}
            if "blobs=" in self.path and _is_large(file):
                digest = hashlib.sha256(content).hexdigest()
                lfs = {"sha256": digest, "size": len(content), "pointerSize": 130}
                siblings[-1] |= {"blobId": _sha(digest), "lfs": lfs}
        answer = {"id": name, "private": found["private"], "siblings": siblings, "sha": sha}
        return self._answer(answer)

    def _validate(self, body):
        license = re.search(r"(?m)^license: (.+)$", json.loads(body)["content"])
        errors = []
        if license and license[1] not in LICENSES:
            errors = [{"message": f'"license" must be one of [{", ".join(LICENSES)}]'}]
        return self._answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _preupload(self, name, body):
        files = self.server.repositories[name]["files"]
        answer = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if _is_large(file["path"]) else "regular"
            content, oid = files.get(file["path"]), None
            if content is not None:
                is_large = mode == "lfs"
                oid = hashlib.sha256(content).hexdigest() if is_large else _blob(content)
            answer.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
            )
        return self._answer({"files": answer})

    def _batch(self, _name, body):
        objects = json.loads(body)["objects"]
        for item in objects:
            if self.server.objects.get(item["oid"]) is not None:
                continue  # it is here: nothing to do
            address, size = f"{self.server.url}/lfs/{item['oid']}", self.server.part_size
            # As the storage behind the Hub: who knows the address may write.
            item["actions"] = {"upload": {"href": f"{address}?X-Signature={SIGNATURE}"}}
            if size is not None and item["size"] > size:
                parts = {str(n + 1): f"{address}/{n + 1}" for n in range(-(-item["size"] // size))}
                header = {"chunk_size": str(size), **parts}
                item["actions"] = {"upload": {"href": address, "header": header}}
        return self._answer({"transfer": "basic", "objects": objects})

    def _commit(self, name, body):
        lines = [json.loads(line) for line in body.splitlines()]
        found = self.server.repositories[name]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, found["commits"][-1]["oid"]):
            return self._answer({"error": "A commit has happened since."}, 412)
        for line in lines[1:]:
            kind, value = line["key"], line["value"]
            if kind == "file":
                found["files"][value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                found["files"][value["path"]] = self.server.objects[value["oid"]]
            elif kind == "deletedFile":
                del found["files"][value["path"]]
        oid = _sha((self.server.url, name, len(found["commits"])))
        found["commits"].append({"title": header["summary"], "oid": oid, "lines": lines[1:]})
        url = f"{self.server.url}/{name}/commit/{oid}"
        return self._answer({"commitOid": oid, "commitUrl": url})

    def _resolve(self, name, revision, file, _body):
        if (at := self._at(name, revision)) is None:
            return
        files, sha = at
        if self.server.repositories[name]["gated"]:
            return self._answer({"error": "restricted"}, 403, {"X-Error-Code": "GatedRepo"})
        if file not in files:
            return self._answer(b"", 404, {"X-Error-Code": "EntryNotFound"})
        content = files[file]
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": sha,
            "Accept-Ranges": "bytes",
        }
        return self._answer(content, 200, headers)

    def _tree(self, name, revision, _body):
        if (at := self._at(name, revision)) is None:
            return
        files = at[0].items()
        listed = [{"type": "file", "path": n, "size": len(c), "oid": _sha(c)} for n, c in files]
        return self._answer(listed)


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = (
    ("GET /api/whoami-v2", _Handler._who),
    ("POST /api/repos/create", _Handler._create),
    ("POST /api/validate-yaml", _Handler._validate),
    (f"GET /api/models/{_NAME}", lambda self, name, body: self._info(name)),
    (f"GET /api/models/{_NAME}/revision/([^/]+)", _Handler._info),
    (f"GET /api/models/{_NAME}/tree/([^/]+)", _Handler._tree),
    (f"POST /api/models/{_NAME}/preupload/main", _Handler._preupload),
    (f"POST /{_NAME}.git/info/lfs/objects/batch", _Handler._batch),
    (f"POST /api/models/{_NAME}/commit/main", _Handler._commit),
    (f"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)", _Handler._resolve),
)
