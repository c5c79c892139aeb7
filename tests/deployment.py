"""What the files of a deployment say, and what is wrong with them. Each check returns its complaints."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from crane_serve.engine import config as engine_config
from crane_serve.service.settings import ENVIRONMENT_PREFIX, SECRETS, ServeSettings

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
MANIFESTS = DEPLOY / "kubernetes"
NO_SCHEMA = {"Kustomization", "ServiceMonitor"}  # not in Kubernetes itself
UID = 10001
CLOSING_S = 15  # connections and the engine, after the drain

# Of other programs in the images, with what reads them.
_OTHERS = {
    "HOME", "PATH",  # everything
    "XDG_CACHE_HOME",  # vLLM, Hugging Face, FlashInfer
    "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH", "MPLCONFIGDIR",  # caches of others
    "PIP_BREAK_SYSTEM_PACKAGES",
}  # fmt: skip
_SECRET = re.compile(r"(?i)(password|token|secret|credential|(^|_)key)")
_PLACE_OF_ONE = re.compile(r"(?i)(_file|_path|__file)$")


def documents(path: Path) -> list[dict[str, Any]]:
    """The YAML documents of a file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def manifests() -> dict[str, dict[str, Any]]:
    """All manifests, by kind and name."""
    found = [document for path in sorted(MANIFESTS.glob("*.yaml")) for document in documents(path)]
    return {f"{one['kind']}/{one.get('metadata', {}).get('name', '')}": one for one in found}


def engine_variables() -> set[str]:
    """CRANE_* variables that are read besides the settings."""
    return {value for name, value in vars(engine_config).items() if name.endswith("_VARIABLE")}


def unknown_variables(names: Iterable[str]) -> list[str]:
    """The variables that neither the service nor vLLM nor the hub's client reads."""
    import huggingface_hub.constants
    from vllm import envs

    settings = {f"{ENVIRONMENT_PREFIX}{name.upper()}" for name in ServeSettings.model_fields} | engine_variables()
    hub = set(re.findall(r'"(HF_[A-Z_]+)"', Path(huggingface_hub.constants.__file__).read_text())) | {"HF_TOKEN"}
    known = settings | set(envs.environment_variables) | hub | _OTHERS
    return [f"{name} is read by nothing" for name in names if name not in known]


def unknown_flags(flags: list[str]) -> list[str]:
    """Why `crane serve` would not take these flags; those of the service's own are left to its own parser."""
    import typer

    from crane_serve.cli import app
    from crane_serve.engine.flags import serving_arguments

    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    own = {option for parameter in command.params for option in parameter.opts}
    of_vllm, skip = [], False
    for flag in flags:
        if skip:
            skip = False
        elif flag.partition("=")[0] in own:
            skip = "=" not in flag
        else:
            of_vllm.append(flag)
    try:
        serving_arguments(Path("model"), of_vllm, program="crane serve")
    except ValueError as error:
        return [str(error)]
    return []


def locked(lock: Path) -> dict[str, tuple[str, list[str]]]:
    """Version and hashes of each package of a lock."""
    entries = re.findall(
        r"^([a-z0-9-]+)==(\S+)((?: \\\n +--hash=sha256:[0-9a-f]{64})*)$", lock.read_text(), re.MULTILINE
    )
    return {name: (version, re.findall(r"[0-9a-f]{64}", hashes)) for name, version, hashes in entries}


def secrets_in(environment: Mapping[str, Any]) -> list[str]:
    """Variables that hold a secret instead of saying where one is."""
    refused = {f"{ENVIRONMENT_PREFIX}{name.upper()}" for name in SECRETS}
    return [
        f"{name} holds a secret"
        for name, value in environment.items()
        if value and (name in refused or _SECRET.search(name)) and not _PLACE_OF_ONE.search(name)
    ]


def seconds(duration: str) -> float:
    """Of compose: 60s, 1m30s."""
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(float(count) * units[unit] for count, unit in re.findall(r"([\d.]+)([hms])", duration))


def compose_problems(compose: Mapping[str, Any], routes: set[str]) -> list[str]:
    """What is wrong with the services, as opposed to the form, of compose.yaml."""
    problems: list[str] = []
    for name, service in compose["services"].items():
        environment = service.get("environment", {})
        problems += [f"{name}: {problem}" for problem in secrets_in(environment)]
        for secret in service.get("secrets", ()):
            if secret not in compose["secrets"]:
                problems.append(f"{name}: no secret {secret}")
        for variable, value in environment.items():
            mounted = str(value).removeprefix("/run/secrets/")
            if str(value).startswith("/run/secrets/") and mounted not in service.get("secrets", ()):
                problems.append(f"{name}: {variable} names a secret that it is not given")
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if not source.startswith("./") and source not in compose["volumes"]:
                problems.append(f"{name}: no volume {source}")
            if source.startswith("./") and not (ROOT / source).exists():
                problems.append(f"{name}: {source} does not exist")
        if service.get("image", "").startswith("crane-serve:"):
            problems += [f"{name}: {problem}" for problem in _service_problems(service)]
        elif re.fullmatch(r"\d+:\d+", service.get("user", "")) is None or service["user"].startswith("0:"):
            problems.append(f"{name}: runs as the image's user")
        if not service.get("read_only") or service.get("cap_drop") != ["ALL"]:
            problems.append(f"{name}: may write to its image, or has capabilities")
        if not service.get("restart"):
            problems.append(f"{name}: is not started again")
    problems += ["docker-compose 1.29 takes no name beside services"] * ("name" in compose)
    for name, volume in compose["volumes"].items():
        if "name" not in (volume or {}):
            problems.append(f"volume {name}: its name depends on the directory")
    for name, secret in compose["secrets"].items():
        if not secret["file"].startswith("./deploy/secrets/"):
            problems.append(f"secret {name}: {secret['file']} is not in the directory that git ignores")
    return problems


