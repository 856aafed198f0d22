"""The controller: carries out what core.reconcile decides for the pools that have changed or are due.

It is woken by changes in the store, by the runtime and by the next deadline that the policy named; it never polls and
never decides.
"""

from bkpool.controller.controller import Controller

__all__ = ["Controller"]
