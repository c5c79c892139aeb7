"""MaskLibrary: the masks of one directory, and the one place that says which mask a request means."""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from crane_serve.masks.files import SUFFIX, MaskFileError, StoredMask, read_mask
from crane_serve.masks.fingerprint import Fingerprint, FingerprintError
from crane_serve.masks.mask import NeuronMask

UNMASKED = "none"
_MAX_UNION = 16
_CACHED = 256
MAX_FACTOR = 100.0


class MaskError(ValueError):
    """A request names a mask that cannot be used."""


class UnknownMask(MaskError):
    """No mask of this name or digest exists."""


class InvalidMask(MaskError):
    """The mask's file exists but is corrupt or belongs to another model."""


@dataclass(frozen=True)
class ResolvedMask:
    """What a request's mask expression means.

    name: canonical names joined with commas; wire: the same by content digest, which is what travels to the engine.
    """

    name: str
    wire: str
    mask: NeuronMask


class MaskLibrary:
    """The masks of one directory for one model.

    Files that cannot be used stay listed with the reason, so that asking for one is an error that says why.
    """

    def __init__(
        self,
        fingerprint: Fingerprint,
        masks: Mapping[str, StoredMask],
        invalid: Mapping[str, str] | None = None,
        default_method: str | None = None,
    ) -> None:
        self.fingerprint = fingerprint
        self.masks = dict(sorted(masks.items()))
        self.invalid = dict(sorted((invalid or {}).items()))
        self.default_method = default_method
        self._by_digest = {stored.mask.digest: stored for stored in self.masks.values()}
        self._composed: OrderedDict[str, NeuronMask] = OrderedDict()

    @classmethod
    def load(cls, directory: Path, fingerprint: Fingerprint, default_method: str | None = None) -> "MaskLibrary":
        """Read every mask file of `directory`. Raises MaskFileError if it is not a directory."""
        if not directory.is_dir():
            raise MaskFileError(f"{directory} is not a directory of mask files")
        masks: dict[str, StoredMask] = {}
        invalid: dict[str, str] = {}
        for path in sorted(directory.glob(f"[!.]*{SUFFIX}")):
            try:
                stored = read_mask(path)
                fingerprint.require(stored.info.fingerprint, f"mask {stored.name!r}")
                masks[stored.name] = stored
            except (MaskFileError, FingerprintError) as error:
                invalid[path.stem] = str(error)
        return cls(fingerprint, masks, invalid, default_method)

    @property
    def manifest(self) -> str:
        """Digest of all names and contents: processes that agree on it hold the same masks."""
        listing = "\n".join(f"{name} {stored.mask.digest}" for name, stored in self.masks.items())
        return hashlib.sha256(listing.encode()).hexdigest()

    def get(self, name: str) -> StoredMask:
        """The mask a single content digest or name means; a bare language means the default method's mask.

        A digest always means its content, even if a file is named like it. Raises UnknownMask or InvalidMask.
        """
        if name in self._by_digest:
            return self._by_digest[name]
        for candidate in self._candidates(name):
            if candidate in self.masks:
                return self.masks[candidate]
            if candidate in self.invalid:
                raise InvalidMask(f"mask {candidate!r} cannot be used: {self.invalid[candidate]}")
        known = ", ".join(self.masks) or "no masks"
        raise UnknownMask(f"unknown mask {name!r}; this server has {known}")

    def _candidates(self, name: str) -> list[str]:
        return [name] if self.default_method is None else [name, f"{self.default_method}-{name}"]

    def resolve(self, expression: str | None) -> ResolvedMask | None:
        """The mask that `expression` means: a name or a digest, or several joined with commas (their union).

        `zh@0.5` damps the neurons of `zh` to half instead of switching them off; a factor above 1 amplifies them.
        None, and the word "none", mean unmasked. Raises UnknownMask, InvalidMask, or MaskError for a malformed
        expression.
        """
        if expression is None or expression == UNMASKED:
            return None
        parts = [part.strip() for part in expression.split(",")]
        if not all(parts):
            raise MaskError(f"mask {expression!r} is malformed; expected a name, or names joined with commas")
        if UNMASKED in parts:
            raise MaskError(f"mask {expression!r} joins {UNMASKED!r} with other masks")
        if len(parts) > _MAX_UNION:
            raise MaskError(f"mask {expression[:40]!r}... joins {len(parts)} masks; at most {_MAX_UNION} are allowed")
        members = {member.wire: member for member in map(self._member, parts)}
        name = ",".join(sorted(member.name for member in members.values()))
        wire = ",".join(sorted(members))
        return ResolvedMask(name, wire, self._compose(wire, list(members.values())))

    def _member(self, part: str) -> "_Member":
        name, at, text = part.partition("@")
        stored = self.get(name)
        if not at:
            return _Member(stored.name, stored.mask.digest, stored.mask, None)
        try:
            factor = float(text)
        except ValueError:
            factor = math.nan
        if not 0 <= factor <= MAX_FACTOR:
            raise MaskError(f"mask {part!r}: {text!r} is no factor; expected a number from 0 to {MAX_FACTOR:g}")
        return _Member(f"{stored.name}@{factor!r}", f"{stored.mask.digest}@{factor!r}", stored.mask, factor)

    def _compose(self, wire: str, members: list["_Member"]) -> NeuronMask:
        if len(members) == 1 and members[0].factor is None:
            return members[0].mask
        composed = self._composed.get(wire)
        if composed is None:
            composed = self._composed[wire] = NeuronMask.union([member.scaled() for member in members])
            if len(self._composed) > _CACHED:
                self._composed.popitem(last=False)
        return composed


@dataclass(frozen=True)
class _Member:
    """One part of an expression. factor: the scale that it gives to neurons which its mask switches off, if not 0."""

    name: str
    wire: str
    mask: NeuronMask
    factor: float | None

    def scaled(self) -> NeuronMask:
        return self.mask if self.factor is None else self.mask.scaled(self.factor)
