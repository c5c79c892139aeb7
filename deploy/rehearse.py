"""Go through a target of the Dockerfile without Docker: build it in a directory, start it there, ask it, stop it.

    python deploy/rehearse.py build ROOT [--build-arg NAME=VALUE] [--env NAME] [--copy PATH] [--bind PATH]
    python deploy/rehearse.py run ROOT --model DIR --masks DIR [--read-only] [--no-network] [--set NAME=VALUE] [-- ...]

Needs root, and `debootstrap` for a target that begins with `FROM debian:SUITE-slim`. RUN, COPY, ENV, ARG, USER and
WORKDIR are carried out as Docker does; the rest is kept in ROOT.json for `run`, which starts the entry point as the
target's user in its environment, waits until the HEALTHCHECK passes, generates with and without masks, sends the
STOPSIGNAL, and exits with 1 unless everything answers and the server exits with 0. Mounts and processes are in name
spaces of their own, the network too with --no-network; nothing else of a container is there.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

CONTEXT = Path(__file__).parent.parent
DEBIAN = re.compile(r"debian:(?P<suite>[a-z]+)-slim")
MIRROR = "http://deb.debian.org/debian"
GIVEN_BY_DOCKER = (Path("/etc/resolv.conf"), Path("/etc/hosts"))
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_ENTERED = "CRANE_REHEARSAL_ENTERED"
_START_S, _ANSWER_S, _STOP_S = 900.0, 300.0, 60.0


class RehearsalError(RuntimeError):
    """A step cannot be carried out here, or did not give what it should."""


@dataclass
class Image:
    """What a stage has made besides its files."""

    environment: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    labels: dict[str, str] = field(default_factory=dict)
    user: str = "0:0"
    directory: str = "/"
    entrypoint: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)
    volumes: list[str] = field(default_factory=list)
    ports: list[str] = field(default_factory=list)
    stop_signal: str = "SIGTERM"


@dataclass(frozen=True)
class Stage:
    """A FROM and the instructions behind it, as the parser of the `dockerfile` package gives them."""

    name: str
    base: str
    instructions: tuple[Any, ...]


@dataclass(frozen=True)
class Machine:
    """What the steps need from this machine: files to copy and bind into the root, variables for RUN."""

    copies: Sequence[Path] = ()
    binds: Sequence[Path] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def expand(text: str, variables: Mapping[str, str]) -> str:
    """`text` with $NAME and ${NAME} replaced, an unknown name by nothing."""
    return _VARIABLE.sub(lambda found: variables.get(found[1] or found[2], ""), text)


def read_stages(dockerfile: str, build_args: Mapping[str, str]) -> tuple[dict[str, Stage], dict[str, str]]:
    """The stages of a Dockerfile by name, and the build arguments that stand before them. Raises RehearsalError."""
    import dockerfile as parser

    global_args: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    opened: list[tuple[str, str, list[Any]]] = []
    for instruction in parser.parse_string(dockerfile):
        kind = instruction.cmd.upper()
        if kind == "FROM":
            base, *alias = instruction.value
            name = alias[1] if alias else str(len(opened))
            opened.append((name, expand(base, global_args), []))
        elif opened:
            opened[-1][2].append(instruction)
        elif kind == "ARG":
            global_args |= _arguments(instruction, build_args, {})
    for name, base, instructions in opened:
        stages[name] = Stage(name, base, tuple(instructions))
    if not stages:
        raise RehearsalError("the Dockerfile has no FROM")
    return stages, global_args


def _arguments(instruction: Any, build_args: Mapping[str, str], global_args: Mapping[str, str]) -> dict[str, str]:
    """What an ARG sets: the build argument, else its default, else the argument of this name before the first FROM."""
    found: dict[str, str] = {}
    for word in instruction.value:
        name, given, default = word.partition("=")
        if name in build_args:
            found[name] = build_args[name]
        elif given:
            found[name] = _unquoted(default)
        elif name in global_args:
            found[name] = global_args[name]
    return found


def _unquoted(value: str) -> str:
    return " ".join(shlex.split(value))


def _pairs(instruction: Any, variables: Mapping[str, str]) -> dict[str, str]:
    """The names and values of ENV and LABEL."""
    words = list(instruction.value)
    return {name: expand(_unquoted(value), variables) for name, value in zip(words[::2], words[1::2], strict=True)}


def in_context(context: Path) -> list[Path]:
    """The files of a build context that .dockerignore lets through, relative to it."""
    from pathspec import PathSpec

    rules = context / ".dockerignore"
    lines = rules.read_text().splitlines() if rules.is_file() else []
    # As git's, but every pattern begins at the root.
    ignored = PathSpec.from_lines("gitwildmatch", [re.sub(r"^(!?)/?(?=[^#!/])", r"\1/", line) for line in lines])
    found = []
    for place, directories, files in os.walk(context):
        relative = Path(place).relative_to(context)
        if relative == Path("."):  # what is not named at the top need not be walked
            directories[:] = [name for name in directories if not name.startswith(".")]
        found += [relative / name for name in files if not ignored.match_file(relative / name)]
    return sorted(found)


class Build:
    """Carries out stages in directories beside each other: ROOT is the target's, ROOT.NAME another stage's."""

    def __init__(
        self, context: Path, root: Path, target: str, build_args: Mapping[str, str], machine: Machine, base: Path | None
    ) -> None:
        text = (context / "Dockerfile").read_text()
        self.stages, self._global_args = read_stages(text, build_args)
        if target not in self.stages:
            raise RehearsalError(f"the Dockerfile has no target {target!r}; it has {', '.join(self.stages)}")
        self._context, self._root, self._target = context, root, target
        self._build_args, self._machine, self._base = build_args, machine, base

    def run(self) -> Image:
        """Build the target and what it copies from."""
        image = self._stage(self.stages[self._target])
        Path(f"{self._root}.json").write_text(json.dumps(asdict(image), indent=2))
        return image

    def _place(self, stage: Stage) -> Path:
        return self._root if stage.name == self._target else Path(f"{self._root}.{stage.name}")

    def _stage(self, stage: Stage) -> Image:
        place = self._place(stage)
        if place.exists():
            raise RehearsalError(f"{place} exists; remove it first")
        for name in dict.fromkeys(self._sources(stage)):
            if not self._place(self.stages[name]).exists():
                self._stage(self.stages[name])
        self._begin(stage, place)
        image = Image()
        arguments: dict[str, str] = {}
        for instruction in stage.instructions:
            _say(f"{stage.name}: {_shortened(instruction.original)}")
            began = time.monotonic()
            self._carry_out(instruction, place, image, arguments)
            if instruction.cmd.upper() in ("RUN", "COPY"):
                _say(f"    {time.monotonic() - began:.1f} s")
        return image

    def _sources(self, stage: Stage) -> Iterator[str]:
        for instruction in stage.instructions:
            for flag in instruction.flags:
                if instruction.cmd.upper() == "COPY" and flag.startswith("--from="):
                    name = flag.removeprefix("--from=")
                    if name not in self.stages:
                        raise RehearsalError(f"{instruction.original}: only stages can be copied from")
                    yield name

    def _begin(self, stage: Stage, place: Path) -> None:
        if stage.base == "scratch":
            place.mkdir(parents=True)
            return
        debian = DEBIAN.fullmatch(stage.base)
        if debian is None:
            raise RehearsalError(f"FROM {stage.base}: only scratch and debian:SUITE-slim can be rehearsed")
        if self._base is not None:
            _say(f"{stage.name}: FROM {stage.base}: a copy of {self._base}")
            subprocess.run(["cp", "-a", self._base, place], check=True)
        else:
            _say(f"{stage.name}: FROM {stage.base}: debootstrap --variant=minbase {debian['suite']}")
            subprocess.run(["debootstrap", "--variant=minbase", debian["suite"], place, MIRROR], check=True)
        for path in (*GIVEN_BY_DOCKER, *self._machine.copies):
            inside = _inside(place, path)
            inside.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, inside, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, inside)
        _mount_system(place)
        for path in self._machine.binds:
            _bind(path, _inside(place, path))

    def _carry_out(self, instruction: Any, place: Path, image: Image, arguments: dict[str, str]) -> None:
        kind, value = instruction.cmd.upper(), list(instruction.value)
        variables = {**arguments, **image.environment}
        if kind == "ARG":
            arguments |= _arguments(instruction, self._build_args, self._global_args)
        elif kind == "ENV":
            image.environment |= _pairs(instruction, variables)
        elif kind == "LABEL":
            image.labels |= _pairs(instruction, variables)
        elif kind == "RUN":
            if instruction.flags:
                raise RehearsalError(f"{instruction.original}: flags of RUN are not carried out")
            command = value if instruction.json else ["/bin/sh", "-c", *value]
            _inside_root(place, image, command, {**self._machine.environment, **variables})
        elif kind == "COPY":
            self._copy(instruction, place, image)
        elif kind == "USER":
            image.user = expand(value[0], variables)
        elif kind == "WORKDIR":
            image.directory = os.path.join(image.directory, expand(value[0], variables))
            _inside(place, Path(image.directory)).mkdir(parents=True, exist_ok=True)
        elif kind == "ENTRYPOINT":
            image.entrypoint = value if instruction.json else ["/bin/sh", "-c", *value]
        elif kind == "HEALTHCHECK":
            image.health = value[1:] if instruction.json else ["/bin/sh", "-c", *value[1:]]
        elif kind == "VOLUME":
            image.volumes += value
        elif kind == "EXPOSE":
            image.ports += value
        elif kind == "STOPSIGNAL":
            image.stop_signal = value[0]
        else:
            raise RehearsalError(f"{instruction.original}: {kind} is not carried out")

    def _copy(self, instruction: Any, place: Path, image: Image) -> None:
        *sources, target = instruction.value
        stage = [flag.removeprefix("--from=") for flag in instruction.flags if flag.startswith("--from=")]
        if len(stage) != len(instruction.flags):
            raise RehearsalError(f"{instruction.original}: of COPY's flags only --from is carried out")
        origin = self._place(self.stages[stage[0]]) if stage else self._context
        files = sorted(path.relative_to(origin) for path in origin.rglob("*")) if stage else in_context(origin)
        destination = _inside(place, Path(os.path.join(image.directory, target)))
        for source in sources:
            name = source.strip("/")
            is_directory = (origin / name).is_dir()
            taken = [path for path in files if name == "" or path == Path(name) or Path(name) in path.parents]
            taken = [path for path in taken if not (origin / path).is_dir()]
            if not taken:
                raise RehearsalError(f"{instruction.original}: {source} is not in the build context")
            for path in taken:  # a directory is copied as its contents
                into = destination / path.relative_to(name) if is_directory else destination
                into = into / path.name if not is_directory and target.endswith("/") else into
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(origin / path, into)
                os.chown(into, 0, 0)


def _inside(root: Path, path: Path) -> Path:
    return root / str(path).lstrip("/")


def _bind(source: Path, place: Path) -> None:
    if source.is_dir():
        place.mkdir(parents=True, exist_ok=True)
    else:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    subprocess.run(["mount", "--rbind", source, place], check=True)


def _mount_system(root: Path) -> None:
    subprocess.run(["mount", "-t", "proc", "proc", root / "proc"], check=True)
    for path in (Path("/dev"), Path("/sys")):
        _bind(path, _inside(root, path))


def _command(root: Path, image: Image, command: Sequence[str]) -> list[str]:
    user = image.user if ":" in image.user else f"{image.user}:"
    change = f'cd {shlex.quote(image.directory)} && exec "$@"'
    return ["chroot", f"--userspec={user}", "--groups=", str(root), "/bin/sh", "-c", change, "sh", *command]


def _inside_root(root: Path, image: Image, command: Sequence[str], environment: Mapping[str, str]) -> None:
    done = subprocess.run(_command(root, image, command), env={"HOME": "/root", **environment}, check=False)
    if done.returncode:
        raise RehearsalError(f"exit code {done.returncode}: {_shortened(shlex.join(command))}")


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) < 110 else f"{text[:107]}..."


def _say(line: str) -> None:
    print(line, flush=True)


class Service:
    """The entry point of a built target, running."""

    def __init__(self, root: Path, environment: Mapping[str, str], arguments: Sequence[str], log: Path) -> None:
        self._root = root
        self.image = Image(**json.loads(Path(f"{root}.json").read_text()))
        self._environment = {**self.image.environment, **environment}
        self.log = log
        command = _command(root, self.image, [*self.image.entrypoint, *arguments])
        with log.open("wb") as output:
            self._process = subprocess.Popen(command, env=self._environment, stdout=output, stderr=subprocess.STDOUT)
        self._address = f"http://127.0.0.1:{self._environment['CRANE_PORT']}"

    def wait(self) -> float:
        """Wait until the health check passes; seconds it took. Raises RehearsalError."""
        began = time.monotonic()
        check = _command(self._root, self.image, self.image.health)
        while time.monotonic() - began < _START_S:
            if self._process.poll() is not None:
                raise RehearsalError(f"the server ended with {self._process.returncode}: {self._tail()}")
            if subprocess.run(check, env=self._environment, capture_output=True, check=False).returncode == 0:
                return time.monotonic() - began
            time.sleep(2)
        raise RehearsalError(f"not healthy after {_START_S:.0f} s: {self._tail()}")

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        with urllib.request.urlopen(self._address + path, timeout=_ANSWER_S) as answer:
            return json.load(answer)

    def generate(self, prompt: str, mask: str) -> dict[str, Any]:
        """The answer of /generate under a mask, greedily."""
        body = json.dumps({"prompt": prompt, "max_tokens": 16, "temperature": 0}).encode()
        address = f"{self._address}/generate?{urllib.parse.urlencode({'mask': mask})}"
        request = urllib.request.Request(address, body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def stop(self) -> tuple[int, float]:
        """Send the stop signal to the entry point alone, as Docker does; exit code and seconds."""
        began = time.monotonic()
        self._process.send_signal(signal.Signals[self.image.stop_signal])
        return self._process.wait(_STOP_S), time.monotonic() - began

    def kill(self) -> None:
        """End it if it runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def owner(self) -> int:
        """The user id that the server's process has."""
        return Path(f"/proc/{self._process.pid}").stat().st_uid

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


