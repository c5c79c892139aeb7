"""Masks on the Hugging Face Hub: repositories of mask files, with a card."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

from crane_serve.common.hub_name import HubName, is_on_hub
from crane_serve.common.masks.card import CARD_FILE, LIBRARY, front_matter
from crane_serve.common.masks.files import (
    METADATA_KEY,
    SUFFIX,
    MaskFileError,
    StoredMask,
    encode_mask,
    mask_path,
    read_mask,
    write_mask,
)
from crane_serve.common.masks.transfer import read_masks

_FILES, _BELOW = f"[!.]*{SUFFIX}", "*/*"  # mask files stand at the top
_SHOWN = 300  # characters of an error of the Hub


class HubMasksError(ValueError):
    """Masks cannot be fetched from the Hub, or not be put there; the message names the repository."""


class _HubFails(Exception):
    """The Hub did not do what it was asked, or was not reached; the message is its reason."""


def fetch_masks(source: HubName) -> Path:
    """The directory of a repository's masks in the Hub's cache, at the commit that the revision means now: its name.

    Nothing but mask files is fetched, and none before its header says that it is one. If the Hub cannot be asked, the
    commit is taken that was fetched last. Raises HubMasksError for a repository or revision that is not there, one
    without mask files or with other safetensors files, and if neither the Hub nor its cache has the masks.
    """
    try:
        with _explained(source):
            listing = _Listing.of(source)
            if not listing.mask_files:
                raise HubMasksError(f"{source} holds no mask files; `crane masks push` puts some there")
            listing.require_masks(source)
            directory = _snapshot(source)
    except _HubFails as failure:
        try:
            with _explained(source):
                return _snapshot(source, local_files_only=True)
        except _HubFails:
            raise HubMasksError(
                f"{source} could not be fetched, and the Hub's cache does not have all of it: {failure}"
            ) from failure
    if directory.name != listing.commit:
        raise HubMasksError(f"{source} changed while it was fetched; try again")
    return directory


def mask_directory(masks: str | Path) -> Path:
    """The directory of mask files that `masks` names: a path, or hf:OWNER/NAME[@REVISION], which is fetched.

    Raises HubMasksError, as `fetch_masks` does; ValueError for a name of the Hub that is none.
    """
    return fetch_masks(HubName.parse(masks)) if isinstance(masks, str) and is_on_hub(masks) else Path(masks)


def pull_masks(source: HubName, to: Path, *, force: bool = False) -> tuple[str, list[Path]]:
    """Copy a repository's masks into the directory `to`, which is made if missing; the commit, and the paths.

    force: replace other masks of the same names. Raises what `fetch_masks` does; MaskFileError, before anything is
    written, for a file that is no whole mask, and for one in the way.
    """
    directory = fetch_masks(source)
    masks = read_masks(directory)
    for stored in masks:
        path = mask_path(to, stored.name)
        if path.exists() and not force and read_mask(path).mask.digest != stored.mask.digest:
            raise MaskFileError(f"{path} exists and is another mask than that of {source}; --force replaces it")
    return directory.name, [write_mask(to, stored.name, stored.mask, stored.info) for stored in masks]


def is_pinned(directory: Path) -> bool:
    """Whether a directory is a commit in the Hub's cache, whose content is to stay what its name says."""
    snapshots = directory.resolve().parent
    return snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")


def push_masks(
    to: HubName,
    masks: Sequence[StoredMask],
    write_card: Callable[[Sequence[StoredMask], Mapping[str, Any]], str],
    *,
    private: bool = False,
    force: bool = False,
) -> HubName:
    """Commit mask files and the card of their repository; the repository at that commit.

    write_card: the card of all masks that the repository then has, from them and the front matter of its present card.
    private: whether the repository, if it is made now, is for its owner only. force: overwrite a card or a file of a
    mask's name that is not ours, too. Masks that it has under other names stay. Raises HubMasksError for a revision, no
    masks, two of one name, masks of several models (those there included), what would be overwritten without `force`,
    and whatever the Hub refuses.
    """
    if to.revision is not None:
        raise HubMasksError(f"{to}: masks are pushed to the default branch; expected hf:OWNER/NAME")
    names = [stored.name for stored in masks]
    twice = [name for name in names if names.count(name) > 1]
    if twice or not names:
        raise HubMasksError(f"two masks are called {twice[0]!r}; expected one" if twice else "expected a mask to push")
    try:
        with _explained(to):
            return _push(to, masks, write_card, private, force)
    except _HubFails as failure:
        raise HubMasksError(f"{to} could not be pushed to: {failure}") from failure


