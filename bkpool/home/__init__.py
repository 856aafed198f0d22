"""The directory of an appliance (BKPOOL_HOME): who holds it, and how secrets are kept in it.

It knows nothing of what the files mean.
"""
