"""What all stored objects have in common: metadata, conditions, and how they are read and written.

Objects are frozen; a change makes a new object. Unknown fields, of an older or newer version, are kept and written
back. Nothing is dropped silently.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic.alias_generators import to_camel

from bkpool.core import durations, plain_words
from bkpool.core.errors import InvalidInput
from bkpool.core.names import API_VERSION, DEFAULT_NAMESPACE, Key, check_name

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_LONGEST_PART = 80  # characters of one part of a field's path: it may be a key that the user wrote
_TYPE_NAMES = frozenset({"str", "int", "bool"})


def _read_duration(value: object) -> object:
    if isinstance(value, timedelta):
        return value
    if not isinstance(value, str):
        raise ValueError("write a duration as text, such as 30m or 1h30m")  # noqa: TRY004 - pydantic reads ValueError
    try:
        return durations.parse(value)
    except InvalidInput as error:
        raise ValueError(f"{error.message.removeprefix('duration: ')}. {error.hint}") from None


Duration = Annotated[timedelta, BeforeValidator(_read_duration), PlainSerializer(durations.render, return_type=str)]


def _read_utc(value: object) -> object:
    if type(value) is str and value.endswith("Z") and value[10:11] == "T":
        try:
            return datetime.fromisoformat(value)
        except ValueError:
            return value
    return value


Time = Annotated[AwareDatetime, BeforeValidator(_read_utc)]
"""A time with a zone. What is in UTC gets `datetime.UTC` instead of pydantic's own zone: two times with the same zone
are compared in a twentieth of the time."""


class Model(BaseModel):
    """The base of everything that is stored: frozen, with camelCase names in JSON, and unknown fields kept."""

    model_config = ConfigDict(frozen=True, extra="allow", alias_generator=to_camel, populate_by_name=True)

    def but(self, **changes: Any) -> Self:
        """A copy with these fields changed, as pydantic's `model_copy` makes it in twice the time.

        Every lease does it a dozen times.
        """
        copy, extra, put = type(self).__new__(type(self)), self.__pydantic_extra__, object.__setattr__
        put(copy, "__dict__", {**self.__dict__, **changes})
        put(copy, "__pydantic_extra__", extra and extra.copy())
        put(copy, "__pydantic_fields_set__", self.__pydantic_fields_set__ | changes.keys())
        put(copy, "__pydantic_private__", None)
        return copy


def _dns_label(value: str) -> str:
    try:
        return check_name(value, field="name")
    except InvalidInput as error:
        raise ValueError(f"{error.message.removeprefix('name: ')}. {error.hint}") from None


Name = Annotated[StrictStr, AfterValidator(_dns_label)]
"""The name of an object or of a namespace."""


class FieldProblem(ValueError):
    """Raised by a check of a whole object: one of its fields does not fit the others.

    Args:
        field: The path of the field, below the object that is checked.
        problem: What is wrong with it.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field = field


class OwnerReference(Model):
    """An object that owns this one: both are deleted together."""

    api_version: StrictStr = API_VERSION
    kind: StrictStr
    name: StrictStr
    uid: StrictStr
    controller: StrictBool | None = None


class Metadata(Model):
    """Metadata as in the Kubernetes API. The store fills in the fields that are None."""

    name: Name
    namespace: Name = DEFAULT_NAMESPACE
    uid: StrictStr | None = None
    resource_version: StrictStr | None = None
    generation: StrictInt | None = None
    creation_timestamp: Time | None = None
    deletion_timestamp: Time | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)
    finalizers: tuple[StrictStr, ...] = ()
    owner_references: tuple[OwnerReference, ...] = ()


AS_WANTED = "AsWanted"
"""The reason of a condition with which nothing is wrong."""


class Condition(Model):
    """One condition of an object, as in the Kubernetes API."""

    type: StrictStr
    status: Literal["True", "False", "Unknown"]
    reason: StrictStr
    message: StrictStr = ""
    last_transition_time: Time
    observed_generation: StrictInt | None = None


