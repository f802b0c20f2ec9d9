"""A containerd with its CRI plugin on, in a network namespace of its own, and what a kubelet would ask of it, through crictl.

Its pods' networks (bridge and all) are in that namespace and end with it; crictl is run in it, since exec streams over its
loopback.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

from shimcore.testing.leaks import CGROUPS
from tests.containerd.daemon import Containerd, wait_for
from tests.containerd.images import write_image

CNI = Path("/usr/lib/cni")  # Debian's containernetworking-plugins
REPO = Path(__file__).resolve().parents[2]
PAUSE, IMAGE = "localhost/pause:1", "localhost/busybox:1"
SUBNET = "10.88.44"

# handler -> (runtime type, and what stands with it from containerd 2 on)
HANDLERS: dict[str, tuple[str, dict[str, str]]] = {
    "stock": ("io.containerd.runc.v2", {}),
    "ours": ("io.containerd.runc.v2-py", {}),
    "stock-sandbox": ("io.containerd.runc.v2", {"sandboxer": "shim"}),
    "ours-sandbox": ("io.containerd.runc.v2-py", {"sandboxer": "shim"}),
    "ours-streaming": ("io.containerd.runc.v2-py", {"sandboxer": "shim", "io_type": "streaming"}),
}

# version 2 is containerd 1.6's and 1.7's.
HEAD = """\
version = {version}
root = "{root}/root"
state = "{root}/state"
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.nri.v1.nri"]
[grpc]
  address = "{root}/c.sock"
[ttrpc]
  address = "{root}/c.sock.ttrpc"
"""
CRI_2 = """\
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  netns_mounts_under_state_dir = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
    default_runtime_name = "ours"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{cni}"
    conf_dir = "{root}/cni"
"""
CRI_3 = """\
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "native"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "{pause}"
[plugins."io.containerd.cri.v1.runtime"]
  netns_mounts_under_state_dir = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "ours"
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["{cni}"]
    conf_dir = "{root}/cni"
"""


def crictl_path() -> str | None:
    """crictl on PATH, else the one that `make cri` builds."""
    return shutil.which("crictl") or shutil.which(str(REPO / "build/matrix/crictl/bin/crictl"))


def containerd_version() -> tuple[int, int]:
    said = subprocess.run(["containerd", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r" v?(\d+)\.(\d+)\.", said)
    assert found is not None, said
    return int(found[1]), int(found[2])


def config(root: Path, version: tuple[int, int]) -> str:
    newer = version >= (2, 0)
    plugin = "io.containerd.cri.v1.runtime" if newer else "io.containerd.grpc.v1.cri"
    text = (HEAD + (CRI_3 if newer else CRI_2)).format(root=root, pause=PAUSE, cni=CNI, version=3 if newer else 2)
    # As a user's file is made of it: what stands in deploy/, without its version.
    text += "".join((REPO / f"deploy/containerd-v{3 if newer else 2}.toml").read_text().splitlines(keepends=True)[3:])
    for name, (runtime, settings) in HANDLERS.items():
        if settings and not newer:
            continue
        text += f'[plugins."{plugin}".containerd.runtimes.{name}]\n  runtime_type = "{runtime}"\n'
        text += "".join(f'  {key} = "{value}"\n' for key, value in settings.items())
    return text


class Cri(Containerd):
    """parent: the cgroup below which its pods are, which the leak guard watches."""

    def __init__(self, root: Path, parent: str, path: list[Path]) -> None:
        super().__init__(root, "k8s.io", path)
        self.parent = f"/{parent}"
        self.version = containerd_version()
        self.logs = root / "logs"
        (root / "config.toml").write_text(config(root, self.version))
        (root / "cni").mkdir(exist_ok=True)
        network = {"type": "bridge", "bridge": "sct0", "isGateway": True, "ipam": {"type": "host-local"}}
        network["ipam"] = {"type": "host-local", "subnet": f"{SUBNET}.0/24", "dataDir": str(root / "ipam")}
        plugins = {"cniVersion": "0.4.0", "name": "sct", "plugins": [network]}
        (root / "cni" / "sct.conflist").write_text(json.dumps(plugins))
        inside = 'ip link set lo up && exec "$@"'
        self._argv = ["unshare", "--net", "sh", "-c", inside, "sh", *self._argv]
        self._path = os.pathsep.join([self._path, "/usr/sbin", "/sbin"])

    def bundle(self, container: str) -> Path:
        """Wherever it is: that of a sandbox by the shim is the sandbox controller's."""
        return next((self.root / "state").glob(f"*/k8s.io/{container}"), super().bundle(container))

    def start(self) -> None:
        super().start()
        # A plugin that failed would answer nothing for ever, and the log says why.
        wait_for("CRI", lambda: self.crictl("info", check=False).returncode == 0, detail=self.complaints)

    def complaints(self) -> str:
        """The last of what containerd has logged that is more than information."""
        lines = self.log.read_text().splitlines()
        return "\n".join([line for line in lines if "level=info" not in line][-12:])

    def load(self, rootfs: Path) -> None:
        """Bring in the two images."""
        for name, command in ((PAUSE, ["/bin/sleep", "1000000"]), (IMAGE, ["/bin/sh"])):
            tar = self.root / "image.tar"
            write_image(rootfs, name, command, tar)
            self.ctr("images", "import", "--no-unpack", tar)
            wait_for(f"image {name}", lambda name=name: name.rpartition(":")[0] in self.crictl("images").stdout)  # type: ignore[misc]

    def crictl(
        self, *args: str | Path, check: bool = True, timeout: float = 60.0, input: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        program = crictl_path()
        assert program is not None
        where = f"unix://{self.address}"
        command = ["nsenter", f"--net=/proc/{self.pid}/ns/net", program, "--config", str(self.root / "crictl.yaml")]
        command += ["--runtime-endpoint", where, "--image-endpoint", where, "--timeout", "30s", *map(str, args)]
        (self.root / "crictl.yaml").touch()
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, input=input or "")
        log = "" if done.returncode == 0 else self.complaints()
        assert not check or done.returncode == 0, f"{args}: {done.returncode}\n{done.stdout}{done.stderr}\n{log}"
        return done

    def ask(self, *args: str | Path) -> Any:
        """The answer of a command that can print JSON."""
        return json.loads(self.crictl(args[0], "-o", "json", *args[1:]).stdout)


