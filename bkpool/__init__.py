"""bkpool: a pool of BuildKit workers, leased one to a job, reached through an mTLS gateway."""

__version__ = "0.1.0"
