"""Names of repositories on the Hugging Face Hub, hf:OWNER/NAME[@REVISION]. Loads no other library."""

import re
from dataclasses import dataclass

HUB_NAME = "hf:OWNER/NAME (maybe with @REVISION)"
_PREFIX = "hf:"
_NAME = re.compile(r"hf:(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII)


@dataclass(frozen=True)
class HubName:
    """A repository of the Hub. revision: a commit, branch or tag, None for the default branch."""

    repository: str
    revision: str | None = None

    @classmethod
    def parse(cls, name: str) -> "HubName":
        """What hf:OWNER/NAME[@REVISION] names. Raises ValueError for anything else."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{name!r} names no repository; expected {HUB_NAME}")
        return cls(match["repository"], match["revision"])

    def __str__(self) -> str:
        return f"{_PREFIX}{self.repository}" + ("" if self.revision is None else f"@{self.revision}")


def is_on_hub(name: str) -> bool:
    """Whether a name is to be one of a repository of the Hub, and no path."""
    return name.startswith(_PREFIX)
