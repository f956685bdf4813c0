"""A stand-in for the Hugging Face Hub: an HTTP server with the endpoints that huggingface_hub uses for models, on this machine.

Paths, headers and JSON are those that huggingface_hub 2.4 sends and expects. Files whose names end in .safetensors are uploaded as Git LFS
objects, as on the Hub, and all others with the commit.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_made_up"


class Hub(ThreadingHTTPServer):
    """Repositories as {name: {branch: commit}}, commits as {id: {file: content}}, and what was requested."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories, self.commits, self.objects = {}, {}, {}
        self.private, self.gated, self.messages, self.requests = set(), set(), [], []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def commit(self, repository, files, branch="main"):
        """Add files to a branch, which is created if it does not exist, and return the commit's id."""
        branches = self.repositories.setdefault(repository, {})
        files = self.commits.get(branches.get(branch), {}) | files
        parts = (part for name in sorted(files) for part in (name.encode(), files[name]))
        branches[branch] = sha = hashlib.sha1(b"\0".join([repository.encode(), *parts])).hexdigest()
        self.commits[sha] = files
        return sha

    def files(self, repository, branch="main"):
        return self.commits[self.repositories[repository][branch]]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self, value=None, status=200, **headers):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": len(body), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), str(text))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status, code, message):
        self._answer({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def _serve(self):
        path = urlsplit(self.path).path
        self.server.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        logged_in = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if self.command == "PUT":
            self.server.objects[path.removeprefix("/lfs/")] = body
            return self._answer({})
        if self.command == "POST" and not logged_in:
            return self._refuse(401, "", "Invalid username or password.")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        match = re.fullmatch(r"(?:/api/models)?/(?P<name>[^/]+/[^/]+?)(?:\.git/info)?/(?P<what>\w+)(?:/(?P<revision>[^/]+))?(?:/.*)?", path)
        name, what, revision = match["name"], match["what"], unquote(match["revision"] or "")
        if name not in self.server.repositories or (name in self.server.private and not logged_in):
            return self._refuse(404 if logged_in else 401, "RepoNotFound", "Repository not found")
        if name in self.server.gated:
            return self._refuse(403, "GatedRepo", "Access to the model is restricted")
        branches = self.server.repositories[name]
        if what == "branch":
            if revision in branches:
                return self._refuse(409, "", "Reference already exists")
            branches[revision] = branches["main"]
            return self._answer({})
        if what == "lfs":
            return self._batch(json.loads(body))
        sha = branches.get(revision, revision)
        if sha not in self.server.commits:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return {"preupload": self._preupload, "commit": self._commit, "revision": self._info, "tree": self._tree, "resolve": self._file}[
            what
        ](name, revision, sha, body)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _create(self, wanted):
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.server.repositories:
            return self._answer({"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}, 409)
        self.server.commit(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
        if wanted.get("visibility") == "private" or wanted.get("private"):
            self.server.private.add(name)
        self._answer({"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def _preupload(self, name, revision, sha, body):
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = ["lfs" if path.endswith(".safetensors") else "regular" for path in paths]
        self._answer({"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in zip(paths, modes)]})

    def _batch(self, wanted):
        found = [o | {"actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}}} for o in wanted["objects"]]
        self._answer({"transfer": "basic", "objects": found})

    def _commit(self, name, revision, sha, body):
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.server.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.server.objects[value["oid"]]
                assert hashlib.sha256(files[value["path"]]).hexdigest() == value["oid"]
        sha = self.server.commit(name, files, revision)
        self._answer({"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    def _info(self, name, revision, sha, body):
        self._answer({"id": name, "sha": sha, "siblings": [{"rfilename": path} for path in self.server.commits[sha]]})

    def _tree(self, name, revision, sha, body):
        files = self.server.commits[sha].items()
        self._answer([{"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for p, c in files])

    def _file(self, name, revision, sha, body):
        content = self.server.commits[sha].get(unquote(urlsplit(self.path).path.partition(f"/{revision}/")[2]))
        if content is None:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        self._answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=sha)
