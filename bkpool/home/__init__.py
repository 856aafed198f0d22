"""The directory of an appliance (BKPOOL_HOME): its lock, and how private files are written and read.

It knows nothing about the contents of the files.
"""