def run(root: Path, options: argparse.Namespace) -> None:
    """Start, ask and stop a built target. Raises RehearsalError for the first thing that is not as it should be."""
    subprocess.run(["mount", "--bind", root, root], check=True)
    _mount_system(root)
    model = Path("/models") / options.model.name
    _bind(options.model, _inside(root, model))
    _bind(options.masks, root / "masks")
    for place in options.tmpfs:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", _inside(root, place)], check=True)
    if options.read_only:
        subprocess.run(["mount", "-o", "remount,bind,ro", root], check=True)
    environment = {"CRANE_MODEL": str(model), **dict(options.set)}
    service = Service(root, environment, options.arguments, Path(f"{root}.log"))
    try:
        _say(f"healthy after {service.wait():.1f} s; user id {service.owner()}")
        _say(f"GET /ready: {service.get('/ready')['status']}")
        names = [mask["name"] for mask in service.get("/masks")["masks"]][: options.most]
        if not names:
            raise RehearsalError("the server has no masks")
        _say(f"without a mask: {service.generate(options.prompt, 'none')['outputs'][0]['text']!r}")
        for name in names:
            answer = service.generate(options.prompt, name)
            if answer["mask"] is None or answer["mask"]["name"] != name:
                raise RehearsalError(f"asked for mask {name}, answered under {answer['mask']}")
            _say(f"{name}: {answer['outputs'][0]['text']!r}")
        try:
            service.generate(options.prompt, "nowhere")
        except urllib.error.HTTPError as error:
            _say(f"a mask that is not there: {error.code} {json.load(error)['error']['code']}")
        else:
            raise RehearsalError("a mask that does not exist was served")
        code, seconds = service.stop()
        _say(f"{service.image.stop_signal}: exit code {code} after {seconds:.1f} s")
        if code != 0:
            raise RehearsalError(f"exit code {code} after {service.image.stop_signal}, expected 0")
    finally:
        service.kill()


