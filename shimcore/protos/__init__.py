"""The messages of containerd's runtime v2 contract, one module per .proto file; import only what you use.

The descriptors live in protobuf's default pool, so that a field takes google.protobuf's own Timestamp
and Any. A pool holds each full message name once: in a process that has loaded another copy of, say,
containerd.types.Mount, these modules cannot be imported (TypeError, naming the symbol). Their file names all
begin with shimcore/protos/ and clash with nobody's.

In an Any containerd wants the bare full name as type URL; Any.Pack does not write that, shimcore.protos.anys
does.
"""
