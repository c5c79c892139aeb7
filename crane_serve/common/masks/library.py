"""MaskLibrary: the masks of one directory. It alone decides which mask a request means."""

import hashlib
import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from crane_serve.common.masks.composition import Composition, Member
from crane_serve.common.masks.files import SUFFIX, MaskFileError, StoredMask, read_mask
from crane_serve.common.masks.fingerprint import Fingerprint, FingerprintError
from crane_serve.common.masks.inline import INLINE, INLINE_PREFIX, InlineMask
from crane_serve.common.masks.positions import Positions

UNMASKED = "none"
MAX_MEMBERS = 16
MAX_EXPRESSION = 4096
"""The longest mask expression, in characters; 16 names of the greatest length with factors are 2,447."""
MAX_FACTOR = 100.0
_MEMO = 1024  # expressions
_MEMO_CHARACTERS = 2**25  # of all of them; those of names have a few KB each
_SHOWN = 80  # characters of an expression that errors show


class MaskError(ValueError):
    """A request names a mask that cannot be used."""


class UnknownMask(MaskError):
    """No mask of this name or digest exists."""


class InvalidMask(MaskError):
    """The mask's file exists but is corrupt or belongs to another model."""


class InlineMasksOff(MaskError):
    """A request brings a mask with it, which this server does not allow."""


class MaskTableFull(MaskError):
    """All rows of the engine are in use by different masks; temporary, retry later."""


@dataclass(frozen=True)
class ResolvedMask:
    """The meaning of a request's mask expression.

    name: canonical names joined with commas, INLINE for a mask that the request brings with it. positions: which of the
    request's tokens are masked. While this object lives, the library keeps the content that it refers to, even if the
    mask is replaced or removed.
    """

    name: str
    mask: Composition | InlineMask
    positions: Positions = Positions.ALL

    @property
    def wire(self) -> str:
        """Content digests instead of names, or the whole content: the form that is sent to the engine."""
        return self.mask.wire


