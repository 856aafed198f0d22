"""The directories of an appliance: BKPOOL_HOME with its lock and its private files, and the one for its sockets.

It knows nothing about the contents of the files.
"""
