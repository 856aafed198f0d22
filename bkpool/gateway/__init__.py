"""The mTLS gateway: relays a job's connections to the worker of its lease, or answers why it does not.

`net` moves bytes, `session` knows one connection and its lease, and `control` starts the loops and tells them of
leases. The gateway runs in its own threads, each with an event loop. It works from an immutable table of leases, and
never calls the store in these threads.
"""
