"""How many examples hypothesis tries of a property.

The fast suite stays fast with few, so that people run it. All checks together (scripts/test) try all of them once.
"""

from __future__ import annotations

import os


def examples(all_of_them: int) -> int:
    """Returns this number in all checks together, and a tenth of it otherwise."""
    return all_of_them if os.environ.get("BKPOOL_BRIEF") else max(2, all_of_them // 10)