class Pod:
    """A pod of one handler, in the node's network unless `network`; its containers."""

    def __init__(self, cri: Cri, handler: str, name: str, *, network: bool = False, pid: int = 1) -> None:
        """pid: the NamespaceMode of the pid namespace: 0 the pod's, 1 each container's own."""
        self.cri = cri
        self.containers: list[str] = []
        self._cgroup = f"{cri.parent}/{name}"
        self.config: dict[str, Any] = {
            "metadata": {"name": name, "namespace": "default", "uid": name, "attempt": 1},
            "log_directory": str(cri.logs / name),
            "linux": {
                "cgroup_parent": self._cgroup,
                "security_context": {"namespace_options": {"network": 0 if network else 2, "pid": pid}},
            },
        }
        if network:
            self.config |= {"hostname": "podhost", "dns_config": {"servers": ["10.0.0.53"], "searches": ["example"]}}
            self.config["linux"]["sysctls"] = {"net.ipv4.ip_unprivileged_port_start": "81"}
        (cri.logs / name).mkdir(parents=True)
        self._file = cri.root / f"{name}.json"
        self._file.write_text(json.dumps(self.config))
        self.id = cri.crictl("runp", "--runtime", handler, self._file).stdout.strip()

    def create(self, name: str, script: str) -> str:
        """A container that runs a shell's script; its id."""
        path = self.cri.root / f"{name}.container.json"
        context = {"namespace_options": self.config["linux"]["security_context"]["namespace_options"]}
        container = {
            "metadata": {"name": name},
            "image": {"image": IMAGE},
            "command": ["/bin/sh", "-c", script],
            "log_path": f"{name}.log",
            "linux": {"security_context": context},
        }
        path.write_text(json.dumps(container))
        made = self.cri.crictl("create", self.id, path, self._file).stdout.strip()
        self.containers.append(made)
        return made

    def run(self, name: str, script: str) -> str:
        made = self.create(name, script)
        self.cri.crictl("start", made)
        return made

    @property
    def state(self) -> str:
        return str(self.cri.ask("inspectp", self.id)["status"]["state"])

    def status(self, container: str) -> dict[str, Any]:
        found: dict[str, Any] = self.cri.ask("inspect", container)["status"]
        return found

    def wait(self, container: str) -> int:
        """The exit code, once there is one."""
        wait_for("exit", lambda: self.status(container)["state"] == "CONTAINER_EXITED", detail=lambda: self.status(container))
        return int(self.status(container)["exitCode"])

    def remove(self) -> None:
        for one in self.containers:
            self.cri.crictl("rm", "-f", one)
        self.cri.crictl("stopp", self.id)
        self.cri.crictl("rmp", self.id)
        self.remove_cgroup()

    def _cgroups(self) -> list[Path]:
        """Its cgroup in each hierarchy, and those below it, deepest first."""
        tops = [*CGROUPS.glob(f"*{self._cgroup}"), CGROUPS / self._cgroup[1:]]
        return [Path(path) for top in tops for path, _, _ in os.walk(top, topdown=False)]

    def remove_cgroup(self) -> None:
        # The pod's cgroup is its maker's, a kubelet's, to remove; what is not empty stays, and is found.
        for path in self._cgroups():
            if path.name == Path(self._cgroup).name:
                _rmdir(path)

    def destroy(self) -> None:
        """What a failed test has left, in spite of all."""

        def gone() -> bool:
            for path in self._cgroups():
                for pid in (path / "cgroup.procs").read_text().split():
                    os.kill(int(pid), signal.SIGKILL)
                _rmdir(path)
            return not self._cgroups()

        wait_for("end of the pod's cgroup", gone, detail=self._cgroups)


def _rmdir(path: Path) -> None:
    try:
        path.rmdir()
    except OSError:
        pass
