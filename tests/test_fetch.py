"""Downloads from a server on this machine: checked, resumed between files, unpacked safely, clear about errors."""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import socket
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import write_oasis_folder

from pairdiff_core.data import fetch
from pairdiff_core.data.lung250m import find_lung250m, load_lung250m_pairs
from pairdiff_core.data.oasis import load_oasis_pairs
from pairdiff_core.errors import DataError, FetchError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
OASIS = "neurite-oasis.2d.v1.0"


class Server(ThreadingHTTPServer):
    """Serves files by their path, correctly or with the faults that a test asks for, and records the requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.whole = 10**6  # answers before one breaks off
        self.requests: list[str] = []
        self.agents: set[str] = set()
        self.url = f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.lstrip("/")
        self.server.requests.append(path)
        self.server.agents.add(self.headers["User-Agent"])
        if path not in self.server.files:
            self.send_error(404)
            return
        data = self.server.files[path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.server.whole -= 1
        self.wfile.write(data if self.server.whole >= 0 else data[: len(data) // 2])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(fetch, "RETRIES", 0)  # pooch waits a second before each
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    monkeypatch.setattr(fetch, "OASIS_SITE", server.url)
    monkeypatch.setattr(fetch, "LUNG_SITE", server.url)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------- OASIS


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.fixture
def offer(server: Server, monkeypatch: pytest.MonkeyPatch):
    """Puts an archive of OASIS on the server, with the right hash: bytes, or members of four bytes each."""

    def put(content: bytes | list[tarfile.TarInfo]) -> None:
        if isinstance(content, list):
            packed = io.BytesIO()
            with tarfile.open(fileobj=packed, mode="w") as tar:
                for info in content:
                    info.size = 4 if info.isfile() else 0
                    tar.addfile(info, io.BytesIO(b"text") if info.isfile() else None)
            content = packed.getvalue()
        server.files = {f"{OASIS}.tar": content}
        monkeypatch.setattr(fetch, "OASIS_HASH", f"md5:{hashlib.md5(content).hexdigest()}")

    return put


def test_fetch_oasis2d(server: Server, offer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = write_oasis_folder(tmp_path / "made", subjects=4, slices=("S00",))
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(made, arcname=OASIS)
    offer(packed.getvalue())

    folder = fetch.fetch_oasis2d(tmp_path / "data")
    assert folder == tmp_path / "data" / OASIS and files(folder.parent) == [OASIS, f"{OASIS}.tar"]
    printed = capsys.readouterr()
    assert "OASIS Data Use Agreement" in printed.out and "100%" in printed.err
    assert len(load_oasis_pairs(folder, "train")) == 2
    assert all(agent.startswith("pairdiff/") for agent in server.agents)

    server.requests.clear()
    assert fetch.fetch_oasis2d(tmp_path / "data") == folder
    assert server.requests == [] and capsys.readouterr().out == ""
    shutil.rmtree(folder)
    assert fetch.fetch_oasis2d(tmp_path / "data") == folder  # from the archive that is there
    assert server.requests == []


@pytest.mark.parametrize("top", ["", "neurite/", "./"])
def test_the_archive_may_hold_a_folder_or_not(offer, tmp_path: Path, top: str) -> None:
    (tmp_path / f"{OASIS}.part").mkdir()
    (tmp_path / f"{OASIS}.part" / "rest").write_text("of an interrupted call")
    offer([member(f"{top}subjects.txt"), member(f"{top}one/slice.nii.gz")])
    folder = fetch.fetch_oasis2d(tmp_path, progress=False)
    assert (folder / "subjects.txt").read_bytes() == (folder / "one" / "slice.nii.gz").read_bytes() == b"text"
    assert files(folder) == ["one", "subjects.txt"] and files(tmp_path) == [OASIS, f"{OASIS}.tar"]


@pytest.mark.parametrize(
    "evil",
    [
        member("../evil"),
        member("one/../../evil"),
        member("link", tarfile.SYMTYPE, "../.."),
        member("link", tarfile.SYMTYPE, "/"),
        member("link", tarfile.LNKTYPE, "../../evil"),
        member("pipe", tarfile.FIFOTYPE),
        member("device", tarfile.CHRTYPE),
    ],
    ids=lambda info: f"{info.name}-{info.type.decode()}-{info.linkname}",
)
def test_a_malicious_archive_is_refused_whole(offer, tmp_path: Path, evil: tarfile.TarInfo) -> None:
    offer([member("subjects.txt"), evil, member("link/evil")])
    with pytest.raises(FetchError, match=r"\.tar was not unpacked") as error:
        fetch.fetch_oasis2d(tmp_path / "a" / "b", progress=False)
    assert repr(evil.name) in str(error.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", f"{OASIS}.tar"]


def test_an_absolute_path_stays_in_the_folder(offer, tmp_path: Path) -> None:
    offer([member("subjects.txt"), member(f"{tmp_path}/evil")])
    fetch.fetch_oasis2d(tmp_path, progress=False)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("content", [b"<html>", [member("readme"), member("one/slice")]])
def test_another_archive(offer, tmp_path: Path, content: bytes | list[tarfile.TarInfo]) -> None:
    offer(content)
    with pytest.raises(FetchError, match=r"\.tar was not unpacked.*Delete it"):
        fetch.fetch_oasis2d(tmp_path, progress=False)
    assert files(tmp_path) == [f"{OASIS}.tar"]


def test_a_folder_in_use_is_left_alone(server: Server, tmp_path: Path) -> None:
    (tmp_path / OASIS).mkdir()
    (tmp_path / OASIS / "mine").write_text("work")
    with pytest.raises(FetchError, match="Move it away"):
        fetch.fetch_oasis2d(tmp_path)
    assert files(tmp_path / OASIS) == ["mine"] and server.requests == []


def fails(folder: Path, reason: str) -> None:
    """Fetching OASIS fails with one error that says why, and how to do it by hand."""
    with pytest.raises(FetchError, match=reason) as error:
        fetch.fetch_oasis2d(folder, progress=False)
    algorithm, value = fetch.OASIS_HASH.split(":")
    for part in (fetch.OASIS_SITE, f"{algorithm} is {value}", str(folder / f"{OASIS}.tar"), "By hand"):
        assert part in str(error.value)


def test_a_wrong_hash(server: Server, offer, tmp_path: Path) -> None:
    """No wrong file is kept, and an existing one is replaced only by a right one."""
    offer([member("subjects.txt")])
    right = server.files[f"{OASIS}.tar"]
    server.files[f"{OASIS}.tar"] = b"a captive portal"
    fails(tmp_path, "hash")
    assert files(tmp_path) == []
    (tmp_path / f"{OASIS}.tar").write_bytes(b"an older release")
    fails(tmp_path, "hash")
    assert (tmp_path / f"{OASIS}.tar").read_bytes() == b"an older release"
    server.files[f"{OASIS}.tar"] = right
    assert files(fetch.fetch_oasis2d(tmp_path, progress=False)) == ["subjects.txt"]


def test_a_refusal(server: Server, tmp_path: Path) -> None:
    fails(tmp_path, "404")
    assert files(tmp_path) == []


def test_offline(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        monkeypatch.setattr(fetch, "OASIS_SITE", f"http://127.0.0.1:{unused.getsockname()[1]}/")
        fails(tmp_path, "no connection")


def test_a_transfer_that_breaks_off_is_tried_again(
    server: Server, offer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer([member("subjects.txt")])
    server.whole = 0
    fails(tmp_path, "interrupted")
    assert files(tmp_path) == []
    monkeypatch.setattr(fetch, "RETRIES", 1)
    handle = Handler.do_GET

    def recovering(handler: Handler) -> None:
        handle(handler)
        handler.server.whole = 1  # from the second request on

    monkeypatch.setattr(Handler, "do_GET", recovering)
    server.whole = 0
    assert files(fetch.fetch_oasis2d(tmp_path, progress=False)) == ["subjects.txt"]


def test_a_target_that_cannot_be_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("in the way")
    fails(tmp_path / "folder", "folder")
    assert (tmp_path / "folder").read_text() == "in the way"


# --------------------------------------------------------------------------------------- Lung250M-4B


@pytest.fixture
def lungs(server: Server, lung_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A small data set on the server; the paths of its files."""
    paths = [path.relative_to(lung_folder).as_posix() for path in sorted(lung_folder.rglob("*.*"))]
    server.files = {path: (lung_folder / path).read_bytes() for path in paths}
    registry = tmp_path / "registry.txt"
    registry.write_text("".join(f"{path} {hashlib.sha256(server.files[path]).hexdigest()}\n" for path in paths))
    monkeypatch.setattr(fetch, "LUNG_REGISTRY", registry)
    return paths


