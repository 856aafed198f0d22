"""One client connection from accept to close, and everything that one event loop of the gateway keeps.

It uses `net` to move bytes. It never touches the store and does not import `control`.
"""
