"""What depends on the exit thread being the leader of its process: orphans, SIGCHLD, signals, limits."""

from __future__ import annotations

import signal

from tests.scripts import script


def test_subreaper_is_read_back() -> None:
    assert script("""
        print(_reaper.get_subreaper())
        _reaper.set_subreaper(); print(_reaper.get_subreaper())
        _reaper.set_subreaper(False); print(_reaper.get_subreaper())
    """).split() == ["False", "True", "False"]


def test_nofile_is_raised_here_and_as_before_in_children() -> None:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    text = script(
        """
        import resource
        print(_reaper.raise_nofile(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        sys.stdout.flush()
        pid, pidfd = _reaper.spawn(["sh", "-c", "ulimit -n"], fds={1: 1})
        os.waitpid(pid, 0)
    """,
        preexec=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard)),
    )
    assert text == f"(200, {hard}) {hard}\n200\n"


def test_the_exit_thread_is_preferred_and_nobody_inherits_it() -> None:
    """A container that inherited it would take the cores from everybody else."""
    assert script("""
        core = _reaper.Core("ns", "")
        nice = lambda pid: os.getpriority(os.PRIO_PROCESS, pid)
        def body():
            until(lambda: nice(os.getpid()) == -20)
            child, _ = _reaper.spawn(["sleep", "100"])
            print(nice(threading.get_native_id()), nice(child))
            os.kill(child, 9)
            os.waitpid(child, 0)
        led(core, body)
    """) == "0 0\n"


def test_orphans_are_reaped_counted_and_told_to_nobody() -> None:
    script("""
        core = _reaper.Core("ns", "")
        _reaper.set_subreaper()
        core.install_signals()
        def body():
            for n in range(10):
                orphan(3)
            until(lambda: core.stats()["orphans"] == 10)
            assert core.stats()["events"] == 0 and core.take() == []
            core.tell_pids = True
            pid = orphan(4)
            assert core.notes(60)[0][:3] == (_reaper.NOTE_PID, pid, 4)
        led(core, body)
    """)


def test_without_the_subreaper_no_orphan_is_ours() -> None:
    """That the test above can fail: here none ever comes."""
    script("""
        core = _reaper.Core("ns", "")
        core.install_signals()
        def body():
            for n in range(10):
                pid = orphan(3)
                while os.path.exists(f"/proc/{pid}") and open(f"/proc/{pid}/stat").read().split(") ")[1][0] != "Z":
                    os.sched_yield()
            assert core.stats()["orphans"] == 0
        led(core, body)
    """)


def test_an_authors_subprocesses_are_not_stolen() -> None:
    script("""
        core = _reaper.Core("ns", "")
        _reaper.set_subreaper()
        core.install_signals()
        def body():
            wrong = []
            def author(number):
                for n in range(40):
                    code = (number * 40 + n) % 256
                    if subprocess.run(["sh", "-c", f"exit {code}"]).returncode != code:
                        wrong.append(code)
            authors = [threading.Thread(target=author, args=(n,)) for n in range(4)]
            for thread in authors: thread.start()
            told = 0
            for n in range(40):
                slot = core.open(f"c{n}")
                slot.bind(orphan(n))
                slot.announce()
                orphan(1)
            while told < 40:
                told += sum(note[0] == _reaper.NOTE_TOLD for note in core.notes(60))
            for thread in authors: thread.join()
            assert not wrong, wrong
            assert [core.find(f"c{n}").exit_status for n in range(40)] == list(range(40))
            until(lambda: core.stats()["orphans"] == 40)
            assert core.stats()["stolen"] == 0
        led(core, body)
    """)


def test_a_subprocess_outlives_the_thread_that_made_it() -> None:
    script("""
        core = _reaper.Core("ns", "")
        _reaper.set_subreaper()
        core.install_signals()
        def body():
            made = []
            command = ["sh", "-c", "read x; exit 7"]
            thread = threading.Thread(target=lambda: made.append(subprocess.Popen(command, stdin=subprocess.PIPE)))
            thread.start()
            thread.join()
            made[0].stdin.close()
            os.waitid(os.P_PID, made[0].pid, os.WEXITED | os.WNOWAIT)
            orphan(1)
            until(lambda: core.stats()["orphans"] == 1)
            assert made[0].wait() == 7
        led(core, body)
    """)


def test_sigchld_inherited_as_ignored() -> None:
    """What our parent ignored is ignored here, and the kernel would throw every status away."""
    script(
        """
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN
        core = _reaper.Core("ns", "")
        _reaper.set_subreaper()
        core.install_signals()
        def body():
            slot = core.open("c")
            slot.bind(orphan(9))
            slot.announce()
            assert core.notes(60)[0][1] is slot
            assert slot.exit_status == 9
            assert subprocess.run(["sh", "-c", "exit 8"]).returncode == 8
            pid, pidfd = _reaper.spawn(["cat", "/proc/self/status"], fds={1: 1})
            os.waitpid(pid, 0)
        led(core, body)
    """,
        preexec=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN),
    )


def test_without_the_reaper_sigchld_has_its_default() -> None:
    script(
        """
        core = _reaper.Core("ns", "")
        _reaper.set_subreaper()
        core.install_signals(sigchld=False)
        def body():
            assert subprocess.run(["sh", "-c", "exit 8"]).returncode == 8
            slot = core.open("c")  # what we own is waited for all the same
            slot.bind(orphan(9))
            slot.announce()
            assert core.notes(60)[0][1].exit_status == 9
            pid = orphan(1)
            until(lambda: open(f"/proc/{pid}/stat").read().split(") ")[1][0] == "Z")
            assert core.stats()["orphans"] == 0
        led(core, body)
    """,
        preexec=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN),
    )


def test_no_exit_is_lost_where_fds_run_out() -> None:
    import resource

    script(
        """
        core = _reaper.Core("ns", "")
        _reaper.set_subreaper()
        core.install_signals()
        def body():
            go = os.pipe()
            many = "i=0; while [ $i -lt 100 ]; do setsid sh -c 'read x; exit '$i <&FD >/dev/null & echo $!; i=$((i+1)); done"
            command = ["sh", "-c", many.replace("FD", str(go[0]))]
            pids = [int(word) for word in subprocess.check_output(command, pass_fds=[go[0]], text=True).split()]
            hoard = []
            try:
                while True:
                    hoard.append(os.dup(0))
            except OSError:
                pass
            for _ in range(10):
                os.close(hoard.pop())
            for n, pid in enumerate(pids):
                slot = core.open(f"c{n}")
                slot.bind(pid)
                slot.announce()
            assert core.stats()["by_number"] > 80, core.stats()
            os.close(go[1])
            told = 0
            while told < 100:
                told += sum(note[0] == _reaper.NOTE_TOLD for note in core.notes(60))
            assert [core.find(f"c{n}").exit_status for n in range(100)] == list(range(100))
            assert core.stats()["stolen"] == 0
        led(core, body)
    """,
        preexec=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)),
    )


def test_signals_come_as_notes_and_end_nothing() -> None:
    script("""
        core = _reaper.Core("ns", "")
        core.install_signals()
        def body():
            for number in signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGPIPE:
                os.kill(os.getpid(), number)
                assert core.notes(60) == [(_reaper.NOTE_SIGNAL, number)]
            try:
                _reaper.Core("x", "").install_signals()
            except RuntimeError:
                pass
            else:
                raise AssertionError("two have the handlers")
            assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])  # children inherit masks: nothing is blocked
        led(core, body)
    """)
