"""binary:// loggers, under the stock shim and ours, and what a logger may do wrong."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from shimcore.errors import DeadlineExceeded, InvalidArgument, ShimError, Unknown
from shimcore.oci import binlog
from shimcore.rig import Rig, Session
from shimcore.testing.leaks import state
from tests.faults import until

STOCK = Path("/usr/bin/containerd-shim-runc-v2")

LOGGER = """#!/bin/sh
echo "$CONTAINER_ID $CONTAINER_NAMESPACE $*" >{folder}/called
echo $$ >{folder}/pid
env | cut -d= -f1 | sort >{folder}/env
exec 5>&-
cat <&3 >{folder}/stdout &
cat <&4 >{folder}/stderr
wait
touch {folder}/ended
"""


@pytest.fixture(params=["stock", "ours"])
def rig(request: pytest.FixtureRequest, rootfs: Path) -> Iterator[Rig]:
    if request.param == "stock":
        shim = STOCK
        if not shim.exists():
            pytest.skip(f"{shim} is not installed")
    else:
        shim = request.getfixturevalue("shim_dir") / "containerd-shim-runc-v2-py"
    with Rig(shim, rootfs=rootfs) as rig:
        yield rig


@pytest.fixture
def ours(shim_dir: Path, rootfs: Path) -> Iterator[Rig]:
    with Rig(shim_dir / "containerd-shim-runc-v2-py", rootfs=rootfs) as rig:
        yield rig


def script(folder: Path, text: str = LOGGER) -> str:
    """The URI of a logger that runs this script."""
    path = folder / "logger"
    path.write_text(text.format(folder=folder))
    path.chmod(0o755)
    return f"binary://{path}"


def said(folder: Path, name: str) -> bytes:
    path = folder / name
    return path.read_bytes() if path.exists() else b""


def create(session: Session, uri: str, *, terminal: bool = False) -> None:
    session.task.create(
        str(session.bundle.path), stdout=uri, stderr="" if terminal else uri, terminal=terminal, options=session.rig.options
    )


def test_output_goes_to_the_logger(rig: Rig, tmp_path: Path) -> None:
    container = rig.container(["sh", "-c", "echo out; echo err >&2; exit 3"])
    create(container, script(tmp_path) + "?one=1&two=a%20b+c")
    assert (tmp_path / "called").read_text() in (
        f"{container.id} {rig.namespace} one 1 two a b c\n", f"{container.id} {rig.namespace} two a b c one 1\n",
    )  # fmt: skip
    container.start()
    assert container.wait() == 3
    until(lambda: (said(tmp_path, "stdout"), said(tmp_path, "stderr")) == (b"out\n", b"err\n"))
    container.delete()


def test_delete_waits_until_the_logger_has_it_all(ours: Rig, tmp_path: Path) -> None:
    container = ours.container(["sh", "-c", "seq 1 20000"])
    create(container, script(tmp_path, LOGGER.replace("wait\n", "wait\nsleep 0.3\n")))
    container.start()
    assert container.wait() == 0
    container.task.delete()
    assert (tmp_path / "ended").exists()
    assert (tmp_path / "stdout").read_text().split() == [str(number) for number in range(1, 20001)]
    assert {"CONTAINER_ID", "CONTAINER_NAMESPACE"} <= set((tmp_path / "env").read_text().split()) <= {
        "CONTAINER_ID", "CONTAINER_NAMESPACE", "PWD", "OLDPWD", "SHLVL", "_",
    }  # fmt: skip
    container.end()


def test_execs_have_loggers_of_their_own(ours: Rig, tmp_path: Path) -> None:
    container = ours.container(["sleep", "100"])
    container.create()
    container.start()
    uri = script(tmp_path)
    process = {"args": ["sh", "-c", "echo from an exec"], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}}
    container.task.exec("logged", process, stdout=uri, stderr=uri)
    container.task.start("logged")
    assert container.task.wait("logged").exit_status == 0
    container.task.delete("logged")
    assert (tmp_path / "stdout").read_text() == "from an exec\n"
    assert (tmp_path / "called").read_text().startswith(f"logged {ours.namespace}")
    container.task.kill(9)
    container.wait()
    container.delete()


def test_a_terminals_output_goes_to_the_logger(ours: Rig, tmp_path: Path) -> None:
    container = ours.container(["sh", "-c", "echo a line"], terminal=True)
    create(container, script(tmp_path), terminal=True)
    container.start()
    assert container.wait() == 0
    container.delete()
    assert (said(tmp_path, "stdout"), said(tmp_path, "stderr")) == (b"a line\r\n", b"")


# red: `check` left out of take_terminal: the one that ends late goes unseen
@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("#!/bin/sh\nexit 4\n", Unknown, "has ended, with status 4"),
        ("#!/bin/sh\nexec 5>&-; exec sleep 0.001\n", Unknown, "has ended, with status 0"),
        ("#!/nonexistent\n", Unknown, "can't be started"),
    ],
    ids=["at once", "when it was ready", "no interpreter"],
)
def test_E8_a_logger_that_ends_early_fails_the_create(
    ours: Rig, tmp_path: Path, text: str, error: type[ShimError], words: str
) -> None:
    container = ours.container(["sleep", "100"])
    with pytest.raises(error, match=words):
        create(container, script(tmp_path, text))
    container.end()


def test_a_logger_that_is_never_ready_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binlog, "READY_TIMEOUT", 0.1)
    before = os.listdir("/proc/self/fd")
    uri = script(tmp_path, "#!/bin/sh\necho $$ >{folder}/pid\nexec sleep 100\n")
    with pytest.raises(DeadlineExceeded, match=r"was not ready within 0\.1 s"):
        binlog.Logger(uri, "id", "ns")
    assert state(int((tmp_path / "pid").read_text())) == ""
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_logger_that_does_not_end_is_killed_in_the_end(tmp_path: Path) -> None:
    logger = binlog.Logger(script(tmp_path, "#!/bin/sh\nexec 5>&-\nexec sleep 100\n"), "id", "ns")
    for fd in (logger.stdout, logger.stderr):
        os.close(fd)
    assert not logger.ended()
    logger.close()
    assert logger.ended()
    logger.close()


def test_one_that_was_killed_under_a_container_ends_nothing(ours: Rig, tmp_path: Path) -> None:
    container = ours.container(["sh", "-c", "trap '' PIPE; while :; do echo x; sleep 0.01; done"])
    create(container, script(tmp_path))
    container.start()
    until(lambda: said(tmp_path, "stdout"))
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert container.task.state().status == 2  # RUNNING
    container.task.kill(9)
    assert container.wait() == 137
    container.delete()


@pytest.mark.parametrize(
    ("uri", "argv"),
    [
        ("binary:///bin/log", ["/bin/log"]),
        ("binary:///bin/a%20log?", ["/bin/a log"]),
        ("binary:///bin/a+log", ["/bin/a+log"]),
        ("binary:///bin/log?a=1&b=&c&a=2", ["/bin/log", "a", "1", "b", "", "c", ""]),
        ("binary:///bin/log?k=%C3%A4%3D+x#fragment", ["/bin/log", "k", "ä= x"]),
    ],
)
def test_uris(uri: str, argv: list[str]) -> None:
    assert binlog.parse(uri) == argv


@pytest.mark.parametrize(
    "uri", ["binary://", "binary://bin/log", "binary:///x%00", "binary:///x?a=%0", "binary:///x?a=%zz", "binary:///x?a=%00"]
)
def test_what_is_no_logger(uri: str) -> None:
    with pytest.raises(InvalidArgument):
        binlog.parse(uri)
