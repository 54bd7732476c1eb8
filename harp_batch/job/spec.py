"""The job as frozen values: what may stand in a job file, with its defaults and ranges.

Every model is strict: ``"8"`` is no number and ``yes`` is no boolean. A new method kind is a new class here
and one more member of :data:`MethodSpec`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from harp_batch.errors import UserError
from harp_batch.job.problems import Origins
from harp_batch.job.reader import CORE_SCALARS

LARGEST = 2**31 - 1  # what an integer column holds on every database

T = TypeVar("T")


def suggestion(word: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?`` where something known is near, else the list of what is known."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"


def _readable(text: str) -> str:
    if not text.isprintable() or text != text.strip() or not text:
        raise PydanticCustomError("text", "must be one line of text, not empty and without blanks around it")
    return text


def _refers_to_one_run(name: str) -> str:
    if name == "latest":
        raise PydanticCustomError("reserved", "'latest' means the newest run; give the job another name")
    return name


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
Text = Annotated[str, AfterValidator(_readable)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
NotNegative = Annotated[int, Field(ge=0, le=LARGEST)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


def _auto_or_number(value: Any) -> str | None:
    if isinstance(value, str):
        return "auto" if value == "auto" else None
    return "number" if isinstance(value, int | float) else None


_AUTO = Discriminator(_auto_or_number, "auto_or_number", "must be auto or a number")
_Auto = Annotated[Literal["auto"], Tag("auto")]


class _Strict(BaseModel):
    """A frozen mapping of known keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys_only(cls, value: Any) -> Any:
        value = cls._unwrap(value)
        for key in value if isinstance(value, dict) else ():
            if key not in cls.model_fields:
                hint = suggestion(key, cls.model_fields) if cls.model_fields else "there are no settings here"
                raise PydanticCustomError(
                    "unknown_key", "unknown key; {hint}", {"hint": hint, "below": (key,)}
                )
        return value

    @classmethod
    def _unwrap(cls, value: Any) -> Any:
        return value


class ModelSpec(_Strict):
    """One model of the run."""

    ref: Text  # hub id | local directory | .gguf file | wheel:PACKAGE==VERSION/FILE.gguf
    revision: Text | None = None  # of a hub id
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    chat_template: bool = True


class TaskSpec(_Strict):
    """One lm-eval task of the run."""

    task: Text
    num_fewshot: NotNegative | None = None  # None: the task's own
    limit: Positive | None = None  # documents, from the first; None: all


class _Method(_Strict):
    """Settings of one decoding method; in YAML they stand under the method's kind."""

    kind: ClassVar[str]
    name: Name

    @classmethod
    def _unwrap(cls, value: Any) -> Any:
        return value.get(cls.kind, value) if isinstance(value, dict) else value

    @model_serializer(mode="wrap")
    def _wrap(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {self.kind: handler(self)}

    @property
    def settings(self) -> dict[str, Any]:
        """The kind and its parameters, without the name: what the engine and the database are given."""
        return {"kind": self.kind} | {key: value for key, value in self if key != "name"}


class GreedySpec(_Method):
    """The most probable token at every step."""

    kind: ClassVar[str] = "greedy"
    name: Name = "greedy"


class HarpSpec(_Method):
    """Hesitation-aware reframing; the defaults are the paper's."""

    kind: ClassVar[str] = "harp"
    name: Name = "harp"
    theta: Number = 1.0  # bits of entropy above which the model hesitates
    delta: Fraction = 0.2  # probability that an element of an embedding is dropped
    beta: Fraction = 0.5  # weight of the original logits
    mask: Literal["step", "sequence"] = "step"


def _kind_of(value: Any) -> str | None:
    if isinstance(value, _Method):
        return value.kind
    if isinstance(value, dict) and len(value) == 1:
        return str(next(iter(value)))
    return None


MethodSpec = Annotated[
    Annotated[GreedySpec, Tag("greedy")] | Annotated[HarpSpec, Tag("harp")],
    Discriminator(_kind_of),
]


class GenerationSpec(_Strict):
    """Limits of generation, for every task and method."""

    max_new_tokens: Positive | None = None


class ClusterSpec(_Strict):
    """How the work is spread."""

    actors: Annotated[_Auto | Annotated[Positive, Tag("number")], _AUTO] = "auto"
    gpus_per_actor: Annotated[_Auto | Annotated[Number, Tag("number")], _AUTO] = "auto"
    slots: Positive = 64  # sequences that one actor decodes at a time
    shard_size: Positive = 32  # documents handed out at a time
    cpu_actors: NotNegative = 0  # actors without a GPU, beside those with GPUs
    hang_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 120.0  # seconds without a step


def _no_twins(what: str, name_of: Callable[[T], str], hint: str) -> AfterValidator:
    def check(items: tuple[T, ...]) -> tuple[T, ...]:
        names = [name_of(item) for item in items]
        for index, name in enumerate(names):
            if name in names[:index]:
                message = "{what} '{name}' is listed twice; {hint}"
                raise PydanticCustomError(
                    "twins", message, {"what": what, "name": name, "hint": hint, "below": (index,)}
                )
        return items

    return AfterValidator(check)


def _some() -> Any:
    return Field(min_length=1, strict=False)  # YAML's lists become tuples


class JobSpec(_Strict):
    """A run: models x tasks x methods. Equal specs ask for equal answers."""

    name: Annotated[Name, AfterValidator(_refers_to_one_run)]
    models: Annotated[tuple[ModelSpec, ...], _some(), _no_twins("model", lambda m: m.ref, "remove one")]
    tasks: Annotated[tuple[TaskSpec, ...], _some(), _no_twins("task", lambda t: t.task, "remove one")]
    methods: Annotated[
        tuple[MethodSpec, ...],
        _some(),
        _no_twins("method", lambda m: m.name, "give one of them a name of its own"),
    ]
    baseline: str = Field(default_factory=lambda data: _first_name(data.get("methods", ())))
    generation: GenerationSpec = GenerationSpec()
    cluster: ClusterSpec = ClusterSpec()
    seed: NotNegative = 0

    @field_validator("baseline")
    @classmethod
    def _is_a_method(cls, baseline: str, info: ValidationInfo) -> str:
        names = [method.name for method in info.data.get("methods", ())]
        if names and baseline not in names:
            hint = suggestion(baseline, names)
            raise PydanticCustomError(
                "baseline", "no method is named '{name}'; {hint}", {"name": baseline, "hint": hint}
            )
        return baseline

    _origins: Origins = PrivateAttr(default_factory=lambda: Origins("job", {}))

    def __eq__(self, other: object) -> bool:
        """Equal jobs ask for the same; where their keys were written does not matter."""
        return isinstance(other, JobSpec) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]

    def with_origins(self, origins: Origins) -> Self:
        """The same job, which knows where its keys were written."""
        copy = self.model_copy()
        copy._origins = origins
        return copy

    @contextmanager
    def blaming(self, *path: str | int) -> Iterator[None]:
        """A UserError from the block gets the place (file, line, key) of ``path`` before its sentence."""
        try:
            yield
        except UserError as error:
            raise type(error)(str(self._origins.error(path, str(error)))) from error

    def to_yaml(self) -> str:
        """The job with every default written out; loading it gives an equal job."""
        return yaml.dump(
            self.model_dump(exclude_none=True), Dumper=_Dumper, sort_keys=False, allow_unicode=True
        )


def _first_name(methods: tuple[_Method, ...]) -> str:
    return methods[0].name if methods else ""


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or our own reader would take for something else."""


for _tag, _pattern in CORE_SCALARS.items():
    _Dumper.add_implicit_resolver(_tag, _pattern, None)
