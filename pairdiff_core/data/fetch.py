"""Downloads that are checked, resumed and unpacked safely, and that say what to do by hand when they fail."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

import pooch
import requests
from tqdm.auto import tqdm

from pairdiff_core import __version__
from pairdiff_core.data.lung250m import LUNG_FOLDER
from pairdiff_core.data.oasis import OASIS_FOLDER

USER_AGENT = f"pairdiff/{__version__}"  # the neurite server refuses the default ones of some libraries
CHUNK_BYTES = 1 << 16
TIMEOUT_SECONDS = 30
ATTEMPTS = 3  # without a single new byte
WAIT_SECONDS = 2.0  # before the second attempt, twice that before the third


class FetchError(RuntimeError):
    """A download or its unpacking failed; the message says how to do it by hand."""


@dataclass(frozen=True)
class Remote:
    """A file to download.

    Attributes:
        url: where it is.
        hash: what it must be, ``algorithm:hexadecimal`` such as ``md5:c9ae...`` or ``sha256:...``.
        file_name: what it is called here.
    """

    url: str
    hash: str
    file_name: str


OASIS2D = Remote(
    url=f"https://surfer.nmr.mgh.harvard.edu/ftp/data/neurite/data/{OASIS_FOLDER}.tar",
    hash="md5:c9ae5864f250c7e4b8d83a104e51ae8e",
    file_name=f"{OASIS_FOLDER}.tar",
)
OASIS_TERMS = (
    "neurite-oasis is derived from OASIS-1. By downloading it you accept the OASIS Data Use Agreement "
    "(https://sites.wustl.edu/oasisbrains/). Cite Hoopes et al. (MELBA 2022) and Marcus et al. (2007)."
)
LUNG_REPOSITORY = "multimodallearning/UnleashingRegistration"
LUNG_COMMIT = "cd1fce1ca3214fc731d72cbd7d7cfb89f8d808c5"
LUNG_TERMS = (
    "The lung vessels are derived from Lung250M-4B, research data. Cite Falta et al., Lung250M-4B: A Combined 3D "
    "Dataset for CT- and Point Cloud-Based Intra-Patient Lung Registration (NeurIPS 2023)."
)


def fetch_oasis2d(to: str | Path, *, remote: Remote = OASIS2D, progress: bool = True) -> Path:
    """Download and unpack neurite-oasis 2D (24 MB, 414 subjects) unless it is there already.

    Args:
        to: folder to put it in; set PAIRDIFF_DATA to the same.
        remote: the archive; another one is only of use for a mirror.
        progress: whether to show a bar.

    Returns:
        The folder with the slices, ``to/neurite-oasis.2d.v1.0``.

    Raises:
        FetchError: if it cannot be had; the message gives address, hash and target folder.
    """
    folder = Path(to).expanduser() / OASIS_FOLDER
    if (folder / "subjects.txt").is_file():
        return folder
    print(OASIS_TERMS)
    archive = fetch(remote, folder.parent, progress=progress)
    return unpack(archive, folder, must_hold="subjects.txt")


def lung250m_files() -> tuple[Remote, ...]:
    """The published lung vessels, landmarks and correspondences: 81 files, at one commit, with their SHA-256."""
    registry = (
        resources.files("pairdiff_core.data").joinpath("lung250m_registry.txt").read_text(encoding="utf-8")
    )
    base = f"https://raw.githubusercontent.com/{LUNG_REPOSITORY}/{LUNG_COMMIT}"
    rows = [line.split() for line in registry.splitlines()]
    return tuple(Remote(f"{base}/{path}", f"sha256:{digest}", path) for path, digest in rows)


def fetch_lung250m(to: str | Path, *, remotes: Sequence[Remote] | None = None, progress: bool = True) -> Path:
    """Download the lung vessels (12 MB, 10 training, 17 validation and 10 test pairs), as far as they are not there.

    A file that is there with the right hash is not fetched again, a broken one is. Until all is there the folder is
    called ``lung250m.part``, so that half a data set is never taken for a whole one; the next call goes on with it.

    Args:
        to: folder to put them in; set PAIRDIFF_DATA to the same.
        remotes: the files, ``file_name`` being the path below the folder; others are only of use for a mirror.
        progress: whether to show a bar.

    Returns:
        The folder with the volumes, ``to/lung250m``.

    Raises:
        FetchError: if a file cannot be had; the message gives address, hash and target, and how to get all by hand.
    """
    folder = Path(to).expanduser() / LUNG_FOLDER
    remotes = lung250m_files() if remotes is None else remotes
    working = folder if folder.exists() else folder.with_name(f"{LUNG_FOLDER}.part")
    if not all((working / remote.file_name).is_file() for remote in remotes):
        print(LUNG_TERMS)
    log = pooch.get_logger()
    level = log.level
    log.setLevel("WARNING")  # else two lines a file
    try:
        for remote in tqdm(remotes, desc=LUNG_FOLDER, unit="file", disable=not progress):
            target = working / remote.file_name
            fetch(replace(remote, file_name=target.name), target.parent, progress=False)
    except FetchError as error:
        raise FetchError(
            f"{error} Or all at once: download https://github.com/{LUNG_REPOSITORY}/archive/{LUNG_COMMIT}.zip, unpack "
            f"it as {working}, and run this again."
        ) from error
    finally:
        log.setLevel(level)
    return working.rename(folder)  # changes nothing if it was there before


def fetch(remote: Remote, folder: str | Path, *, progress: bool = True) -> Path:
    """Download a file into ``folder`` unless it is there already with the right hash; returns its path.

    An interrupted download leaves ``<file_name>.part`` and goes on from there next time. A file that is there
    with another hash is only replaced when the new one is complete and right. ``progress`` shows a bar over its bytes.

    Raises:
        FetchError: if the file cannot be had, or is not what the hash says.
    """
    folder = Path(folder).expanduser()
    target = folder / remote.file_name
    try:
        pooch.retrieve(
            url=remote.url,
            known_hash=remote.hash,
            fname=remote.file_name,
            path=folder,
            downloader=ResumingDownloader(target.with_name(f"{target.name}.part"), progress),
        )
    except requests.RequestException as error:
        raise FetchError(
            f"{remote.url} could not be downloaded ({_reason(error)}). {_by_hand(remote, folder)}"
        ) from error
    except OSError as error:
        raise FetchError(f"{target} could not be written ({error}). {_by_hand(remote, folder)}") from error
    except ValueError as error:  # pooch's word for a wrong hash
        raise FetchError(
            f"What {remote.url} sends is not the file that was expected, its hash is not {remote.hash}; it "
            f"was thrown away. Try once more, in case the transfer was disturbed. {_by_hand(remote, folder)}"
        ) from error
    return target


def _reason(error: requests.RequestException) -> str:
    """The error in few words: the HTTP answer where there was one, else the kind of failure."""
    if error.response is not None:
        return f"the server answered {error.response.status_code} {error.response.reason}"
    return f"{type(error).__name__}: no connection, or it broke off"


def _by_hand(remote: Remote, folder: Path) -> str:
    algorithm, _, value = remote.hash.rpartition(":")
    return (
        f"By hand: download {remote.url} with a browser, check that its {algorithm or 'sha256'} is "
        f"{value}, save it as {folder / remote.file_name}, and run this again."
    )


class ResumingDownloader:
    """A downloader for pooch that goes on where an earlier attempt broke off (HTTP Range).

    Args:
        partial: file that collects the bytes until all are there.
        progress: whether to show a bar.
    """

    def __init__(self, partial: Path, progress: bool = True) -> None:
        self.partial, self.progress = partial, progress

    def __call__(self, url: str, output_file: str, pooch: Any, check_only: bool = False) -> None:
        """Download ``url`` into ``output_file`` (pooch then checks its hash).

        Raises:
            requests.RequestException: if the server refuses, or no new byte came in ATTEMPTS attempts.
        """
        failures = 0
        while True:
            before = self._received()
            try:
                self._continue(url)
                break
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError):
                failures = 1 if self._received() > before else failures + 1
                if failures >= ATTEMPTS:
                    raise
                time.sleep(WAIT_SECONDS * failures)
        shutil.move(self.partial, output_file)

    def _received(self) -> int:
        return self.partial.stat().st_size if self.partial.exists() else 0

    def _continue(self, url: str) -> None:
        """Append what is missing; an answer without Range support starts over."""
        received = self._received()
        # identity: a range of a compressed transfer would not be a range of the file
        headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
        if received:
            headers["Range"] = f"bytes={received}-"
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
            if response.status_code == requests.codes.requested_range_not_satisfiable and received:
                if response.headers.get("Content-Range", "") == f"bytes */{received}":
                    return  # all was there already
                self.partial.unlink()  # longer than the file: of something else
                raise requests.ConnectionError("the partial download does not fit the file", response=None)
            response.raise_for_status()
            resumed = response.headers.get("Content-Range", "").startswith(f"bytes {received}-")
            if response.status_code != requests.codes.partial_content or not resumed:
                received = 0
            length = response.headers.get("Content-Length")
            total = received + int(length) if length else None
            with (
                self.partial.open("ab" if received else "wb") as file,
                tqdm(
                    total=total,
                    initial=received,
                    unit="B",
                    unit_scale=True,
                    desc=self.partial.stem,
                    disable=not self.progress,
                ) as bar,
            ):
                for chunk in response.iter_content(CHUNK_BYTES):
                    file.write(chunk)
                    bar.update(len(chunk))
        if total is not None and self._received() < total:
            raise requests.ConnectionError(f"only {self._received()} of {total} bytes came")


def unpack(archive: str | Path, folder: str | Path, *, must_hold: str) -> Path:
    """Unpack a tar archive as ``folder``, all of it or nothing; returns ``folder``.

    It is unpacked beside ``folder`` and renamed when complete. If all lies in one folder inside the archive,
    that one becomes ``folder``.

    Args:
        archive: a tar file, compressed or not.
        folder: must not exist yet, or be empty.
        must_hold: a file that has to be in it, as a sign that this is the right archive.

    Raises:
        FetchError: if the archive is damaged, holds anything but files and folders below its root, or lacks
            ``must_hold``; or if ``folder`` is in use.
    """
    archive, folder = Path(archive), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FetchError(f"{folder} exists, but holds no {must_hold}. Move it away and run this again.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        root = Path(temporary) / "unpacked"
        root.mkdir()
        try:
            with tarfile.open(archive) as tar:
                for member in tar:
                    _refuse_unsafe(member, archive)
                # Python before 3.11.4 has no filter; what it would refuse was refused above
                tar.extractall(root, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        except (tarfile.TarError, EOFError, OSError) as error:
            raise FetchError(
                f"{archive} could not be unpacked ({error}). Delete it and fetch it again."
            ) from error
        inside = list(root.iterdir())
        if len(inside) == 1 and inside[0].is_dir():
            root = inside[0]
        if not (root / must_hold).is_file():
            raise FetchError(
                f"{archive} holds no {must_hold}: it is another archive. Delete it and fetch it again."
            )
        if folder.exists():
            folder.rmdir()
        root.rename(folder)
    return folder


def _refuse_unsafe(member: tarfile.TarInfo, archive: Path) -> None:
    """Raise FetchError for a member that is not a plain file or folder below the root of the archive."""
    path = PurePosixPath(member.name.replace("\\", "/"))
    outside = path.is_absolute() or ".." in path.parts or (path.parts and path.parts[0].endswith(":"))
    if outside or not (member.isfile() or member.isdir()):
        raise FetchError(
            f"{archive} was not unpacked: its member {member.name!r} is a link, a device or a path that "
            "leads out of the folder. Delete the archive and fetch it from its own site."
        )
