"""Bytes of the gateway: sockets, TLS, dialling and relaying.

It knows no lease, no token and no store, and imports neither `session` nor `control`.
"""
