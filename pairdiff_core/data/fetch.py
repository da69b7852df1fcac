"""Downloads of the real data: checked by hash, unpacked safely, and given their final name only when complete.

A file that exists with the right hash is not fetched again, and one with a wrong hash is never used. To add files to
the lung data, append lines of ``path sha256`` to ``lung250m_registry.txt``; the next call fetches the missing ones.
"""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pooch
import requests
from tqdm.auto import tqdm

from pairdiff_core import __version__
from pairdiff_core.data.lung250m import CORRESPONDENCES, LUNG_FOLDER, TRAIN_FOLDERS
from pairdiff_core.data.oasis import OASIS_FOLDER, SUBJECTS
from pairdiff_core.errors import FetchError

HEADERS = {"User-Agent": f"pairdiff/{__version__}"}  # the neurite server refuses the default of some libraries
RETRIES = 3

OASIS_SITE = "https://surfer.nmr.mgh.harvard.edu/ftp/data/neurite/data/"
OASIS_ARCHIVE = f"{OASIS_FOLDER}.tar"
OASIS_HASH = "md5:c9ae5864f250c7e4b8d83a104e51ae8e"
OASIS_TERMS = (
    "neurite-oasis is derived from OASIS-1. By downloading it you accept the OASIS Data Use Agreement "
    "(https://sites.wustl.edu/oasisbrains/). Cite Hoopes et al. (MELBA 2022) and Marcus et al. (2007)."
)
LUNG_REPOSITORY = "multimodallearning/UnleashingRegistration"
LUNG_COMMIT = "cd1fce1ca3214fc731d72cbd7d7cfb89f8d808c5"
LUNG_SITE = f"https://raw.githubusercontent.com/{LUNG_REPOSITORY}/{LUNG_COMMIT}/"
LUNG_REGISTRY = Path(__file__).with_name("lung250m_registry.txt")
LUNG_TERMS = (
    "The lung vessels are derived from Lung250M-4B, research data. Cite Falta et al., Lung250M-4B: A Combined 3D "
    "Dataset for CT- and Point Cloud-Based Intra-Patient Lung Registration (NeurIPS 2023)."
)
pooch.get_logger().setLevel("WARNING")  # otherwise two lines per file


def fetch_oasis2d(to: str | Path, *, progress: bool = True) -> Path:
    """Download and unpack neurite-oasis 2D (24 MB, 414 subjects) unless it already exists.

    Args:
        to: folder to save it in; set PAIRDIFF_DATA to the same folder.
        progress: whether to show a bar.

    Returns:
        The folder with the data, ``to/neurite-oasis.2d.v1.0``.

    Raises:
        FetchError: if the download fails; the message gives address, hash and target path for doing it by hand.
    """
    folder = Path(to).expanduser() / OASIS_FOLDER
    if (folder / SUBJECTS).is_file():
        return folder
    if folder.exists():
        raise FetchError(f"{folder} exists, but holds no {SUBJECTS}. Move it away and run this again.")
    print(OASIS_TERMS)
    registry = {OASIS_ARCHIVE: OASIS_HASH}
    files = pooch.create(folder.parent, OASIS_SITE, registry=registry, retry_if_failed=RETRIES)
    archive, part = _fetch(files, OASIS_ARCHIVE, progress), folder.with_name(f"{OASIS_FOLDER}.part")
    shutil.rmtree(part, ignore_errors=True)  # what an interrupted call left
    try:
        with tarfile.open(archive, "r:") as tar:  # not compressed
            tar.extractall(part, filter="data")  # refuses paths outside the folder, and devices
        listed = next(part.rglob(SUBJECTS), None)
        if listed is None:
            raise tarfile.TarError(f"it holds no {SUBJECTS}")
        listed.parent.rename(folder)
    except (tarfile.TarError, OSError) as error:
        raise FetchError(f"{archive} was not unpacked ({error}). Delete it and fetch it again.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def fetch_lung250m(to: str | Path, *, progress: bool = True, motions: bool = True) -> Path:
    """Download the lung vessels that are missing (12 MB in all: 10 training, 17 validation and 10 test pairs).

    With ``motions``, also download the correspondences of 74 more training patients (22 MB), for their motions.

    A new folder is called ``lung250m.part`` until it is complete, so that an incomplete data set is never used; the
    next call continues with it. Files missing from an existing folder ``lung250m`` are added. Arguments, result and
    errors are those of :func:`fetch_oasis2d`.
    """
    folder = Path(to).expanduser() / LUNG_FOLDER
    working = folder if folder.exists() else folder.with_name(f"{LUNG_FOLDER}.part")
    files = pooch.create(working, LUNG_SITE, retry_if_failed=RETRIES)
    files.load_registry(LUNG_REGISTRY)
    if not motions:
        files.registry = {name: value for name, value in files.registry.items() if not _only_a_motion(name, files)}
    if not all((working / name).is_file() for name in files.registry):
        print(LUNG_TERMS)
    try:
        for name in tqdm(files.registry, desc=LUNG_FOLDER, unit="file", disable=not progress):
            _fetch(files, name)
    except FetchError as error:
        archive = f"https://github.com/{LUNG_REPOSITORY}/archive/{LUNG_COMMIT}.zip"
        by_hand = f"Or all at once: download {archive}, unpack it as {working}, and run this again."
        raise FetchError(f"{error} {by_hand}") from error
    return working.rename(folder)  # has no effect if it already existed


def _only_a_motion(name: str, files: pooch.Pooch) -> bool:
    """Whether a file has the correspondences of a patient whose vessels are not public."""
    vessels = f"{TRAIN_FOLDERS[-1]}/{Path(name).stem}_1.nii.gz"
    return Path(name).parent.name == CORRESPONDENCES and vessels not in files.registry


def _fetch(files: pooch.Pooch, name: str, progress: bool = False) -> Path:
    """One file of a registry, downloaded unless it already exists with the right hash."""
    try:
        return Path(files.fetch(name, downloader=pooch.HTTPDownloader(progressbar=progress, headers=HEADERS)))
    except (ValueError, OSError) as error:  # a wrong hash; or the network (also an OSError) or the disk
        no_answer = isinstance(error, requests.RequestException) and error.response is None
        reason = f"no connection, or it was interrupted: {type(error).__name__}" if no_answer else error
        algorithm, _, value = files.registry[name].rpartition(":")
        raise FetchError(
            f"{files.get_url(name)} could not be downloaded ({reason}). By hand: download it with a browser, check "
            f"that its {algorithm or 'sha256'} is {value}, save it as {files.abspath / name}, and run this again."
        ) from error
