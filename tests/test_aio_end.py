"""shimcore.aio where no RPC thread serves: setup, the end, and what is under way then or at an upgrade."""

from __future__ import annotations

import signal
from pathlib import Path

from shimcore.rig import Events
from tests.aio_authors import EXITS, INSIDE, Shims, gone, shim
from tests.authors import author
from tests.upgrades import command

__all__ = ["author", "shim"]


def test_jobs_and_exits_in_setup_and_cleanup(shim: Shims) -> None:
    made = shim(
        EXITS
        + """
    class Author(Author):
        async def all(self, id):
            done = await aio.run_job(["echo", id], timeout=60)
            pid = self.task.make(id)
            self.task.exit(pid)
            return done.output, await aio.exited(self.core.find(id))
        async def setup(self):
            self.task.said.append(await self.all("one"))
        async def cleanup(self):
            with open("said", "w") as file:
                file.write(repr(await self.all("two")))
    """
    )
    with Events(Path(made.ttrpc)):
        address = made.start()
        assert made.look(address, "task.said") == [(b"one\n", 137)]
        gone(made, address)
    assert (made.bundle / "said").read_text() == repr((b"two\n", 137))


def test_a_signal_in_setup_is_told(shim: Shims) -> None:
    made = shim("""
        class Service(Service):
            async def on_signal(self, signum):
                self.said.append(signum)
                self.shim.told.set()
        class Author(Author):
            async def setup(self):
                self.told = asyncio.Event()
                os.kill(os.getpid(), 2)
                await self.told.wait()
    """)
    assert made.look(made.start(), "task.said") == [signal.SIGINT]


HOOKED = (
    EXITS
    + """
        async def on_exit(self, slot):
            await self.until_told()
            with open("said", "a") as file:
                file.write(slot.container_id + " ")
"""
)


def test_hooks_end_before_cleanup(shim: Shims) -> None:
    made = shim(
        EXITS
        + """
        async def on_exit(self, slot):
            self.shim.inside.set()
            while self.shim._loop._ending is None:
                await asyncio.sleep(0)
            done = await aio.run_job(["echo", "hook"], timeout=60)
            with open("said", "ab") as file:
                file.write(done.output)
    class Author(Author):
        async def cleanup(self):
            with open("said", "a") as file:
                file.write("cleanup")
    """
    )
    with Events(Path(made.ttrpc)):
        address = made.start()
        made.look(address, "task.exit(task.make('c1'))")
        assert made.look(address, INSIDE)
        gone(made, address)
    assert (made.bundle / "said").read_text() == "hook\ncleanup"


def test_an_upgrade_waits_for_hooks(shim: Shims) -> None:
    made = shim(
        HOOKED
        + """
        def hand_over(self, trial):
            return {}
        def take_over(self, state):
            pass
    """
    )
    with Events(Path(made.ttrpc)):
        address = made.start()
        pid = made.look(address, "os.getpid()")
        made.look(address, "task.exit(task.make('c1'))")
        assert made.look(address, INSIDE)
        done = command(str(pid), "--timeout", "1")
        assert done.returncode != 0
        assert "a hook is under way" in done.stdout + done.stderr
        made.look(address, "shim.go.set()")
        done = command(str(pid))
        assert done.returncode == 0, done.stderr
    assert (made.bundle / "said").read_text() == "c1 "
