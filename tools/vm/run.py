"""The tests that want cgroup v2 alone, in a small Debian guest: python tools/vm/run.py [pytest's arguments]

qemu, with KVM where there is one, else emulated; Debian's cloud kernel, not installed here but taken from its package; a root
made by debootstrap, with runc and crun; this tree and its virtual environment as they are. Kernel and root are kept below
build/vm, and made anew when what they consist of has changed. Writes the console to build/vm/console, and the result to the page
that --page names.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "vm"
PACKAGES = "python3,runc,crun,busybox-static,iproute2,procps,strace,containerd,criu"
TESTS = [
    "tests/vm", "tests/trials/test_f.py", "tests/trials/test_a3.py", "tests/test_cgroup.py", "tests/test_oci_stats.py",
    "tests/test_oci_option_effects.py", "tests/test_conform.py",
]  # fmt: skip
# In this order: each needs those before it.
MODULES = ("virtio_pci", "virtio_blk", "ext4", "crc32c_generic")
SECONDS = 1800.0
BEGIN, END = "<!-- vm -->", "<!-- end of vm -->"

INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /root
/bin/busybox mount -t devtmpfs none /dev
for module in {modules}; do /bin/busybox insmod /modules/$module || echo "no $module"; done
n=0
while [ ! -b /dev/vdb ] && [ $n -lt 100 ]; do /bin/busybox sleep 0.1; n=$((n+1)); done
/bin/busybox mount -t ext4 /dev/vda /root || exec /bin/busybox poweroff -f
/bin/busybox mkdir -p "/root{tree}"
/bin/busybox mount -t ext4 /dev/vdb "/root{tree}" || exec /bin/busybox poweroff -f
/bin/busybox mount --move /dev /root/dev
exec /bin/busybox switch_root /root "{tree}/tools/vm/guest" "{tree}" {arguments}
"""


def run(*command: str | Path, **kwargs: object) -> str:
    return subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True, **kwargs).stdout  # type: ignore[call-overload, no-any-return]


def recipe() -> str:
    """What the guest is made by: another one, another guest."""
    return hashlib.sha256(repr((PACKAGES, MODULES)).encode()).hexdigest()


def kernel() -> tuple[Path, Path]:
    """(image, folder of its modules)."""
    folder = BUILD / f"kernel-{recipe()[:12]}"
    if not folder.exists():
        depends = run("apt-cache", "depends", "linux-image-cloud-amd64")
        found = re.search(r"Depends: (linux-image-\S+)", depends)
        if not found:
            raise SystemExit("apt knows no linux-image-cloud-amd64: run apt-get update")
        fresh = BUILD / "kernel.new"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        run("apt-get", "-q", "download", found[1], cwd=fresh)
        (package,) = fresh.glob("*.deb")
        run("dpkg-deb", "-x", package, fresh)
        package.unlink()
        fresh.rename(folder)
    (image,) = (folder / "boot").glob("vmlinuz-*")
    (modules,) = (folder / "lib" / "modules").iterdir()
    return image, modules


def needed(modules: Path) -> list[Path]:
    """MODULES and what they need, each behind what it needs itself; what is built in has no file."""
    files = {path.name.partition(".")[0].replace("-", "_"): path for path in modules.rglob("*.ko*")}
    found: list[Path] = []

    def add(name: str) -> None:
        path = files.get(name.replace("-", "_"))
        if path is None or path in found:
            return
        names = run("modinfo", "-F", "depends", path).strip() if shutil.which("modinfo") else _depends(path)
        for other in filter(None, names.split(",")):
            add(other)
        found.append(path)

    for name in MODULES:
        add(name)
    return found


def _depends(path: Path) -> str:
    found = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
    return found[1].decode() if found else ""


def initramfs(modules: Path, arguments: list[str]) -> Path:
    folder = BUILD / "initramfs"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "bin").mkdir(parents=True)
    (folder / "modules").mkdir()
    shutil.copy(shutil.which("busybox") or "/bin/busybox", folder / "bin" / "busybox")
    files = needed(modules)
    for path in files:
        shutil.copy(path, folder / "modules")
    words = " ".join("'" + word.replace("'", "'\\''") + "'" for word in arguments)
    init = folder / "init"
    init.write_text(INIT.format(modules=" ".join(path.name for path in files), tree=ROOT, arguments=words))
    init.chmod(0o755)
    out = BUILD / "initramfs.cpio"
    names = "\n".join(str(path.relative_to(folder)) for path in sorted(folder.rglob("*")))
    with open(out, "wb") as file:
        subprocess.run(["busybox", "cpio", "-o", "-H", "newc"], input=names.encode(), stdout=file, cwd=folder, check=True)
    return out