def condition(
    earlier: Iterable[Condition],
    kind: str,
    status: Literal["True", "False"],
    *,
    reason: str,
    message: str,
    now: datetime,
) -> Condition:
    """A condition as it is now. Its lastTransitionTime changes only when its status differs from the earlier one's.

    Args:
        earlier: The object's conditions as they are stored.
        kind: The condition's type.
        status: Its status now.
        reason: Why, in one CamelCase word.
        message: Why, in a sentence; may be empty.
        now: The time.
    """
    before = next((found for found in earlier if found.type == kind), None)
    since = before.last_transition_time if before and before.status == status else now
    return Condition(type=kind, status=status, reason=reason, message=message, last_transition_time=since)


class Resource(Model):
    """The base of all objects in the store."""

    KIND: ClassVar[str]
    PLURAL: ClassVar[str]

    api_version: Literal["buildkit.smrt-devops.net/v1alpha1"] = "buildkit.smrt-devops.net/v1alpha1"
    metadata: Metadata

    @property
    def key(self) -> Key:
        """Namespace and name."""
        return Key(self.metadata.namespace, self.metadata.name)

    @property
    def uid(self) -> str:
        """The uid that the store assigned; empty before the object is stored."""
        return self.metadata.uid or ""

    @property
    def spec_version(self) -> tuple[str, int | None]:
        """A value that changes with the object's spec and not with its status."""
        return self.uid, self.metadata.generation

    def to_json(self, *, without_status: bool = False) -> dict[str, Any]:
        """The object as JSON data, as in the API and in the store."""
        left_out = {"status"} if without_status else None
        return self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude=left_out)

    def part(self, name: str) -> dict[str, Any]:
        """The metadata, spec or status of `to_json`, at the cost of this part."""
        part: Model = getattr(self, name)
        return part.model_dump(mode="json", by_alias=True, exclude_none=True)


R = TypeVar("R", bound=Resource)


def _or_nothing(value: object, read: ValidatorFunctionWrapHandler) -> object:
    try:
        return read(value)
    except ValidationError:
        return read({})


OBSERVED = WrapValidator(_or_nothing)
"""For a status that only repeats what can be observed again: one that cannot be read (of another version, or of the
older Go controller) is dropped and written again. That of a worker is no such status."""


def parse_object(kind: type[R], data: object, *, source: str = "") -> R:
    """Reads an object from JSON or YAML data.

    Args:
        kind: The class of the object.
        data: What a JSON or YAML parser returned.
        source: Where it came from (a file and document number), for the error message.

    Raises:
        InvalidInput: A field is wrong. The message names the first wrong field and the number of others.
    """
    try:
        return kind.model_validate(data, by_alias=True, by_name=False)
    except ValidationError as error:
        raise explain(error, source=source) from None


def explain(error: ValidationError, *, source: str = "", show_value: bool = True) -> InvalidInput:
    """Turns pydantic's errors into one error that names the first wrong field as the user wrote it.

    Args:
        error: The errors from pydantic.
        source: Where the data came from.
        show_value: Whether the message may contain the wrong value, which must not be a secret.
    """
    by_field: dict[str, list[ErrorDetails]] = {}
    for one in error.errors(include_url=False, include_input=True):
        by_field.setdefault(_field(one), []).append(one)
    field, problems = next(iter(by_field.items()))
    first = problems[0]
    value = repr(first["input"]) if show_value and isinstance(first["input"], str | int | float | bool) else ""
    shown_value = f" (given: {value[:60]})" if value and not isinstance(_cause(first), FieldProblem) else ""
    more = f", and {len(by_field) - 1} more" if len(by_field) > 1 else ""
    where = f"{source}: " if source else ""
    return InvalidInput(
        f"{where}{field}: {plain_words.problem(problems)}{shown_value}{more}", hint=f"Correct {field}.", field=field
    )


def _field(error: ErrorDetails) -> str:
    """The path of the field as the user wrote it. pydantic adds the type, where a field allows several types."""
    path = error["loc"]
    cause = _cause(error)
    if isinstance(cause, FieldProblem):
        path = (*path, cause.field)
    last = str(path[-1]) if path else ""
    in_list = len(path) > 1 and isinstance(path[-2], int)  # elsewhere, such a part is a name that the user wrote
    if last.startswith("constrained-") or (in_list and last in _TYPE_NAMES):
        path = path[:-1]
    return ".".join(str(part)[:_LONGEST_PART] for part in path) or "the document"


def _cause(error: ErrorDetails) -> object:
    return error.get("ctx", {}).get("error")
