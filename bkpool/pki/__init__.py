"""The certificate authority, its leaves, and the private files they are kept in.

Nothing here knows leases or pools, and nothing is ever made anew because it could not be read.
"""