def disk(name: str, folder: Path, mebibytes: int) -> Path:
    out = BUILD / f"{name}.ext4"
    out.unlink(missing_ok=True)
    run("mke2fs", "-q", "-t", "ext4", "-d", folder, out, f"{mebibytes}M")
    return out


def root() -> Path:
    stamp, out = BUILD / "root.stamp", BUILD / "root.ext4"
    if out.exists() and stamp.exists() and stamp.read_text() == recipe():
        return out
    folder = BUILD / "root"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    release = re.search(r"VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text())
    print("making the guest's root", flush=True)
    with open(BUILD / "debootstrap.log", "w") as log:
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}"]
        command += [release[1] if release else "bookworm", str(folder)]
        if subprocess.run(command, stdout=log, stderr=log).returncode:
            raise SystemExit(f"debootstrap has failed: {BUILD / 'debootstrap.log'}")
    disk("root", folder, 1500)
    shutil.rmtree(folder)
    stamp.write_text(recipe())
    return out


def tree() -> Path:
    """This tree, without what is only built here."""
    folder = BUILD / "tree"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pack = ["tar", "-C", str(ROOT), "--exclude=./build", "--exclude=./.git", "--exclude=__pycache__", "-cf", "-", "."]
    with subprocess.Popen(pack, stdout=subprocess.PIPE) as tar:
        subprocess.run(["tar", "-C", str(folder), "-xf", "-"], stdin=tar.stdout, check=True)
    out = disk("tree", folder, 800)
    shutil.rmtree(folder)
    return out


def boot(image: Path, start: Path, disks: list[Path]) -> tuple[str, float]:
    """(what the console said, seconds)."""
    kvm = os.access("/dev/kvm", os.R_OK | os.W_OK) and bool(re.search(r"\b(vmx|svm)\b", Path("/proc/cpuinfo").read_text()))
    command = ["qemu-system-x86_64", "-m", "2048", "-smp", "2", "-nographic", "-no-reboot", "-nic", "none"]
    command += ["-accel", "kvm", "-cpu", "host"] if kvm else ["-accel", "tcg,thread=multi", "-cpu", "max"]
    command += ["-kernel", str(image), "-initrd", str(start)]
    command += ["-append", "console=ttyS0 quiet panic=-1"]
    for path in disks:
        command += ["-drive", f"file={path},if=virtio,format=raw,snapshot=on"]
    print(f"booting ({'KVM' if kvm else 'emulated'})", flush=True)
    began = time.monotonic()
    with open(BUILD / "console", "wb") as console:
        machine = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT)
        try:
            machine.wait(SECONDS)
        except subprocess.TimeoutExpired:
            print(f"it has not ended within {SECONDS:.0f} s", flush=True)
        finally:
            machine.kill()
            machine.wait()
    return (BUILD / "console").read_text(errors="replace").replace("\r", ""), time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, help="a Markdown file between whose marks the result is written")
    parser.add_argument("arguments", nargs="*", help="pytest's")
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    arguments = ["-v", "-rs", *(options.arguments or TESTS)]
    image, modules = kernel()
    said, seconds = boot(image, initramfs(modules, arguments), [root(), tree()])
    lines = said[max(said.find("guest: "), 0) :].splitlines()
    print(*lines[-60:], sep="\n")
    ended = re.search(r"guest: pytest ended with (\d+)", said)
    if options.page and ended:
        page = options.page.read_text()
        before, _, rest = page.partition(BEGIN)
        options.page.write_text(before + BEGIN + "\n" + table(lines, seconds) + END + rest.partition(END)[2])
    if not ended:
        print(f"the guest has not come to its end: {BUILD / 'console'}")
        return 1
    return int(ended[1])


def table(lines: list[str], seconds: float) -> str:
    """A line for each file: what passed, failed, and was skipped."""
    counts: dict[str, dict[str, int]] = {}
    for line in lines:
        found = re.match(r"(\S+\.py)::\S.* (PASSED|FAILED|ERROR|SKIPPED)", line)
        if found:
            row = counts.setdefault(found[1], {"PASSED": 0, "FAILED": 0, "ERROR": 0, "SKIPPED": 0})
            row[found[2]] += 1
    out = [lines[0].removeprefix("guest: ") + f"; {seconds:.0f} s in all.", ""]
    out += ["| tests | passed | failed | skipped |", "|---|---|---|---|"]
    for name, row in counts.items():
        out.append(f"| `{name}` | {row['PASSED']} | {row['FAILED'] + row['ERROR']} | {row['SKIPPED']} |")
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    sys.exit(main())
