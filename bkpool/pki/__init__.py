"""The certificate authority (CA), the certificates that it issues, and where their keys are stored.

Nothing here knows about leases or pools. A CA or key that cannot be read is an error; it is never replaced.
"""
