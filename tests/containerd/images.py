"""Container images made here: an OCI image layout in a tar, which `ctr images import` takes. No registry is asked."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from pathlib import Path
from typing import Any

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
MEDIA = "application/vnd.oci.image"


def write_image(rootfs: Path, name: str, command: list[str], to: Path) -> None:
    """An image of one layer, the tree at `rootfs`, named `name`, which runs `command`."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        tar.add(rootfs, ".", filter=_as_root)
    with tarfile.open(to, "w") as tar:
        layer_of = _blob(tar, f"{MEDIA}.layer.v1.tar", layer.getvalue())
        config = {
            "architecture": ARCHITECTURES.get(platform.machine(), platform.machine()),
            "os": "linux",
            "config": {"Entrypoint": command, "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [layer_of["digest"]]},
        }
        config_of = _blob(tar, f"{MEDIA}.config.v1+json", _json(config))
        manifest = {"schemaVersion": 2, "mediaType": f"{MEDIA}.manifest.v1+json", "config": config_of, "layers": [layer_of]}
        manifest_of = _blob(tar, f"{MEDIA}.manifest.v1+json", _json(manifest))
        manifest_of["annotations"] = {"io.containerd.image.name": name}
        _file(tar, "index.json", _json({"schemaVersion": 2, "manifests": [manifest_of]}))
        _file(tar, "oci-layout", _json({"imageLayoutVersion": "1.0.0"}))


def _as_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _file(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def _blob(tar: tarfile.TarFile, media: str, data: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(data).hexdigest()
    _file(tar, f"blobs/sha256/{digest}", data)
    return {"mediaType": media, "digest": f"sha256:{digest}", "size": len(data)}
