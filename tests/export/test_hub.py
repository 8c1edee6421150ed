"""Checkpoints by hub id, against a small server on this machine that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.models import write_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
import sys
from export.checkpoint import open_checkpoint
from export.errors import UserError
try:
    checkpoint = open_checkpoint(sys.argv[1])
    print(checkpoint.name, checkpoint.tensor("vae", "decoder.conv_in.bias").shape[0], checkpoint.tokens)
except UserError as error:
    print("UserError:", error)
"""
LORA_SCRIPT = """
import sys
from export.errors import UserError
from export.lora import Lora, find_lora
try:
    found = find_lora(Lora(sys.argv[1], 0.5))
    print(found.name, found.path.name, found.path.read_text(), (found.path.parent / "README.md").is_file())
except UserError as error:
    print("UserError:", error)
"""


class Hub(ThreadingHTTPServer):
    """Serves one folder as the model `tests/tiny` and remembers which files were asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.given: set[str] = set()

    @property
    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith(f"/api/models/tests/tiny/tree/{COMMIT}"):
            content = [self.entry(name) for name in self.server.files]
            return self.send(json.dumps(content).encode(), "application/json", body)
        if path in (
            "/api/models/tests/tiny",
            "/api/models/tests/tiny/revision/main",
            f"/api/models/tests/tiny/revision/{COMMIT}",
        ):
            info = {"id": "tests/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.server.files]}
            return self.send(json.dumps(info).encode(), "application/json", body)
        prefix = f"/tests/tiny/resolve/{COMMIT}/"
        if path.startswith(prefix) and (self.server.folder / path.removeprefix(prefix)).is_file():
            name = path.removeprefix(prefix)
            if body:
                self.server.given.add(name)
            return self.send((self.server.folder / name).read_bytes(), "application/octet-stream", body)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def entry(self, name: str) -> dict[str, object]:
        content = (self.server.folder / name).read_bytes()
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def send(self, content: bytes, kind: str, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = write_checkpoint(tmp_path_factory.mktemp("hub"))
    (folder / "text_encoder_3").mkdir()
    (folder / "text_encoder_3/model.safetensors").write_bytes(b"much")
    (folder / "transformer/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"more")
    (folder / "sd3.safetensors").write_bytes(b"the same again")
    with serving(folder) as server:
        yield server


def open_through(endpoint: str, cache: Path, name: str, offline: bool = False, script: str = SCRIPT) -> str:
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_XET": "1"}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", script, name]
    done = subprocess.run(command, env={**os.environ, **settings}, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_only_the_files_of_the_export_are_downloaded_and_then_found_without_a_network(hub: Hub, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    assert open_through(endpoint, tmp_path, "tests/tiny") == "tiny 16 12"
    left = {"text_encoder_3/model.safetensors", "transformer/diffusion_pytorch_model.fp16.safetensors", "sd3.safetensors"}
    assert hub.given
    assert left.isdisjoint(hub.given)
    assert open_through(endpoint, tmp_path, "tests/tiny", offline=True) == "tiny 16 12"
    assert open_through("http://127.0.0.1:9", tmp_path, "tests/tiny") == "tiny 16 12"


def test_model_that_cannot_be_had_is_one_line(hub: Hub, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    lost = "UserError: tests/other: no such folder here, the hub cannot be reached, and its cache lacks this model"
    assert open_through(endpoint, tmp_path, "tests/other", offline=True).startswith(lost)
    unknown = "UserError: tests/other is neither a folder here nor a hub model"
    assert open_through(endpoint, tmp_path, "tests/other").startswith(unknown)


def test_lora_of_the_hub_is_one_file_and_its_card(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    for name in ("style.safetensors", "README.md", "sample.png"):
        (repository / name).write_text(name)
    with serving(repository) as server:
        endpoint, cache = f"http://127.0.0.1:{server.server_address[1]}", tmp_path / "cache"
        found = "tests/tiny style.safetensors style.safetensors True"
        assert open_through(endpoint, cache, "tests/tiny", script=LORA_SCRIPT) == found
        assert server.given == {"style.safetensors", "README.md"}
        assert open_through(endpoint, cache, "tests/tiny", offline=True, script=LORA_SCRIPT) == found
        (repository / "other.safetensors").write_text("other")
        several = "UserError: --lora tests/tiny: one safetensors file is needed at its top, or pytorch_lora_weights.safetensors"
        assert open_through(endpoint, tmp_path / "new", "tests/tiny", script=LORA_SCRIPT).startswith(several)
        (repository / "pytorch_lora_weights.safetensors").write_text("weights")
        named = "tests/tiny pytorch_lora_weights.safetensors weights True"
        assert open_through(endpoint, tmp_path / "newer", "tests/tiny", script=LORA_SCRIPT) == named
