"""Keeps the status of each BuildKitOIDCConfig: whether its issuer's tokens are believed, and why not.

It judges no token. Each issuer is looked at by itself, so that one that is slow or down delays no other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

import structlog

from bkpool.core.auth import OIDCConfig, OIDCConfigStatus
from bkpool.core.errors import BkpoolError, Conflict, NotFound
from bkpool.core.ignored import ignored_in_config
from bkpool.core.names import Key
from bkpool.core.resource import Condition
from bkpool.store import Store
from bkpool.store.mirror import Mirror

log = structlog.get_logger(__name__)

EVERY = timedelta(minutes=10)
"""How often an issuer is looked at although its configuration has not changed."""
AGAIN = timedelta(minutes=1)
"""The same while it cannot be reached, or what was found could not be written."""
PATIENCE = 30.0
"""Seconds for one look at an issuer."""

# --- what to tell: pure ---------------------------------------------------------------------------------------------


_GOOD = "AsWanted"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a look at an issuer has brought."""

    reason: str
    """What is wrong, in one word; `_GOOD` where nothing is."""
    message: str

    @property
    def ready(self) -> bool:
        """Whether its tokens are believed."""
        return self.reason == _GOOD


def without_looking(config: OIDCConfig) -> Finding | None:
    """What can be told of a configuration without asking its issuer; None where it must be asked."""
    if not config.spec.enabled:
        return Finding("Disabled", "disabled")
    if config.spec.refusal is not None:
        return Finding("NeedsCondition", config.spec.refusal)
    return None


def found_keys(count: int) -> Finding:
    """The issuer has answered."""
    return Finding(_GOOD, f"{count} key{'s' * (count != 1)}")


def unreachable(message: str) -> Finding:
    """The issuer has not answered as it should."""
    return Finding("IssuerUnreachable", message)


def status_of(config: OIDCConfig, finding: Finding, now: datetime) -> OIDCConfigStatus:
    """The status to write. It differs from the one that is there only where there is something new to tell."""
    ignored = ", ".join(f"spec.{name}" for name in ignored_in_config(config.spec))
    unread = Finding("NotImplemented" if ignored else _GOOD, ignored)
    conditions = (
        _condition(config, now, "IgnoredFields", "True" if ignored else "False", unread),
        _condition(config, now, "Ready", "True" if finding.ready else "False", finding),
    )
    return config.status.but(
        ready=finding.ready,
        message=finding.message,
        observed_generation=config.metadata.generation,
        conditions=conditions,
    )


def _condition(
    config: OIDCConfig, now: datetime, kind: str, status: Literal["True", "False"], finding: Finding
) -> Condition:
    before = next((c for c in config.status.conditions if c.type == kind), None)
    since = before.last_transition_time if before and before.status == status else now
    return Condition(
        type=kind, status=status, reason=finding.reason, message=finding.message, last_transition_time=since
    )


# --- keeping it -----------------------------------------------------------------------------------------------------


class ConfigKeeper:
    """Looks at each configured issuer when its configuration changes, and every now and then.

    Args:
        store: Where the configurations are.
        mirror: Knows them (`configs=True`).
        probe: Asks the issuer of this URL how many keys it has. Raises a BkpoolError where it does not tell.
        now: The clock.
        every: Between two looks.
    """

    def __init__(
        self,
        store: Store,
        mirror: Mirror,
        probe: Callable[[str], Awaitable[int]],
        now: Callable[[], datetime],
        every: timedelta = EVERY,
    ) -> None:
        self._store = store
        self._mirror = mirror
        self._probe = probe
        self._now = now
        self._every = every
        self._followed: set[Key] = set()
        self._changed = asyncio.Event()
        """Of this moment: it is set once and replaced, so that everybody who waits is woken."""

    async def run(self) -> None:
        """Runs until cancelled."""
        await self._mirror.ready.wait()
        unsubscribe = self._mirror.on_config(self._tell)
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    for key in self._mirror.configs.keys() - self._followed:
                        self._followed.add(key)
                        tasks.create_task(self._follow(key))
                    await self._changed.wait()
        finally:
            unsubscribe()
            self._followed.clear()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _follow(self, key: Key) -> None:
        """Looks after one configuration while it is there."""
        while (config := self._mirror.configs.get(key)) is not None:
            finding = without_looking(config) or await self._look(config)
            written = await self._write(config, finding)
            unsettled = not written or finding.reason == "IssuerUnreachable"
            with suppress(TimeoutError):
                async with asyncio.timeout((min(AGAIN, self._every) if unsettled else self._every).total_seconds()):
                    await self._until_another(config)
        self._followed.discard(key)

    async def _look(self, config: OIDCConfig) -> Finding:
        try:
            async with asyncio.timeout(PATIENCE):
                return found_keys(await self._probe(config.spec.issuer))
        except TimeoutError:
            return unreachable(f"{config.spec.issuer} does not answer within {PATIENCE:g} s")
        except BkpoolError as error:
            return unreachable(error.message)
        except Exception:  # of one issuer, and no reason to leave the others alone
            log.exception("oidc_config.look_crashed", config=str(config.key))
            return unreachable("it could not be looked at; the log says why")

    async def _write(self, config: OIDCConfig, finding: Finding) -> bool:
        """Writes what was found of this configuration, unless it is another by now; False: to be tried again."""
        try:
            while True:
                current = await self._store.get(OIDCConfig, *config.key)
                status = status_of(current, finding, self._now())
                if _version(current) != _version(config) or status == current.status:
                    return True
                with suppress(Conflict):
                    await self._store.replace_status(current.but(status=status))
                    log.info("oidc_config.status", config=str(config.key), ready=status.ready, message=status.message)
                    return True
        except NotFound:
            return True
        except BkpoolError as error:
            log.warning("oidc_config.status_not_written", config=str(config.key), error=error.message)
            return False

    async def _until_another(self, config: OIDCConfig) -> None:
        """Waits until the configuration has changed or is gone."""
        while (current := self._mirror.configs.get(config.key)) and _version(current) == _version(config):
            await self._changed.wait()


def _version(config: OIDCConfig) -> tuple[str, int | None]:
    """What changes with the configuration, and not with its status."""
    return config.uid, config.metadata.generation
