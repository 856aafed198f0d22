"""The mTLS gateway: relays a job's connections to the worker of its lease, or answers why it does not.

`net` moves bytes, `session` knows one connection and its lease, and `control` starts the loops and tells them of
leases. The gateway runs in its own threads, each with an event loop. Each loop has its own table of leases, which
follows the changes that the main loop gives. The gateway never calls the store in these threads.
"""
