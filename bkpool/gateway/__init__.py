"""The mTLS gateway: takes a job's connections to the worker that its lease holds, or says why not.

It runs in a thread and an event loop of its own, works from an immutable table of leases, and never touches the
store there.
"""
