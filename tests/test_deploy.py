"""deploy/: the manifests parse and agree with one another, containerd takes the configuration, the script installs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from shimcore import __version__

REPO = Path(__file__).resolve().parent.parent
DEPLOY = REPO / "deploy"
SHIM = "containerd-shim-runc-v2-py"
CRI = {2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime"}


def documents(name: str) -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def runtimes(version: int) -> dict[str, Any]:
    parsed = tomllib.loads((DEPLOY / f"containerd-v{version}.toml").read_text())
    assert parsed["version"] == version
    found: dict[str, Any] = parsed["plugins"][CRI[version]]["containerd"]["runtimes"]
    return found


def containerd(version: int) -> str:
    """A containerd that knows configurations of this version: the machine's own, or one that `make matrix` has built."""
    built = sorted((REPO / "build" / "matrix").glob("v2.*/bin/containerd"), reverse=True)
    for program in [shutil.which("containerd"), *map(str, built)]:
        said = subprocess.run([program or "false", "--version"], capture_output=True, text=True).stdout
        if re.search(r" v?1\." if version == 2 else r" v?2\.", said):
            return str(program)
    pytest.skip(f"no containerd {'1.x' if version == 2 else '2.x'} here: `make matrix` builds newer ones")


def test_each_runtime_class_has_its_handler() -> None:
    classes = documents("runtimeclass.yaml")
    assert all((one["apiVersion"], one["kind"]) == ("node.k8s.io/v1", "RuntimeClass") for one in classes)
    assert {one["handler"] for one in classes} == set(runtimes(3))
    assert set(runtimes(2)) == {"shimcore"}
    pod = documents("pod.yaml")[0]
    assert pod["spec"]["runtimeClassName"] in {one["metadata"]["name"] for one in classes}


def test_the_daemonset_is_whole() -> None:
    (daemonset,) = documents("daemonset.yaml")
    assert (daemonset["apiVersion"], daemonset["kind"]) == ("apps/v1", "DaemonSet")
    template = daemonset["spec"]["template"]
    assert daemonset["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    spec = template["spec"]
    assert spec["nodeSelector"] == documents("runtimeclass.yaml")[0]["scheduling"]["nodeSelector"]
    volumes = {one["name"]: one["hostPath"]["path"] for one in spec["volumes"]}
    (install,) = spec["initContainers"]
    for mount in install["volumeMounts"]:
        assert volumes[mount["name"]] == "/" and {"name": "NODE", "value": mount["mountPath"]} in install["env"]
    images = {one["image"] for one in [install, *spec["containers"]]}
    assert images == {f"shimcore-install:{__version__}"}
    image = (DEPLOY / "Containerfile").read_text()
    assert "install.sh" in image and install["command"][-1] == "/shimcore/install.sh"
    for name in re.findall(r"^COPY (.*) /\S+$", image, re.MULTILINE)[0].split():
        assert (DEPLOY / name).is_file()


@pytest.mark.parametrize("version", [2, 3])
def test_containerd_takes_the_configuration(version: int) -> None:
    program = containerd(version)
    path = DEPLOY / f"containerd-v{version}.toml"
    dump = subprocess.run([program, "--config", str(path), "config", "dump"], capture_output=True, text=True)
    assert dump.returncode == 0, dump.stderr
    found = tomllib.loads(dump.stdout)["plugins"][CRI[version]]["containerd"]["runtimes"]
    for name, runtime in runtimes(version).items():
        # What containerd does not know it leaves out.
        assert {key: found[name].get(key) for key in runtime} == runtime, name


def wheel(folder: Path, name: str, version: str, package: str) -> None:
    """A wheel whose one file leads to `package`, lines of folders: the real one is tried by `make wheels`."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.pth", f"{package}\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def run(script: Path, tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    where = {"NODE": "", "PREFIX": f"{tmp_path}/opt", "BIN": f"{tmp_path}/bin", "CONFIG": f"{tmp_path}/etc/config.toml"}
    where["RESTART"] = f"touch {tmp_path}/restarted"
    # The node's Python is the one that the modules here were compiled for.
    where["PATH"] = f"{Path(sys.executable).resolve().parent}:{os.environ['PATH']}"
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(["sh", str(script)], capture_output=True, text=True, env={**inherited, **where, **env})


def test_the_script_installs_once(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.mkdir()
    for name in ("install.sh", "containerd-v2.toml", "containerd-v3.toml"):
        shutil.copy(DEPLOY / name, image)
    script = image / "install.sh"
    assert "no wheel" in run(script, tmp_path).stderr
    (image / "wheels").mkdir()
    wheel(image / "wheels", "shimcore", __version__, f"{REPO}\n{sysconfig.get_path('purelib')}")
    config = tmp_path / "etc/config.toml"
    config.parent.mkdir()
    config.write_text("version = 1\n")
    refused = run(script, tmp_path)
    assert refused.returncode == 1 and "containerd config migrate" in refused.stderr
    mine = 'version = 2\n[plugins."io.containerd.grpc.v1.cri"]\n  max_container_log_line_size = 12345\n'
    config.write_text(mine)
    done = run(script, tmp_path)
    assert done.returncode == 0, done.stderr
    said = subprocess.run([tmp_path / "bin" / SHIM, "-v"], capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert __version__ in said.stdout, said.stderr
    parsed = tomllib.loads(config.read_text())["plugins"][CRI[2]]
    assert parsed["max_container_log_line_size"] == 12345
    assert parsed["containerd"]["runtimes"] == runtimes(2)
    assert (tmp_path / "restarted").exists() and (tmp_path / "etc/config.toml.before-shimcore").read_text() == mine
    dump = subprocess.run([containerd(2), "--config", str(config), "config", "dump"], capture_output=True, text=True).stdout
    assert '"io.containerd.runc.v2-py"' in dump

    (tmp_path / "restarted").unlink()
    before = config.read_text()
    assert run(script, tmp_path).returncode == 0
    assert config.read_text() == before and not (tmp_path / "restarted").exists()
