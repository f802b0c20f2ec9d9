"""ttrpc for programs that talk to a shim: a synchronous client, and the wire format in plain Python.

A shim's own server is not here: it is compiled (shimcore._ttrpc).
"""

from __future__ import annotations

from shimcore.ttrpc.client import NAMESPACE_KEY, Client

__all__ = ["NAMESPACE_KEY", "Client"]