def _pair(text: str) -> tuple[str, str]:
    name, given, value = text.partition("=")
    if not given:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=VALUE")
    return name, value


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line; `arguments` of them are those of the entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    building = steps.add_parser("build")
    building.add_argument("root", type=Path)
    building.add_argument("--target", default="cpu")
    building.add_argument("--base", type=Path, help="a directory that debootstrap has made, to begin with a copy of it")
    building.add_argument("--build-arg", type=_pair, action="append", default=[])
    building.add_argument("--env", action="append", default=[], help="a variable of this process that RUN shall see")
    building.add_argument("--copy", type=Path, action="append", default=[], help="a file of this machine, to its place")
    building.add_argument("--bind", type=Path, action="append", default=[], help="a directory, likewise")
    running = steps.add_parser("run")
    running.add_argument("root", type=Path)
    running.add_argument("--model", type=Path, required=True)
    running.add_argument("--masks", type=Path, required=True)
    running.add_argument("--set", type=_pair, action="append", default=[], help="a variable of the server")
    running.add_argument("--tmpfs", type=Path, action="append", default=[], help="an empty file system at this place")
    running.add_argument("--read-only", action="store_true", help="the root file system cannot be written")
    running.add_argument("--no-network", action="store_true", help="only the loopback interface")
    running.add_argument("--most", type=int, default=3, help="how many masks to try")
    running.add_argument("--prompt", default="Hanoi is")
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:end])
    options.arguments = arguments[end + 1 :]  # of the entry point
    return options


def main() -> None:
    options = parse_options(sys.argv[1:])
    if _ENTERED not in os.environ:  # what is mounted and started in name spaces ends with this process
        spaces = ["--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--mount-proc"]
        if getattr(options, "no_network", False):
            spaces.append("--net")
        os.environ[_ENTERED] = "1"
        os.execvp("unshare", ["unshare", *spaces, sys.executable, *sys.argv])
    root = options.root.resolve()
    try:
        if options.step == "build":
            machine = Machine(options.copy, options.bind, {name: os.environ[name] for name in options.env})
            Build(CONTEXT, root, options.target, dict(options.build_arg), machine, options.base).run()
        else:
            if options.no_network:
                subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            run(root, options)
    except (RehearsalError, subprocess.CalledProcessError, KeyError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
