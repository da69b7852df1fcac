"""Downloads from a server on this machine: resumed, checked, unpacked safely, clear about what went wrong."""

from __future__ import annotations

import hashlib
import io
import re
import socket
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import write_oasis_folder

from pairdiff_core.data import fetch
from pairdiff_core.data.fetch import FetchError, Remote
from pairdiff_core.data.lung250m import find_lung250m, load_lung250m_pairs
from pairdiff_core.data.oasis import load_oasis_pairs
from pairdiff_core.pairs import DataError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
PAYLOAD = bytes(range(256)) * 4000  # a megabyte


class Server(ThreadingHTTPServer):
    """Serves one file, as well or badly as a test asks for, and remembers what was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.payload = PAYLOAD
        self.files: dict[str, bytes] = {}  # by path; any other path gets the payload
        self.breaks_after: list[int] = []  # the first requests break off after so many bytes of the file
        self.ranges = True
        self.status = 200
        self.requests: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/file.tar"

    def remote(self) -> Remote:
        return Remote(self.url, f"md5:{hashlib.md5(self.payload).hexdigest()}", "file.tar")


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append({**self.headers, "Path": self.path.lstrip("/")})
        data, start = self.server.files.get(self.path.lstrip("/"), self.server.payload), 0
        if self.server.status != 200:
            self.send_error(self.server.status)
            return
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and self.server.ranges:
            start = int(asked[1])
            if start >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        end = max(start, self.server.breaks_after.pop(0)) if self.server.breaks_after else len(data)
        self.wfile.write(data[start:end])
        self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(fetch, "WAIT_SECONDS", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------ downloads


def test_download(server: Server, tmp_path: Path) -> None:
    path = fetch.fetch(server.remote(), tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "file.tar"
    assert path.read_bytes() == PAYLOAD
    assert files(path.parent) == ["file.tar"]
    assert server.requests[0]["User-Agent"].startswith("pairdiff/")


def test_what_is_there_is_not_downloaded_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.tar").write_bytes(PAYLOAD)  # as a person would put it there by hand
    assert fetch.fetch(server.remote(), tmp_path).read_bytes() == PAYLOAD
    assert server.requests == []


def test_a_broken_transfer_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    """Whole chunks are kept: 4 of 300,000 bytes' worth, 10 of 700,000 bytes' worth."""
    server.breaks_after = [300_000, 700_000]
    assert fetch.fetch(server.remote(), tmp_path).read_bytes() == PAYLOAD
    starts = [4 * fetch.CHUNK_BYTES, 10 * fetch.CHUNK_BYTES]
    assert [request.get("Range") for request in server.requests] == [
        None,
        *(f"bytes={start}-" for start in starts),
    ]


def test_a_later_run_goes_on_where_an_earlier_one_gave_up(server: Server, tmp_path: Path) -> None:
    server.breaks_after = [300_000] * 3
    with pytest.raises(FetchError, match="broke off"):
        fetch.fetch(server.remote(), tmp_path)
    received = (tmp_path / "file.tar.part").stat().st_size
    assert 200_000 < received <= 300_000
    assert not (tmp_path / "file.tar").exists()
    server.requests.clear()
    assert fetch.fetch(server.remote(), tmp_path).read_bytes() == PAYLOAD
    assert [request.get("Range") for request in server.requests] == [f"bytes={received}-"]
    assert files(tmp_path) == ["file.tar"]


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.breaks_after = [300_000]
    assert fetch.fetch(server.remote(), tmp_path).read_bytes() == PAYLOAD


def test_a_complete_part_needs_no_more_bytes(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.tar.part").write_bytes(PAYLOAD)
    assert fetch.fetch(server.remote(), tmp_path).read_bytes() == PAYLOAD


def test_a_part_of_another_file_starts_over(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.tar.part").write_bytes(PAYLOAD + b"longer")
    assert fetch.fetch(server.remote(), tmp_path).read_bytes() == PAYLOAD


def test_a_wrong_hash(server: Server, tmp_path: Path) -> None:
    remote = server.remote()
    server.payload = PAYLOAD[:-1] + b"?"
    with pytest.raises(FetchError) as error:
        fetch.fetch(remote, tmp_path)
    for part in (remote.url, remote.hash.removeprefix("md5:"), str(tmp_path / "file.tar"), "By hand"):
        assert part in str(error.value)
    assert files(tmp_path) == []  # nothing wrong is kept, so the next run starts from nothing
    server.payload = PAYLOAD
    assert fetch.fetch(remote, tmp_path).read_bytes() == PAYLOAD


def test_a_wrong_hash_keeps_the_file_that_was_there(server: Server, tmp_path: Path) -> None:
    remote = server.remote()
    (tmp_path / "file.tar").write_bytes(b"an older release")
    server.payload = b"a captive portal"
    with pytest.raises(FetchError, match="hash"):
        fetch.fetch(remote, tmp_path)
    assert (tmp_path / "file.tar").read_bytes() == b"an older release"


@pytest.mark.parametrize("status", [403, 404, 500])
def test_a_refusal(server: Server, tmp_path: Path, status: int) -> None:
    server.status = status
    remote = server.remote()
    with pytest.raises(FetchError) as error:
        fetch.fetch(remote, tmp_path)
    for part in (
        f"answered {status}",
        remote.url,
        remote.hash.removeprefix("md5:"),
        str(tmp_path / "file.tar"),
    ):
        assert part in str(error.value)
    assert len(server.requests) == 1  # asking again would not help
    assert files(tmp_path) == []


def test_offline(server: Server, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/file.tar"
        remote = Remote(url, "md5:c9ae5864f250c7e4b8d83a104e51ae8e", "file.tar")
        with pytest.raises(FetchError) as error:
            fetch.fetch(remote, tmp_path)
    for part in (url, "md5 is c9ae5864f250c7e4b8d83a104e51ae8e", str(tmp_path / "file.tar"), "no connection"):
        assert part in str(error.value)


def test_a_target_that_cannot_be_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("in the way")
    with pytest.raises(FetchError, match="could not be written"):
        fetch.fetch(server.remote(), tmp_path / "folder")
    assert (tmp_path / "folder").read_text() == "in the way"


# ------------------------------------------------------------------------------------------ unpacking


def archive(path: Path, members: list[tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w") as tar:
        for member in members:
            if member.isfile():
                member.size = 4
            tar.addfile(member, io.BytesIO(b"text") if member.isfile() else None)
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("top", ["", "neurite/", "./"])
def test_unpack(tmp_path: Path, top: str) -> None:
    tar = archive(tmp_path / "a.tar", [member(f"{top}subjects.txt"), member(f"{top}one/slice.nii.gz")])
    folder = fetch.unpack(tar, tmp_path / "deep" / "slices", must_hold="subjects.txt")
    assert (folder / "subjects.txt").read_bytes() == (folder / "one" / "slice.nii.gz").read_bytes() == b"text"
    assert files(tmp_path / "deep") == ["slices"]


@pytest.mark.parametrize(
    "evil",
    [
        member("../evil"),
        member("one/../../evil"),
        member("..\\evil"),
        member("/evil"),
        member("C:/evil"),
        member("link", tarfile.SYMTYPE, "../.."),
        member("link", tarfile.SYMTYPE, "/"),
        member("link", tarfile.LNKTYPE, "../../evil"),
        member("pipe", tarfile.FIFOTYPE),
        member("device", tarfile.CHRTYPE),
    ],
    ids=lambda info: f"{info.name}-{info.type.decode()}-{info.linkname}",
)
def test_a_malicious_archive_is_refused_whole(tmp_path: Path, evil: tarfile.TarInfo) -> None:
    place = tmp_path / "a" / "b"
    place.mkdir(parents=True)
    tar = archive(tmp_path / "a.tar", [member("subjects.txt"), evil, member("link/evil")])
    with pytest.raises(FetchError, match="a.tar was not unpacked") as error:
        fetch.unpack(tar, place / "slices", must_hold="subjects.txt")
    assert repr(evil.name) in str(error.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "a.tar", "b"]


def test_a_truncated_archive(tmp_path: Path) -> None:
    tar = archive(tmp_path / "a.tar", [member("subjects.txt"), member("one"), member("two")])
    tar.write_bytes(tar.read_bytes()[:1600])
    with pytest.raises(FetchError, match="a.tar could not be unpacked"):
        fetch.unpack(tar, tmp_path / "slices", must_hold="subjects.txt")
    assert files(tmp_path) == ["a.tar"]


def test_something_that_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_text("<html>")
    with pytest.raises(FetchError, match="a.tar could not be unpacked"):
        fetch.unpack(tmp_path / "a.tar", tmp_path / "slices", must_hold="subjects.txt")


def test_another_archive(tmp_path: Path) -> None:
    tar = archive(tmp_path / "a.tar", [member("readme"), member("one/slice")])
    with pytest.raises(FetchError, match="holds no subjects.txt"):
        fetch.unpack(tar, tmp_path / "slices", must_hold="subjects.txt")
    assert files(tmp_path) == ["a.tar"]


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "slices").mkdir()
    (tmp_path / "slices" / "mine").write_text("work")
    tar = archive(tmp_path / "a.tar", [member("subjects.txt")])
    with pytest.raises(FetchError, match="Move it away"):
        fetch.unpack(tar, tmp_path / "slices", must_hold="subjects.txt")
    assert files(tmp_path / "slices") == ["mine"]


# ---------------------------------------------------------------------------------------------- OASIS


def test_fetch_oasis2d(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = write_oasis_folder(tmp_path / "made", subjects=4, slices=("S00",))
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(made, arcname="neurite-oasis.2d.v1.0")
    server.payload = packed.getvalue()

    folder = fetch.fetch_oasis2d(tmp_path / "data", remote=server.remote())
    assert folder == tmp_path / "data" / "neurite-oasis.2d.v1.0"
    assert "OASIS Data Use Agreement" in capsys.readouterr().out
    assert len(load_oasis_pairs(folder, "train")) == 2

    server.requests.clear()
    assert fetch.fetch_oasis2d(tmp_path / "data", remote=server.remote()) == folder
    assert server.requests == []
    assert capsys.readouterr().out == ""


# --------------------------------------------------------------------------------------- Lung250M-4B


@pytest.fixture
def lungs(server: Server, lung_folder: Path) -> tuple[Remote, ...]:
    """A small data set on the server, and the list of its files."""
    server.files = {
        path.relative_to(lung_folder).as_posix(): path.read_bytes()
        for path in sorted(lung_folder.rglob("*.*"))
    }
    base = server.url.removesuffix("file.tar")
    return tuple(
        Remote(f"{base}{path}", f"sha256:{hashlib.sha256(data).hexdigest()}", path)
        for path, data in server.files.items()
    )


def asked(server: Server) -> list[str]:
    return [request["Path"] for request in server.requests]


def test_fetch_lung250m(
    server: Server, lungs: tuple[Remote, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fetch.fetch_lung250m(tmp_path / "data", remotes=lungs)
    assert folder == tmp_path / "data" / "lung250m"
    assert files(tmp_path / "data") == ["lung250m"]
    printed = capsys.readouterr()
    assert "Cite Falta et al." in printed.out
    assert printed.err.count("100%") == 1 and f"{len(lungs)}/{len(lungs)}" in printed.err  # one bar
    assert "Downloading" not in printed.err
    assert len(load_lung250m_pairs(find_lung250m(tmp_path / "data"), "train", spatial=(64, 52, 64))) == 3

    server.requests.clear()
    assert fetch.fetch_lung250m(tmp_path / "data", remotes=lungs) == folder
    assert server.requests == [] and capsys.readouterr().out == ""


def test_an_interrupted_lung_download_goes_on(
    server: Server, lungs: tuple[Remote, ...], tmp_path: Path
) -> None:
    """What came is kept; the folder has its name only when it is complete."""
    server.breaks_after = [10**6, 10**6, *[10] * fetch.ATTEMPTS]  # the third file breaks off
    with pytest.raises(FetchError, match="broke off") as error:
        fetch.fetch_lung250m(tmp_path / "data", remotes=lungs)
    for part in (lungs[2].url, lungs[2].hash.removeprefix("sha256:"), fetch.LUNG_COMMIT, "lung250m.part"):
        assert part in str(error.value)
    assert files(tmp_path / "data") == ["lung250m.part"]
    with pytest.raises(DataError):
        find_lung250m(tmp_path / "data")
    server.requests.clear()
    folder = fetch.fetch_lung250m(tmp_path / "data", remotes=lungs)
    assert asked(server) == [remote.file_name for remote in lungs[2:]]
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")} == set(server.files)


def test_only_a_broken_lung_file_is_fetched_again(
    server: Server, lungs: tuple[Remote, ...], tmp_path: Path
) -> None:
    folder = fetch.fetch_lung250m(tmp_path, remotes=lungs)
    server.requests.clear()
    (folder / lungs[1].file_name).write_bytes(b"half of it")
    (folder / "mine.txt").write_text("notes")
    fetch.fetch_lung250m(tmp_path, remotes=lungs)
    assert asked(server) == [lungs[1].file_name]
    assert (folder / lungs[1].file_name).read_bytes() == server.files[lungs[1].file_name]
    assert (folder / "mine.txt").read_text() == "notes"


def test_lungs_from_a_captive_portal(server: Server, lungs: tuple[Remote, ...], tmp_path: Path) -> None:
    server.files = {}
    with pytest.raises(FetchError, match="hash is not.*Or all at once"):
        fetch.fetch_lung250m(tmp_path / "data", remotes=lungs)
    assert [path for path in (tmp_path / "data").rglob("*") if path.is_file()] == []


def test_the_list_of_lung_files() -> None:
    remotes = fetch.lung250m_files()
    by_path = {remote.file_name: remote for remote in remotes}
    assert len(by_path) == len(remotes) == 81
    for number, name in ((20, "dilated_vessels_10"), (54, "dilated_vessels_ts"), (5, "corrfieldTr")):
        assert sum(path.startswith(f"{name}/case_") for path in by_path) == number
    landmarks = by_path["lms_validation_cropped.pth"]
    assert landmarks.url == (
        "https://raw.githubusercontent.com/multimodallearning/UnleashingRegistration/"
        "cd1fce1ca3214fc731d72cbd7d7cfb89f8d808c5/lms_validation_cropped.pth"
    )
    assert all(re.fullmatch("sha256:[0-9a-f]{64}", remote.hash) for remote in remotes)


@pytest.mark.skipif(
    not (SHARED / "lung250m").is_dir(), reason="no ../shared/data/lung250m beside this checkout"
)
def test_the_hashes_are_those_of_the_real_files() -> None:
    """All but the landmarks: those at hand are of the validation cases only."""
    present = [
        remote for remote in fetch.lung250m_files() if (SHARED / "lung250m" / remote.file_name).is_file()
    ]
    assert len(present) >= 61
    for remote in present:
        digest = hashlib.sha256((SHARED / "lung250m" / remote.file_name).read_bytes()).hexdigest()
        assert remote.hash == f"sha256:{digest}" or remote.file_name == "lms_validation_cropped.pth"


def test_the_address_of_oasis() -> None:
    assert fetch.OASIS2D.url.startswith("https://surfer.nmr.mgh.harvard.edu/ftp/data/neurite/data/")
    assert fetch.OASIS2D.url.endswith(f"/{fetch.OASIS2D.file_name}")
    assert fetch.OASIS2D.hash == "md5:c9ae5864f250c7e4b8d83a104e51ae8e"
