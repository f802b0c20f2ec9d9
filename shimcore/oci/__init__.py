"""The shim that we ship: containerd-shim-runc-v2-py, for runc and what has runc's command line (crun, youki).

shim.RuncShim is what `start`, `delete` and `-info` need, service.RuncTask is the daemon; import the one that
you use.
"""
