"""A shim whose containers are WebAssembly modules: args[0] is a .wasm file in the root filesystem, which the module sees as "/".

Each module runs in a process of its own, so it is killed, waited for and reaped as any other. That process is this file, run as a
program. It needs wasmtime (`pip install wasmtime`). What else a shim must do, skeleton.py does.

Install it with   python -m shimcore.install --dest DIR --runtime-id io.containerd.wasm.v1 wasm:Wasm
"""

import os
import sys

TRAPPED = 134  # the status of a module that traps: 128 + SIGABRT, as of a program that aborts


def main(root, module, *arguments):
    from wasmtime import Engine, ExitTrap, Linker, Module, Store, Trap, WasiConfig, WasmtimeError

    config = WasiConfig()
    config.argv = [module, *arguments]
    config.env = list(os.environ.items())
    config.inherit_stdin()
    config.inherit_stdout()
    config.inherit_stderr()
    config.preopen_dir(root, "/")
    engine = Engine()
    store = Store(engine)
    store.set_wasi(config)
    linker = Linker(engine)
    linker.define_wasi()
    try:
        code = Module.from_file(engine, os.path.join(root, module.lstrip("/")))
        linker.instantiate(store, code).exports(store)["_start"](store)
    except ExitTrap as end:
        return end.code
    except (Trap, WasmtimeError, KeyError) as error:
        print(f"{module}: {error}", file=sys.stderr)
        return TRAPPED
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

from skeleton import Skeleton, SkeletonTask  # noqa: E402  # not in the module's own process

from shimcore import errors  # noqa: E402
from shimcore.mount import mount_rootfs, umount_recursive  # noqa: E402


class WasmTask(SkeletonTask):
    def create(self, request, context):
        for mount in request.rootfs:
            mount_rootfs(mount.type, mount.source, mount.options, os.path.join(request.bundle, "rootfs"))
        return super().create(request, context)

    def command(self, bundle, spec):
        root = os.path.join(bundle, spec["root"]["path"])
        module = spec["process"]["args"][0]
        if not os.path.isfile(os.path.join(root, module.lstrip("/"))):
            raise errors.NotFound(f"no module {module} in the root filesystem")
        return [sys.executable, "-I", __file__, root, *spec["process"]["args"]], root

    def delete(self, request, context):
        bundle = self.slot(request).cookie.bundle
        answer = super().delete(request, context)
        umount_recursive(os.path.join(bundle, "rootfs"))
        return answer


class Wasm(Skeleton):
    def create_task_service(self, publisher):
        return WasmTask(publisher, self.exit)