def _service_problems(service: Mapping[str, Any]) -> Iterator[str]:
    environment = service["environment"]
    drain = float(environment["CRANE_DRAIN_TIMEOUT_S"])
    if seconds(service["stop_grace_period"]) < drain + CLOSING_S:
        yield f"stop_grace_period {service['stop_grace_period']} is too short for a drain of {drain:.0f} s"
    yield from unknown_variables(environment)
    for port in service["ports"]:
        if port.rpartition(":")[2] != "8000":
            yield f"port {port} is not the service's"
        if not port.startswith(("127.0.0.1:", "${CRANE_PUBLISH:-127.0.0.1:")):
            yield f"port {port} is open to every address"
    if not environment.get("CRANE_API_KEYS_FILE") or environment.get("CRANE_INSECURE"):
        yield "is open without keys"


def policy_problems(policy: Mapping[str, Any]) -> list[str]:
    """What is wrong with a NetworkPolicy of the service's pods."""
    spec = policy["spec"]
    problems = [f"leaves {kind} open" for kind in ("Ingress", "Egress") if kind not in spec["policyTypes"]]
    for rule in spec["ingress"]:
        if not rule.get("from") or any("ipBlock" in one or one.get("namespaceSelector") == {} for one in rule["from"]):
            problems.append("lets in everybody")
        if [port["port"] for port in rule.get("ports", ())] != ["http"]:
            problems.append("lets in to other ports than the service's")
    for rule in spec["egress"]:
        if not rule.get("to") or {port["port"] for port in rule.get("ports", ())} not in ({53}, {443}):
            problems.append("lets out more than names and HTTPS")
        for block in (one["ipBlock"] for one in rule.get("to", ()) if "ipBlock" in one):
            private = ("fc00::/7", "fe80::/10") if ":" in block["cidr"] else ("10.0.0.0/8", "169.254.0.0/16")
            problems += [f"lets out to {net}" for net in private if net not in block.get("except", ())]
    return problems


def pod_problems(deployment: Mapping[str, Any], settings: Mapping[str, str], routes: set[str]) -> list[str]:
    """What is wrong with the pods of a Deployment, whose containers have the variables `settings`."""
    pod = deployment["spec"]["template"]["spec"]
    problems: list[str] = []
    security = pod.get("securityContext", {})
    if not security.get("runAsNonRoot") or security.get("runAsUser") != UID or security.get("fsGroup") != UID:
        problems.append("the pod does not run as the image's user")
    if pod.get("automountServiceAccountToken", True):
        problems.append("the pod has a token of the cluster")
    if pod.get("enableServiceLinks", True):
        problems.append("a Service named crane would set CRANE_PORT")
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in pod["containers"]:
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            get = container[kind]["httpGet"]
            if get["path"] not in routes:
                problems.append(f"{kind}: {get['path']} is no route of the service")
            if get["port"] not in ports:
                problems.append(f"{kind}: no port {get['port']}")
        if container["readinessProbe"]["httpGet"]["path"] == container["livenessProbe"]["httpGet"]["path"]:
            problems.append("a server that drains would be killed: readiness and liveness are the same")
        sleep = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
        needed = sleep + float(settings["CRANE_DRAIN_TIMEOUT_S"]) + CLOSING_S
        if pod["terminationGracePeriodSeconds"] < needed:
            problems.append(f"terminationGracePeriodSeconds is less than the {needed:.0f} that an end takes")
        problems += secrets_in({one["name"]: one.get("value") for one in container.get("env", ())})
        problems += unknown_variables([*settings, *(one["name"] for one in container.get("env", ()))])
        own = container.get("securityContext", {})
        if own.get("allowPrivilegeEscalation", True) or own.get("capabilities", {}).get("drop") != ["ALL"]:
            problems.append("the container has privileges")
        if not own.get("readOnlyRootFilesystem"):
            problems.append("the root file system can be written")
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        problems += [f"no volume {name}" for name in mounts.values() if name not in volumes]
        problems += [f"{place} is not mounted" for place in WRITTEN if place not in mounts]
        for variable in ("CRANE_MASKS", "CRANE_API_KEYS_FILE"):
            if not any(Path(settings[variable]).is_relative_to(place) for place in mounts):
                problems.append(f"{variable}: {settings[variable]} is in no volume")
        if "nvidia.com/gpu" not in container["resources"]["limits"]:
            problems.append("no GPU")
    return problems


WRITTEN = ("/models", "/masks", "/home/crane/.cache", "/tmp", "/dev/shm")
"""What the service writes to."""
