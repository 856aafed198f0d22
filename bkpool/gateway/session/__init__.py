"""One client connection from accept to close, and everything that one event loop of the gateway owns.

It uses `net` to move bytes. It never calls the store and does not import `control`.
"""
