"""Print `name==version` for a distribution and all that it requires: constraints that keep pip from changing them.

Usage: python3 deploy/constraints.py torch
"""

import argparse
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def constraints(root: str) -> list[str]:
    """The installed versions of `root` and of everything it requires, by name.

    Requirements that are not installed, or not for this machine, are left out. Raises PackageNotFoundError if `root` is
    not installed.
    """
    distribution(root)
    versions: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    wanted = [(root, "")]
    while wanted:
        name, extra = wanted.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        versions[name] = found.version
        for requirement in map(Requirement, found.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                wanted += [(canonicalize_name(requirement.name), of) for of in ("", *requirement.extras)]
    return sorted(f"{name}=={version}" for name, version in versions.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=canonicalize_name)
    print("\n".join(constraints(parser.parse_args().root)))


if __name__ == "__main__":
    main()