def _push(
    to: HubName,
    masks: Sequence[StoredMask],
    write_card: Callable[[Sequence[StoredMask], Mapping[str, Any]], str],
    private: bool,
    force: bool,
) -> HubName:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        listing = _Listing.of(to)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        listing = None
    kept, card = ([], {}) if listing is None else _kept(to, listing, {stored.name for stored in masks}, force)
    all_masks = sorted([*kept, *masks], key=lambda stored: stored.name)
    for stored in all_masks:
        if stored.info.fingerprint != masks[0].info.fingerprint:
            raise HubMasksError(
                f"{to}: masks {stored.name!r} and {masks[0].name!r} are of two models; expected one in a repository"
            )
    files = {f"{stored.name}{SUFFIX}": encode_mask(stored.name, stored.mask, stored.info) for stored in masks}
    files[CARD_FILE] = write_card(all_masks, card).encode()
    api = HfApi()
    if listing is None:
        api.create_repo(to.repository, private=private, exist_ok=True)
    commit = api.create_commit(
        to.repository,
        [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()],
        commit_message=f"Masks: {', '.join(stored.name for stored in masks[:5])}{', ...' if masks[5:] else ''}",
        parent_commit=None if listing is None else listing.commit,
    )
    return HubName(to.repository, commit.oid)


def _kept(to: HubName, listing: "_Listing", names: set[str], force: bool) -> tuple[list[StoredMask], Mapping[str, Any]]:
    """The masks that a repository keeps when it gets masks of these names, and the front matter of its card."""
    from huggingface_hub import hf_hub_download

    others = [file for file in listing.mask_files if file.removesuffix(SUFFIX) not in names]
    replaced = [file for file in listing.mask_files if file not in others]
    _Listing(listing.commit, tuple(others)).require_masks(to)
    in_the_way = [file for file in replaced if not _is_mask(to, file, listing.commit)]
    card: Mapping[str, Any] = {}
    if CARD_FILE in listing.files:
        path = Path(hf_hub_download(to.repository, CARD_FILE, revision=listing.commit))
        card = front_matter(path.read_text(encoding="utf-8", errors="replace"))
        if card.get("library_name") != LIBRARY:
            in_the_way.append(CARD_FILE)
            card = {}
    if in_the_way and not force:
        raise HubMasksError(
            f"{to} has {' and '.join(in_the_way)}, not written by `crane masks push`; --force overwrites it"
        )
    fetched = (Path(hf_hub_download(to.repository, file, revision=listing.commit)) for file in others)
    return [read_mask(path) for path in fetched], card


@dataclass(frozen=True)
class _Listing:
    """The files of a repository at a commit."""

    commit: str
    files: tuple[str, ...]

    @classmethod
    def of(cls, source: HubName) -> "_Listing":
        from huggingface_hub import HfApi

        info = HfApi().model_info(source.repository, revision=source.revision)
        if info.sha is None:
            raise _HubFails("it does not say at which commit it is")
        return cls(info.sha, tuple(sibling.rfilename for sibling in info.siblings or ()))

    @property
    def mask_files(self) -> list[str]:
        """Those that a directory of masks is read from."""
        return [name for name in self.files if fnmatch(name, _FILES) and not fnmatch(name, _BELOW)]

    def require_masks(self, source: HubName) -> None:
        """Raise HubMasksError if something among its mask files is none; those in the cache have been seen before."""
        from huggingface_hub import try_to_load_from_cache

        for file in self.mask_files:
            cached = try_to_load_from_cache(source.repository, file, revision=self.commit)
            if not isinstance(cached, str) and not _is_mask(source, file, self.commit):
                raise HubMasksError(
                    f"{source} holds {file}, which is no mask file; expected a repository with masks and no other "
                    "safetensors files"
                )


def _is_mask(source: HubName, file: str, commit: str) -> bool:
    """Whether the header of a safetensors file is that of a mask; the file itself is not fetched."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    try:
        header = HfApi().parse_safetensors_file_metadata(source.repository, file, revision=commit)
    except SafetensorsParsingError:
        return False
    return METADATA_KEY in header.metadata


def _snapshot(source: HubName, *, local_files_only: bool = False) -> Path:
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    directory = Path(
        snapshot_download(
            source.repository,
            revision=source.revision,
            allow_patterns=_FILES,
            ignore_patterns=_BELOW,
            local_files_only=local_files_only,
        )
    )
    try:
        get_cached_repo_tree(source.repository, revision=directory.name)
    except CachedRepoTreeNotFoundError as error:  # single files were fetched; nobody knows whether there are more
        raise _HubFails("its cache holds single files of this commit only") from error
    return directory


@contextmanager
def _explained(source: HubName) -> Iterator[None]:
    """Turn errors of the Hub's library into HubMasksError for what is not there, and _HubFails for all others."""
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    # The errors of its HTTP client, whichever that is, and OSError; RuntimeError is what an upload fails with.
    failures: tuple[type[Exception], ...]
    failures = (*cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__), RuntimeError)
    try:
        yield
    except RevisionNotFoundError as error:
        raise HubMasksError(f"{source.repository} on the Hub has no revision {source.revision!r}") from error
    except RepositoryNotFoundError as error:
        raise HubMasksError(
            f"{source.repository} is not on the Hub, or not open to this account; a token is taken from HF_TOKEN, or "
            "from `hf auth login`"
        ) from error
    except failures as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _HubFails(reason[:_SHOWN]) from error
