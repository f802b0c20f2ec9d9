"""The trace that a call belongs to, as its caller says in the metadata (W3C Trace Context, https://www.w3.org/TR/trace-context/).

    info = context.trace            # of a call; None: its caller says nothing, or what can't be read
    trace.current()                 # of the call that is handled here
    ttrpc.Client(address, interceptors=[trace.forward])

We have no spans of our own: what came is passed on as it is, so what we call appears below our caller's span.

Which call is handled is kept for each thread (_reaper.switch) and, under asyncio, in `calling`. A thread that a handler starts
itself handles none.
"""

from __future__ import annotations

import os
from _contextvars import ContextVar

from ._reaper import handled

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

PARENT_KEY = "traceparent"
STATE_KEY = "tracestate"
# OpenTelemetry's names for them in an environment.
PARENT_ENV = "TRACEPARENT"
STATE_ENV = "TRACESTATE"

_HEX = "0123456789abcdef"  # in lower case alone
_PARENT_LENGTH = 55
_LENGTHS = [2, 32, 16, 2]
# Of a tracestate: members, and bytes of one: a key of 256, "=", and a value of 256.
_MEMBERS_MAX = 32
_MEMBER_MAX = 513

# asyncio's: the trace of the call that is handled in this context. Not its Context: tasks that outlive the call would keep its
# connection.
calling: ContextVar[Trace | None] = ContextVar("shimcore.trace.calling", default=None)


class Trace:
    """trace_id: 32 hex digits. span_id: 16, of the caller's span. flags: 0 to 255. parent: the traceparent to pass on; state: the
    tracestate to pass on, "" for none."""

    __slots__ = ("flags", "parent", "span_id", "state", "trace_id")

    def __init__(self, trace_id: str, span_id: str, flags: int, parent: str, state: str) -> None:
        self.trace_id = trace_id
        self.span_id = span_id
        self.flags = flags
        self.parent = parent
        self.state = state

    def __repr__(self) -> str:
        return f"Trace({self.parent!r}, {self.state!r})"

    @property
    def sampled(self) -> bool:
        """Whether the caller may have recorded its span."""
        return bool(self.flags & 1)

    @property
    def metadata(self) -> list[tuple[str, str]]:
        """The pairs for a ttrpc call."""
        return [(PARENT_KEY, self.parent)] + ([(STATE_KEY, self.state)] if self.state else [])


def parse(parent: str, state: str = "") -> Trace | None:
    """A traceparent and a tracestate; None when the former is none. Of a version after 00 the first four fields count, and what
    is passed on is version 00 with their `sampled` bit, as section 3.2.4 has it. A tracestate that is none is left out."""
    fields = parent[:_PARENT_LENGTH].split("-")
    if [len(field) for field in fields] != _LENGTHS or "".join(fields).strip(_HEX):
        return None
    version, trace_id, span_id, flags = fields
    rest = parent[_PARENT_LENGTH:]
    if version == "ff" or (rest and (version == "00" or rest[0] != "-")):
        return None
    if not trace_id.strip("0") or not span_id.strip("0"):
        return None
    number = int(flags, 16)
    if version != "00":
        parent = f"00-{trace_id}-{span_id}-{number & 1:02x}"
    members = [member for member in (one.strip(" \t") for one in state.split(",")) if member]
    state = ",".join(members)
    # What is not printable can't stand in an environment (NUL) or in a line (newline).
    if len(members) > _MEMBERS_MAX or any(len(member) > _MEMBER_MAX for member in members):
        state = ""
    if not (state.isascii() and state.isprintable()):
        state = ""
    return Trace(trace_id, span_id, number, parent, state)


def of(metadata: Iterable[tuple[str, str]]) -> Trace | None:
    """The trace in a call's metadata. More than one traceparent is none: nobody knows which of them is the caller's."""
    parents: list[str] = []
    states: list[str] = []
    for key, value in metadata:
        key = key.lower()
        if key == PARENT_KEY:
            parents.append(value)
        elif key == STATE_KEY:
            states.append(value)
    return parse(parents[0], ",".join(states)) if len(parents) == 1 else None


def current() -> Trace | None:
    """The trace of the call that is handled here; None outside of calls, and where there is none."""
    call = handled()
    found: Trace | None = calling.get() if call is None else call.trace
    return found


def environ(env: Mapping[str, str] | None = None) -> Mapping[str, str]:
    """An environment (None: our own) with the current trace as TRACEPARENT and TRACESTATE; where there is none, that
    environment itself."""
    base = os.environ if env is None else env
    found = current()
    if found is None:
        return base
    # A TRACESTATE that was there belongs to another TRACEPARENT.
    made = {key: value for key, value in base.items() if key != STATE_ENV}
    made[PARENT_ENV] = found.parent
    if found.state:
        made[STATE_ENV] = found.state
    return made


def forward(outgoing: Any, proceed: Callable[[Any], Any]) -> Any:
    """An interceptor for the clients of shimcore.ttrpc and shimcore.ttrpc.aio: calls carry the current trace, unless they have a
    traceparent already."""
    found = current()
    if found is not None and all(key != PARENT_KEY for key, _ in outgoing.metadata):
        outgoing.metadata = [pair for pair in outgoing.metadata if pair[0] != STATE_KEY] + found.metadata
    return proceed(outgoing)
