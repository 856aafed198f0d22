"""Bytes of the gateway: sockets, TLS, dialling and relaying.

Nothing here knows a lease, a token or the store, or imports `session` or `control`.
"""
