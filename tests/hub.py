"""The Hugging Face Hub without the network: a cache that is written by hand, and a server that stands in for it."""

import base64
import hashlib
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


def cached(cache: Path, model: str, revisions: Mapping[str, Path]) -> dict[str, str]:
    """Put checkpoints into `cache` as revisions of a hub id. revisions: branch or tag -> checkpoint; the commits."""
    store = cache / f"models--{model.replace('/', '--')}"
    commits = {}
    for number, (name, checkpoint) in enumerate(revisions.items(), start=1):
        commits[name] = f"{number:040x}"
        shutil.copytree(checkpoint, store / "snapshots" / commits[name])
        (store / "refs").mkdir(exist_ok=True)
        (store / "refs" / name).write_text(commits[name])
    return commits


def offline(cache: Path) -> dict[str, str]:
    """The environment of a process that knows the Hub by this cache only."""
    return {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


class Hub:
    """A stand-in for the Hugging Face Hub: repositories of models, made, committed to and read as huggingface_hub does.

    repositories: name -> commits, the newest last, each a commit id with its files by path; token: that writes, and
    reads what is private; asked: method, path and Range of every request.
    """

    def __init__(self, token: str = "hf_of_the_test") -> None:
        self.token = token
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: set[str] = set()
        self.asked: list[tuple[str, str, str | None]] = []
        self._large: dict[str, bytes] = {}  # by SHA-256: uploaded, not yet committed
        hub = self

        class Handler(_Handler):
            def answer(self, body: bytes) -> Response:
                return hub._answer(self, body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def put(self, name: str, files: Mapping[str, bytes]) -> str:
        """Commit these files and no others; the commit."""
        commits = self.repositories.setdefault(name, [])
        commit = hashlib.sha256(repr((name, len(commits), sorted(files.items()))).encode()).hexdigest()[:40]
        commits.append((commit, dict(files)))
        return commit

    def files(self, name: str) -> dict[str, bytes]:
        """Of the newest commit."""
        return self.repositories[name][-1][1]

    def whole(self) -> list[str]:
        """The files that were fetched as a whole."""
        return [path.rpartition("/")[2] for method, path, part in self.asked
                if method == "GET" and "/resolve/" in path and part is None]  # fmt: skip

    def environment(self, cache: Path) -> dict[str, str]:
        """Of a process for which this is the Hub."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0", "HF_TOKEN": self.token,
                "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}  # fmt: skip

    def use_here(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Make this the Hub of this process, as `environment` does for others."""
        from huggingface_hub import constants

        for name, value in self.environment(cache).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = f"{self.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)

    def _answer(self, request: "_Handler", body: bytes) -> "Response":
        path = unquote(urlsplit(request.path).path)
        self.asked.append((request.command, path, request.headers.get("Range")))
        may = request.headers.get("Authorization") == f"Bearer {self.token}"
        if request.command == "PUT":
            self._large[path.rpartition("/")[2]] = body
            return Response()
        if path == "/api/validate-yaml":
            return Response.json({"errors": [], "warnings": []})
        if request.command == "POST" and not may:
            return Response(401, b"", {"X-Error-Message": "Invalid username or password."})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        match = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+?)(?:\.git)?(?:/([a-z-]+)(?:/([^/]+)(?:/(.*))?)?)?", path)
        assert match is not None, path
        name, what, revision, rest = match.groups()
        if name not in self.repositories or (name in self.private and not may):
            return Response(401 if not may else 404, b"", {"X-Error-Code": "RepoNotFound"})
        if what == "info":
            return self._batch(json.loads(body))
        if what == "preupload":
            modes = [self._mode(file["path"]) for file in json.loads(body)["files"]]
            return Response.json({"files": modes})
        commits = self.repositories[name]
        known = {"main": commits[-1], **{commit: (commit, files) for commit, files in commits}}
        if (revision or "main") not in known:
            return Response(404, b"", {"X-Error-Code": "RevisionNotFound"})
        commit, files = known[revision or "main"]
        if what == "commit":
            return self._commit(name, commit, body)
        if what == "resolve":
            return self._file(request, commit, files.get(rest or ""))
        if what == "tree":
            listed = [{"type": "file", "path": file, "size": len(content),
                       "oid": hashlib.sha256(content).hexdigest()[:40]}
                      for file, content in files.items()]  # fmt: skip
            return Response.json(listed)
        return Response.json({"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]})

    def _create(self, wanted: dict[str, Any]) -> "Response":
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.repositories:
            return Response(409, b"", {"X-Error-Message": "You already created this model repo"})
        self.put(name, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        if wanted.get("visibility") == "private" or wanted.get("private"):
            self.private.add(name)
        return Response.json({"url": f"{self.url}/{name}"})

    @staticmethod
    def _mode(path: str) -> dict[str, Any]:
        return {
            "path": path,
            "uploadMode": "lfs" if path.endswith(".safetensors") else "regular",
            "shouldIgnore": False,
        }

    def _batch(self, wanted: dict[str, Any]) -> "Response":
        objects = [{**each, "actions": {"upload": {"href": f"{self.url}/upload/{each['oid']}"}}}
                   for each in wanted["objects"]]  # fmt: skip
        return Response.json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, parent: str, body: bytes) -> "Response":
        files = dict(self.files(name))
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit", parent) != parent:
                return Response(412, b"", {"X-Error-Message": "A commit has happened since"})
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                files[value["path"]] = self._large[value["oid"]]
        commit = self.put(name, files)
        return Response.json({"commitUrl": f"{self.url}/{name}/commit/{commit}", "commitOid": commit})

    @staticmethod
    def _file(request: "_Handler", commit: str, content: bytes | None) -> "Response":
        headers = {"X-Repo-Commit": commit}
        if content is None:
            return Response(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
        headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if part is None:
            return Response(200, content, headers)
        return Response(206, content[int(part[1]) : int(part[2]) + 1], headers)


@dataclass(frozen=True)
class Response:
    """What the stand-in answers."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, content: Any) -> "Response":
        return cls(200, json.dumps(content).encode(), {"Content-Type": "application/json"})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, body: bytes) -> Response:
        raise NotImplementedError

    def _respond(self) -> None:
        response = self.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    do_GET = do_HEAD = do_POST = do_PUT = _respond

    def log_message(self, *_: object) -> None:
        pass