class MaskLibrary:
    """The masks of one directory for one model.

    Unusable files stay listed with the reason, so that a request for one gets an error that says why. Masks can be
    added and removed while the library is in use, also from other threads. A mask that was replaced or removed is
    retired: its content stays until no request needs it.
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
        self.on_unused: Callable[[], object] | None = None  # called when retired content has lost its last user
        self.allows_inline = False  # whether requests may bring masks with them
        self._by_digest = {stored.mask.digest: stored for stored in self.masks.values()}  # retired ones too
        self._retired: frozenset[str] = frozenset()
        self._inline: WeakValueDictionary[str, InlineMask] = WeakValueDictionary()  # by wire form, while in use
        self._memo: dict[str, Composition | InlineMask] = {}
        self._lock = (
            threading.RLock()
        )  # re-entrant, since a garbage collection under the lock may release a ResolvedMask
        self._held: Counter[str] = Counter()  # by digest of a stored mask: living ResolvedMasks that refer to it

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
                invalid[path.stem] = str(error).replace(str(path), path.name)  # clients must not see the directory
        return cls(fingerprint, masks, invalid, default_method)

    def __contains__(self, digest: str) -> bool:
        """Whether the library has the content with this digest, live or retired."""
        return digest in self._by_digest

    @property
    def manifest(self) -> str:
        """Digest of all names and contents: processes with equal manifests have the same masks."""
        listing = "\n".join(f"{name} {stored.mask.digest}" for name, stored in self.masks.items())
        return hashlib.sha256(listing.encode()).hexdigest()

    def put(self, stored: StoredMask) -> None:
        """Add a mask, or replace the one of its name, which is then retired. Raises FingerprintError for another
        model's mask."""
        self.fingerprint.require(stored.info.fingerprint, f"mask {stored.name!r}")
        with self._lock:
            self.invalid = {name: reason for name, reason in self.invalid.items() if name != stored.name}
            self._set_masks({**self.masks, stored.name: stored})

    def discard(self, name: str) -> None:
        """Retire the mask of exactly this name, if there is one. An unusable file of this name is no longer listed."""
        with self._lock:
            self.invalid = {known: reason for known, reason in self.invalid.items() if known != name}
            self._set_masks({known: stored for known, stored in self.masks.items() if known != name})

    def _set_masks(self, masks: Mapping[str, StoredMask]) -> None:
        self.masks = dict(sorted(masks.items()))
        live = {stored.mask.digest: stored for stored in self.masks.values()}
        self._by_digest |= live
        self._retired = frozenset(self._by_digest) - frozenset(live)

    @property
    def retired(self) -> frozenset[str]:
        """Digests of content that has no name any more."""
        return self._retired

    def forget(self, digests: Iterable[str]) -> list[str]:
        """Drop retired content that no living ResolvedMask refers to; returns the digests of the dropped content."""
        with self._lock:
            dropped = [digest for digest in digests if digest in self._retired and digest not in self._held]
            for digest in dropped:
                del self._by_digest[digest]
            if dropped:
                self._retired -= frozenset(dropped)
                self._memo.clear()
            return dropped

    def mask_of(self, wire: str) -> Composition | InlineMask:
        """What `wire` means. Like `resolve_wire`, but it does not keep the content alive, and remembers its results.

        Raises MaskError.
        """
        mask = self._memo.get(wire)
        if mask is None:
            resolved = self.resolve_wire(wire)
            if resolved is None:
                raise MaskError(f"{wire!r} does not stand for a mask")
            mask = resolved.mask
            with self._lock:
                if len(self._memo) >= _MEMO or sum(map(len, self._memo)) + len(wire) > _MEMO_CHARACTERS:
                    self._memo.clear()
                self._memo[wire] = mask
        return mask

    def get(self, name: str, *, retired: bool = False) -> StoredMask:
        """The mask of a single content digest or name; a bare language means the mask of the default method.

        A digest always means its content, even if a file has it as its name. Content that was replaced or removed is
        found only with `retired`. Raises UnknownMask or InvalidMask.
        """
        with self._lock:
            return self._get(name, retired)

    def _get(self, name: str, retired: bool) -> StoredMask:
        if name in self._by_digest and (retired or name not in self._retired):
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

    def resolve(
        self,
        expression: str | Mapping[str, Any] | None,
        positions: Positions = Positions.ALL,
        *,
        retired: bool = False,
    ) -> ResolvedMask | None:
        """The mask that `expression` means: a name or a digest, or several joined with commas (their union).

        `zh@0.5` damps the neurons of `zh` to half instead of switching them off; a factor above 1 amplifies them. None,
        and the word "none", mean unmasked. An object is a mask itself (see `InlineMask.read`), if this is allowed. With
        `retired`, digests of retired content are valid too: a request that was admitted before a change keeps its mask.
        No scales are multiplied here. Raises UnknownMask, InvalidMask, InlineMasksOff, or MaskError for an expression
        that is malformed, too long, or could make scales larger than MAX_SCALE.
        """
        if expression is None or expression == UNMASKED:
            return None
        if not isinstance(expression, str):
            return self._inline_mask(lambda sizes: InlineMask.read(expression, sizes), positions)
        if INLINE_PREFIX in expression:
            raise MaskError("a mask of neurons is an object in the body, which no name can join: see `mask` there")
        self._require_bounds(expression)
        parts = [part.strip() for part in expression.split(",")]
        shown = f"mask {expression[:_SHOWN]!r}"
        if not all(parts):
            raise MaskError(f"{shown} is malformed; expected a name, or names joined with commas")
        if UNMASKED in parts:
            raise MaskError(f"{shown} joins {UNMASKED!r} with other masks")
        with self._lock:
            members = {member.wire: (name, member) for name, member in (self._member(part, retired) for part in parts)}
            name = ",".join(sorted(name for name, _ in members.values()))
            try:
                mask = Composition(member for _, member in members.values())
            except ValueError as error:
                raise MaskError(f"{shown}: {error}") from error
            resolved = ResolvedMask(name, mask, positions)
            self._lease(resolved, {member.mask.digest for member in mask.members})
            return resolved

    def resolve_wire(self, wire: str, positions: Positions = Positions.ALL) -> ResolvedMask | None:
        """The mask that the engine is sent: what `resolve` reads, retired content too, or the text form of a mask.

        Of text forms that are alike, only one is parsed and kept, while a request has it. Raises as `resolve` does.
        """
        if not wire.startswith(INLINE_PREFIX):
            return self.resolve(wire, positions, retired=True)
        known = self._inline.get(wire)
        if known is not None:
            return ResolvedMask(INLINE, known, positions)
        return self._inline_mask(lambda sizes: InlineMask.parse(wire, sizes), positions)

    def _inline_mask(self, make: Callable[[tuple[int, ...]], InlineMask], positions: Positions) -> ResolvedMask:
        if not self.allows_inline:
            raise InlineMasksOff(
                "this server takes no mask in the body; started with --inline-masks (CRANE_INLINE_MASKS=1) it does"
            )
        try:
            mask = make(self.fingerprint.intermediate_sizes)
        except ValueError as error:
            raise MaskError(f"mask in the body: {error}") from None
        with self._lock:
            return ResolvedMask(INLINE, self._inline.setdefault(mask.wire, mask), positions)

    @staticmethod
    def _require_bounds(expression: str) -> None:
        length, members = len(expression), expression.count(",") + 1
        shown = f"mask {expression[:_SHOWN]!r}..."
        if length > MAX_EXPRESSION:
            raise MaskError(f"{shown} has {length} characters; at most {MAX_EXPRESSION} are allowed")
        if members > MAX_MEMBERS:
            raise MaskError(f"{shown} joins {members} masks; at most {MAX_MEMBERS} are allowed")

    def _lease(self, resolved: ResolvedMask, digests: set[str]) -> None:
        self._held.update(digests)
        weakref.finalize(resolved, self._release, digests).atexit = False

    def _release(self, digests: set[str]) -> None:
        with self._lock:
            for digest in digests:
                self._held[digest] -= 1
                if not self._held[digest]:
                    del self._held[digest]
            unused = any(digest in self._retired and digest not in self._held for digest in digests)
        if unused and self.on_unused is not None:
            self.on_unused()

    def _member(self, part: str, retired: bool) -> tuple[str, Member]:
        """The canonical name of a part of an expression, and what it means."""
        name, at, text = part.partition("@")
        stored = self._get(name, retired)
        try:
            factor = float(text) + 0.0 if at else 0.0  # + 0.0: there is one zero
        except ValueError:
            factor = math.nan
        if not 0 <= factor <= MAX_FACTOR:
            raise MaskError(f"mask {part!r}: {text!r} is no factor; expected a number from 0 to {MAX_FACTOR:g}")
        return f"{stored.name}@{factor!r}" if factor else stored.name, Member(stored.mask, factor)
