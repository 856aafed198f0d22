"""Keeps the status of each BuildKitOIDCConfig: whether tokens of its issuer are accepted, and why not.

It never checks a token. Each issuer is checked in a separate task, so a slow one does not delay the others.
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
from bkpool.core.resource import AS_WANTED, Condition, condition
from bkpool.store import Store
from bkpool.store.mirror import Mirror

log = structlog.get_logger(__name__)

CHECK_INTERVAL = timedelta(minutes=10)
"""How often an issuer is checked while its configuration does not change."""
RETRY_INTERVAL = timedelta(minutes=1)
"""The same while the issuer cannot be reached, or the status could not be written."""
CHECK_TIMEOUT = 30.0
"""Seconds for one check of an issuer."""

# --- the status: pure -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check."""

    reason: str
    """What is wrong, in one CamelCase word; `AS_WANTED` if nothing is."""
    message: str

    @property
    def ready(self) -> bool:
        """Whether tokens of the issuer are accepted."""
        return self.reason == AS_WANTED


def finding_without_check(config: OIDCConfig) -> Finding | None:
    """The status that follows from the configuration alone; None if the issuer must be asked."""
    if not config.spec.enabled:
        return Finding("Disabled", "disabled")
    if config.spec.rejection_reason is not None:
        return Finding("NeedsCondition", config.spec.rejection_reason)
    return None


def found_keys(count: int) -> Finding:
    """The finding for an issuer that answered with its keys."""
    return Finding(AS_WANTED, f"{count} key{'s' * (count != 1)}")


def unreachable(message: str) -> Finding:
    """The finding for an issuer that did not answer with keys."""
    return Finding("IssuerUnreachable", message)


def status_of(config: OIDCConfig, finding: Finding, now: datetime) -> OIDCConfigStatus:
    """The status to write. It equals the stored one if nothing has changed."""
    ignored = ", ".join(f"spec.{name}" for name in ignored_in_config(config.spec))
    ignored_finding = Finding("NotImplemented" if ignored else AS_WANTED, ignored)
    conditions = (
        _condition(config, now, "IgnoredFields", is_true=bool(ignored), finding=ignored_finding),
        _condition(config, now, "Ready", is_true=finding.ready, finding=finding),
    )
    return config.status.but(
        ready=finding.ready,
        message=finding.message,
        observed_generation=config.metadata.generation,
        conditions=conditions,
    )


def _condition(config: OIDCConfig, now: datetime, kind: str, *, is_true: bool, finding: Finding) -> Condition:
    status: Literal["True", "False"] = "True" if is_true else "False"
    stored = config.status.conditions
    return condition(stored, kind, status, reason=finding.reason, message=finding.message, now=now)


# --- writing it -----------------------------------------------------------------------------------------------------


class OIDCConfigController:
    """Checks each configured issuer when its configuration changes, and at regular intervals.

    Args:
        store: Where the configurations are.
        mirror: The copy in memory, with configurations (`configs=True`).
        count_keys: Asks the issuer with this URL how many keys it has. Raises BkpoolError if it does not answer so.
        now: The clock.
        interval: The time between two checks.
    """

    def __init__(
        self,
        store: Store,
        mirror: Mirror,
        count_keys: Callable[[str], Awaitable[int]],
        now: Callable[[], datetime],
        interval: timedelta = CHECK_INTERVAL,
    ) -> None:
        self._store = store
        self._mirror = mirror
        self._count_keys = count_keys
        self._now = now
        self._interval = interval
        self._watched: set[Key] = set()
        self._changed = asyncio.Event()
        """Set once and then replaced, so that every task that waits is woken."""

    async def run(self) -> None:
        """Runs until cancelled."""
        await self._mirror.ready.wait()
        unsubscribe = self._mirror.on_config(self._wake_all)
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    for key in self._mirror.configs.keys() - self._watched:
                        self._watched.add(key)
                        tasks.create_task(self._watch(key))
                    await self._changed.wait()
        finally:
            unsubscribe()
            self._watched.clear()

    def _wake_all(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _watch(self, key: Key) -> None:
        """Keeps the status of one configuration until it is deleted."""
        while (config := self._mirror.configs.get(key)) is not None:
            finding = finding_without_check(config) or await self._check(config)
            written = await self._write(config, finding)
            unsettled = not written or finding.reason == "IssuerUnreachable"
            with suppress(TimeoutError):
                async with asyncio.timeout(
                    (min(RETRY_INTERVAL, self._interval) if unsettled else self._interval).total_seconds()
                ):
                    await self._until_changed(config)
        self._watched.discard(key)

    async def _check(self, config: OIDCConfig) -> Finding:
        try:
            async with asyncio.timeout(CHECK_TIMEOUT):
                return found_keys(await self._count_keys(config.spec.issuer))
        except TimeoutError:
            return unreachable(f"{config.spec.issuer} did not answer within {CHECK_TIMEOUT:g} s")
        except BkpoolError as error:
            return unreachable(error.message)
        except Exception:  # a bug that one issuer shows must not end the checks of the others
            log.exception("oidc_config.check_crashed", config=str(config.key))
            return unreachable("it could not be checked; the log says why")

    async def _write(self, config: OIDCConfig, finding: Finding) -> bool:
        """Writes the finding unless the configuration has changed since. Returns False if it must be tried again."""
        try:
            while True:
                current = await self._store.get(OIDCConfig, *config.key)
                status = status_of(current, finding, self._now())
                if current.spec_version != config.spec_version or status == current.status:
                    return True
                with suppress(Conflict):
                    await self._store.replace_status(current.but(status=status))
                    log.info(
                        "oidc_config.status_changed",
                        config=str(config.key),
                        ready=status.ready,
                        message=status.message,
                    )
                    return True
        except NotFound:
            return True
        except BkpoolError as error:
            log.warning("oidc_config.status_not_written", config=str(config.key), error=error.message)
            return False

    async def _until_changed(self, config: OIDCConfig) -> None:
        """Waits until the configuration has changed or was deleted."""
        while (current := self._mirror.configs.get(config.key)) and current.spec_version == config.spec_version:
            await self._changed.wait()
