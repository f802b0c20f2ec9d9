"""A whole shim: it runs the process of the bundle's config.json as it is, with no container around it.

Install it with   python -m shimcore.install --dest DIR --runtime-id io.containerd.skeleton.v1 skeleton:Skeleton
"""

import os

from google.protobuf.empty_pb2 import Empty

from shimcore import Shim, Task, errors, run, spawn, util
from shimcore._reaper import OPENED, RUNNING, TOLD
from shimcore._reaper import spawn as spawn_process
from shimcore.protos import events_pb2 as events
from shimcore.protos import task_pb2 as api
from shimcore.publisher import TOPIC_CREATE, TOPIC_DELETE, TOPIC_START


class SkeletonTask(Task):
    native = True  # State, Wait and Connect come from the exit table

    def __init__(self, publisher, exit):
        self.publisher = publisher
        self.core = publisher.core
        self.exit = exit

    def slot(self, request):
        found = self.core.find(request.id, request.exec_id)
        if found is None:
            raise errors.NotFound(f"container {request.id} not found")
        return found

    def create(self, request, context):
        constant = api.StateResponse(id=request.id, bundle=request.bundle, stdout=request.stdout, stderr=request.stderr)
        slot = self.core.open(request.id, constant.SerializeToString())
        slot.cookie = request
        self.publisher.publish(TOPIC_CREATE, events.TaskCreate(container_id=request.id, bundle=request.bundle))
        return api.CreateTaskResponse()

    def command(self, bundle, spec):
        return spec["process"]["args"], spec["process"].get("cwd")

    def start(self, request, context):
        slot = self.slot(request)
        spec = util.read_spec(slot.cookie.bundle)
        process = spec["process"]
        argv, cwd = self.command(slot.cookie.bundle, spec)
        env = dict(item.split("=", 1) for item in process.get("env", []))
        outputs = {1: slot.cookie.stdout, 2: slot.cookie.stderr}
        # O_RDWR: a FIFO opens at once, whether or not its reader is there.
        fds = {fd: os.open(path, os.O_RDWR | os.O_CLOEXEC) for fd, path in outputs.items() if path}
        try:
            pid, pidfd = spawn_process(argv, env=env, cwd=cwd, fds=fds, new_session=True)
        except OSError as error:
            raise errors.InvalidArgument(f"{argv[0]}: {error.strerror}") from None
        finally:
            for fd in fds.values():
                os.close(fd)
        os.close(pidfd)
        slot.bind(pid)
        slot.set_status(RUNNING)
        started = events.TaskStart(container_id=request.id, pid=pid)
        slot.announce(TOPIC_START, "containerd.events.TaskStart", started.SerializeToString())
        return api.StartResponse(pid=pid)

    def kill(self, request, context):
        self.slot(request).kill(request.signal)
        return Empty()

    def delete(self, request, context):
        slot = self.slot(request)
        if slot.phase == OPENED:
            slot.drop()  # created, never started
        elif slot.phase != TOLD:
            raise errors.FailedPrecondition("cannot delete a running process")
        answer = api.DeleteResponse(pid=slot.pid, exit_status=slot.exit_status)
        answer.exited_at.FromNanoseconds(slot.exited_at)
        deleted = events.TaskDelete(container_id=request.id, pid=slot.pid, exit_status=slot.exit_status)
        self.publisher.publish(TOPIC_DELETE, deleted)
        slot.forget()
        return answer

    def shutdown(self, request, context):
        if not self.core.slots():
            self.exit.signal()
        return Empty()


class Skeleton(Shim):
    def start_shim(self, opts):
        _, address = spawn(opts, opts.id)
        return address

    def create_task_service(self, publisher):
        return SkeletonTask(publisher, self.exit)


if __name__ == "__main__":
    run("io.containerd.skeleton.v1", Skeleton)