def test_fetch_lung250m(server: Server, lungs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fetch.fetch_lung250m(tmp_path / "data")
    assert folder == tmp_path / "data" / "lung250m"
    assert files(tmp_path / "data") == ["lung250m"]
    printed = capsys.readouterr()
    assert "Cite Falta et al." in printed.out
    assert printed.err.count("\n") == 1 and f"{len(lungs)}/{len(lungs)}" in printed.err  # one bar
    assert "Downloading" not in printed.err
    assert len(load_lung250m_pairs(find_lung250m(tmp_path / "data"), "train", spatial=(64, 52, 64))) == 3

    server.requests.clear()
    assert fetch.fetch_lung250m(tmp_path / "data") == folder
    assert server.requests == [] and capsys.readouterr().out == ""


def test_an_interrupted_lung_download_goes_on(server: Server, lungs: list[str], tmp_path: Path) -> None:
    """Finished files are kept; the folder gets its final name only when it is complete."""
    server.whole = 2  # the third file breaks off
    with pytest.raises(FetchError, match="interrupted") as error:
        fetch.fetch_lung250m(tmp_path / "data", progress=False)
    value = hashlib.sha256(server.files[lungs[2]]).hexdigest()
    for part in (server.url + lungs[2], f"sha256 is {value}", fetch.LUNG_COMMIT, "lung250m.part"):
        assert part in str(error.value)
    assert files(tmp_path / "data") == ["lung250m.part"]
    with pytest.raises(DataError):
        find_lung250m(tmp_path / "data")
    server.requests.clear()
    server.whole = 10**6
    folder = fetch.fetch_lung250m(tmp_path / "data", progress=False)
    assert server.requests == lungs[2:]
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")} == set(lungs)


def test_only_a_broken_or_new_lung_file_is_fetched(server: Server, lungs: list[str], tmp_path: Path) -> None:
    folder = fetch.fetch_lung250m(tmp_path / "data", progress=False)
    server.requests.clear()
    (folder / lungs[1]).write_bytes(b"half of it")
    (folder / "mine.txt").write_text("notes")
    server.files["corrfieldTr/case_000.csv"] = b"1,2,3,4,5,6\n"
    with fetch.LUNG_REGISTRY.open("a") as registry:
        registry.write(f"corrfieldTr/case_000.csv {hashlib.sha256(b'1,2,3,4,5,6' + bytes([10])).hexdigest()}\n")
    assert fetch.fetch_lung250m(tmp_path / "data", progress=False) == folder
    assert server.requests == [lungs[1], "corrfieldTr/case_000.csv"]
    assert (folder / lungs[1]).read_bytes() == server.files[lungs[1]]
    assert (folder / "mine.txt").read_text() == "notes"


def test_motions_of_patients_without_vessels_can_be_left_out(server: Server, lungs: list[str], tmp_path: Path) -> None:
    server.files["corrfieldTr/case_000.csv"] = b"1,2,3,4,5,6\n"
    with fetch.LUNG_REGISTRY.open("a") as registry:
        registry.write(f"corrfieldTr/case_000.csv {hashlib.sha256(b'1,2,3,4,5,6' + bytes([10])).hexdigest()}\n")
    folder = fetch.fetch_lung250m(tmp_path / "data", progress=False, motions=False)
    assert sorted(path.name for path in (folder / "corrfieldTr").iterdir()) == ["case_036.csv"]
    fetch.fetch_lung250m(tmp_path / "data", progress=False)
    assert (folder / "corrfieldTr" / "case_000.csv").is_file()


def test_lungs_from_a_captive_portal(server: Server, lungs: list[str], tmp_path: Path) -> None:
    server.files = dict.fromkeys(lungs, b"<html>")
    with pytest.raises(FetchError, match="hash.*Or all at once"):
        fetch.fetch_lung250m(tmp_path / "data", progress=False)
    assert [path for path in (tmp_path / "data").rglob("*") if path.is_file()] == []


# ------------------------------------------------------------------------------------ the real data sets


def published_lungs() -> dict[str, str]:
    return dict(line.split() for line in fetch.LUNG_REGISTRY.read_text().splitlines())


def test_the_list_of_lung_files() -> None:
    published = published_lungs()
    for name, number in (("dilated_vessels_10", 20), ("dilated_vessels_ts", 54)):
        assert sum(path.startswith(f"{name}/case_") for path in published) == number
    assert "lms_validation_cropped.pth" in published
    assert sum(path.startswith("corrfieldTr/case_") for path in published) == 79
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in published.values())


@pytest.mark.skipif(not (SHARED / "lung250m").is_dir(), reason="no ../shared/data/lung250m beside this checkout")
def test_the_hashes_are_those_of_the_real_files() -> None:
    """All but the landmarks: the local file has those of the validation cases only."""
    present = {path: SHARED / "lung250m" / path for path in published_lungs()}
    digests = {path: hashlib.sha256(file.read_bytes()).hexdigest() for path, file in present.items() if file.is_file()}
    assert len(digests) >= 61
    wrong = [path for path, digest in digests.items() if digest != published_lungs()[path]]
    assert wrong in ([], ["lms_validation_cropped.pth"])
