"""The part of the Hugging Face Hub's HTTP API that a push and a download speak, on localhost.

It takes one token, keeps repositories in memory, and writes down what it is asked.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_right"


class FakeHub(ThreadingHTTPServer):
    """A server whose repositories are dicts from file name to content.

    Attributes:
        url: its address, for HF_ENDPOINT.
        repositories: name -> {"files": {name: bytes}, "commits": [...], "private": bool}.
        requests: (method, path) of all there were.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories, self.objects, self.requests = {}, {}, []

    def create(self, name, private=False, files=()):
        """A repository as the Hub makes it: its first commit holds .gitattributes."""
        content = {".gitattributes": b"*.safetensors filter=lfs\n", **dict(files)}
        first = {"title": "initial commit", "oid": _sha("first")}
        self.repositories[name] = {"files": content, "commits": [first], "private": private}
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


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):  # noqa: N802
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._route("POST", body)

    def do_PUT(self):  # noqa: N802
        self._route("PUT", self.rfile.read(int(self.headers["Content-Length"])))

    def do_GET(self):  # noqa: N802
        self._route("GET", b"")

    def do_HEAD(self):  # noqa: N802
        self._route("HEAD", b"")

    def _route(self, method, body):
        hub, path = self.server, self.path.split("?")[0]
        hub.requests.append((method, path))
        if method == "PUT":
            hub.objects[path.split("/")[-1]] = body
            return self._answer({})
        if self.headers.get("Authorization") not in (f"Bearer {TOKEN}", None):
            return self._answer({"error": "Invalid username or password."}, 401)
        for pattern, answer in _ROUTES:
            if match := re.fullmatch(pattern, f"{method} {path}"):
                return answer(self, *match.groups(), body)
        return self._answer({"error": f"no {path}"}, 404)

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

    def _info(self, name, _revision=None, _body=b""):
        if name not in self.server.repositories:
            return self._answer({"error": "Repository not found"}, 404)
        found = self.server.repositories[name]
        siblings = [{"rfilename": file} for file in sorted(found["files"])]
        sha = found["commits"][-1]["oid"]
        answer = {"id": name, "private": found["private"], "siblings": siblings, "sha": sha}
        return self._answer(answer)

    def _preupload(self, name, body):
        files = self.server.repositories[name]["files"]
        answer = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
            content = files.get(file["path"])
            blob = None if content is None or mode == "lfs" else b"blob %d\0" % len(content)
            oid = None if blob is None else hashlib.sha1(blob + content).hexdigest()
            answer.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
            )
        return self._answer({"files": answer})

    def _batch(self, _name, body):
        objects = json.loads(body)["objects"]
        for item in objects:
            item["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}
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
        oid = _sha((name, len(found["commits"])))
        found["commits"].append({"title": header["summary"], "oid": oid, "lines": lines[1:]})
        url = f"{self.server.url}/{name}/commit/{oid}"
        return self._answer({"commitOid": oid, "commitUrl": url})

    def _resolve(self, name, _revision, file, _body):
        found = self.server.repositories.get(name, {"files": {}})
        if file not in found["files"]:
            return self._answer(b"", 404, {"X-Error-Code": "EntryNotFound"})
        content = found["files"][file]
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": found["commits"][-1]["oid"],
            "Accept-Ranges": "bytes",
        }
        return self._answer(content, 200, headers)

    def _tree(self, name, _revision, _body):
        files = self.server.repositories[name]["files"].items()
        listed = [{"type": "file", "path": n, "size": len(c), "oid": _sha(c)} for n, c in files]
        return self._answer(listed)


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = (
    ("POST /api/repos/create", _Handler._create),
    ("POST /api/validate-yaml", lambda self, body: self._answer({"errors": [], "warnings": []})),
    (f"GET /api/models/{_NAME}", lambda self, name, body: self._info(name)),
    (f"GET /api/models/{_NAME}/revision/([^/]+)", _Handler._info),
    (f"GET /api/models/{_NAME}/tree/([^/]+)", _Handler._tree),
    (f"POST /api/models/{_NAME}/preupload/main", _Handler._preupload),
    (f"POST /{_NAME}.git/info/lfs/objects/batch", _Handler._batch),
    (f"POST /api/models/{_NAME}/commit/main", _Handler._commit),
    (f"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)", _Handler._resolve),
)
