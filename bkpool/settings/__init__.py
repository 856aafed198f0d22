"""Everything about an appliance that an operator can change: one model, its sources, and where each value came from.

Only the appliance and the command line import this room. Other rooms get their values as arguments.
"""

from bkpool.settings.kinds import Address
from bkpool.settings.model import Role, Settings

__all__ = ["Address", "Role", "Settings"]
