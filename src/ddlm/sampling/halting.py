"""When a sequence has settled: fixed step, patience, entropy, KL; one class each, combinable with ``|``.

A step is one look at a posterior (1, 2, ...). Criteria are data; their state lives on the device and is evaluated
for all slots at once, so different requests of a batch may use different criteria.

S slots, T positions, K rules of a slot (padded).
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ddlm.config import MOST_STEPS
from ddlm.sampling.values import number, shown
from ddlm.types import ConfigError

REASONS = ("completed", "fixed", "patience", "entropy", "kl")
"""Why a sequence ended; ``completed``: every step of its grid was made. The index is the code on the device."""

_FIXED, _PATIENCE, _ENTROPY, _KL = 1, 2, 3, 4


@dataclass(frozen=True)
class Rule:
    """One threshold on one signal, as the engine evaluates it: fires when ``signal >= threshold``.

    Signals: step number; steps without a switch; minus the entropy in nats; minus the KL in nats.
    """

    kind: int
    threshold: float
    min_steps: int
    freeze: bool


class Criterion(ABC):
    """What all halting criteria share: they become rules, and ``|`` combines them (the first to fire wins)."""

    @abstractmethod
    def rules(self) -> tuple[Rule, ...]:
        """The thresholds of this criterion."""

    def __or__(self, other: Criterion) -> Any:
        return Any((self, other)) if isinstance(other, Criterion) else NotImplemented


@dataclass(frozen=True)
class Fixed(Criterion):
    """Stop after ``step`` steps (the fixed-step criterion of the later version of DDLM).

    Raises:
        ConfigError: when ``step`` is not in 1..:data:`MOST_STEPS`.
    """

    step: int

    def __post_init__(self) -> None:
        _check_steps("halting at step {} was asked for", self.step, 1)

    def rules(self) -> tuple[Rule, ...]:
        """See :meth:`Criterion.rules`."""
        return (Rule(_FIXED, float(self.step), 0, freeze=False),)


@dataclass(frozen=True)
class Patience(Criterion):
    """Stop when the argmax tokens have not switched for ``steps`` consecutive steps (DDLM, section 4.1: n_p).

    Args:
        steps: n_p, steps without any switch.
        min_steps: Never stop before this step.
        freeze: Per token: a position whose own token has not switched for n_p steps becomes a condition (its clean
            embedding is kept from then on); the sequence ends when every position has settled.

    Raises:
        ConfigError: when ``steps`` is not positive, ``min_steps`` negative or either above :data:`MOST_STEPS`.
    """

    steps: int
    min_steps: int = 0
    freeze: bool = False

    def __post_init__(self) -> None:
        _check_steps("a patience of {} steps was given", self.steps, 1)
        _check_options(self.min_steps, self.freeze)

    def rules(self) -> tuple[Rule, ...]:
        """See :meth:`Criterion.rules`."""
        return (Rule(_PATIENCE, float(self.steps), self.min_steps, self.freeze),)


@dataclass(frozen=True)
class _Below(Criterion):
    """What thresholds in nats share: a signal that falls, and stopping once it is below."""

    kind: ClassVar[int]
    title: ClassVar[str]

    nats: float
    min_steps: int = 0
    freeze: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "nats", number("nats", self.nats))
        if not (math.isfinite(self.nats) and self.nats > 0):
            raise ConfigError(
                f"{self.title} threshold of {self.nats:g} nats was given, a positive number is needed"
            )
        _check_options(self.min_steps, self.freeze)

    def rules(self) -> tuple[Rule, ...]:
        """See :meth:`Criterion.rules`."""
        return (Rule(self.kind, -_below(self.nats), self.min_steps, self.freeze),)


class EntropyBelow(_Below):
    """Stop when the mean entropy of p(x_0 | x_t) over the noised positions is below ``nats`` (DDLM, later version).

    Args:
        nats: Threshold in nats a position.
        min_steps: Never stop before this step.
        freeze: Per token, see :class:`Patience`.

    Raises:
        ConfigError: when ``nats`` is not positive and finite or ``min_steps`` not in 0..:data:`MOST_STEPS`.
    """

    kind, title = _ENTROPY, "an entropy"


class KLBelow(_Below):
    """Stop when the mean KL(p_k || p_{k-1}) of successive posteriors is below ``nats`` (DDLM, later version).

    The posteriors are those at the request's temperature, over the whole vocabulary: what ``top_k`` drops counts,
    since a token that enters or leaves the k would make the divergence infinite.

    Args:
        nats: Threshold in nats a position.
        min_steps: Never stop before this step.
        freeze: Per token, see :class:`Patience`.

    Raises:
        ConfigError: when ``nats`` is not positive and finite or ``min_steps`` not in 0..:data:`MOST_STEPS`.
    """

    kind, title = _KL, "a KL"


@dataclass(frozen=True)
class Any(Criterion):
    """Stop when any of several criteria fires; written ``a | b``.

    Raises:
        ConfigError: for what is not several criteria.
    """

    criteria: tuple[Criterion, ...]

    def __post_init__(self) -> None:
        several = isinstance(self.criteria, Sequence)
        if not (several and all(isinstance(c, Criterion) for c in self.criteria)):
            raise ConfigError(
                f"{shown('criteria', self.criteria)} was given, several halting criteria are needed: write a | b"
            )

    def rules(self) -> tuple[Rule, ...]:
        """Rules of all, in order; when several fire at the same step the first names the reason."""
        return tuple(rule for criterion in self.criteria for rule in criterion.rules())


def parse(text: str) -> Criterion | None:
    """Criterion from a command line: ``patience:25``, ``entropy:0.1:min=20``, ``kl:1e-4:freeze``, ``fixed:100``.

    Several are joined with ``,`` (the first to fire wins); ``none`` means no early exit.

    Raises:
        ConfigError: for an unknown name, option or number, or a threshold out of range.
    """
    if text.strip().lower() in ("", "none"):
        return None
    found = [_parse_one(part.strip()) for part in text.split(",")]
    return found[0] if len(found) == 1 else Any(tuple(found))


def make(halt: object) -> Criterion | None:
    """Criterion of a request: itself, or from text (:func:`parse`).

    Raises:
        ConfigError: for anything else, and as :func:`parse`.
    """
    if isinstance(halt, str):
        return parse(halt)
    if halt is None or isinstance(halt, Criterion):
        return halt
    raise ConfigError(
        f"halt={halt!r} was given, it must be a halting criterion, text such as 'patience:25', or None"
    )


def remarks(criterion: Criterion | None, steps: int, choices: int) -> list[str]:
    """What to tell of thresholds that end no sequence early, or every sequence at once; a line each.

    Args:
        criterion: When to stop.
        steps: Steps allowed, rounds of refinement not among them.
        choices: Tokens that a posterior is spread over: the vocabulary, or ``top_k`` of it.
    """
    lines = []
    for rule in criterion.rules() if criterion is not None else ():
        # patience counts from the second look on, and the first one has nothing to diverge from
        earliest = {_FIXED: rule.threshold, _PATIENCE: rule.threshold + 1, _KL: 2}.get(rule.kind, 1)
        first = max(int(earliest), rule.min_steps)
        if first >= steps:
            lines.append(
                f"halting by {_written(rule)} ends nothing early: it can fire at step {first} at the earliest, "
                f"{steps} steps are allowed; lower it or allow more steps"
            )
        elif rule.kind == _ENTROPY and -rule.threshold >= _below(math.log(choices)):
            lines.append(
                f"halting by {_written(rule)} holds from step {first} on, whatever is written: no entropy over "
                f"{choices} tokens is above {math.log(choices):.4g} nats; lower it"
            )
    return lines


def _written(rule: Rule) -> str:
    """A rule as :func:`parse` reads it."""
    counted = rule.kind in (_FIXED, _PATIENCE)
    value = f"{rule.threshold:.0f}" if counted else f"{-rule.threshold:g}"
    least = f":min={rule.min_steps}" if rule.min_steps else ""
    return f"{REASONS[rule.kind]}:{value}{least}{':freeze' if rule.freeze else ''}"


def _parse_one(text: str) -> Criterion:
    name, *rest = text.split(":")
    form = f"halting criterion '{text}' is not understood: write fixed:STEP, patience:STEPS, entropy:NATS or kl:NATS"
    if name not in ("fixed", "patience", "entropy", "kl") or not rest:
        raise ConfigError(form + ", optionally with :min=STEPS and :freeze")
    if name == "fixed" and rest[1:]:
        raise ConfigError(
            f"'{text}' was given, but fixed takes a step alone: write fixed:{rest[0]}"
        )
    freeze, min_steps = False, 0
    try:
        for option in rest[1:]:
            if option == "freeze":
                freeze = True
            elif option.startswith("min="):
                min_steps = int(option[4:])
            else:
                raise ConfigError(
                    f"halting option '{option}' of '{text}' is unknown: use min=STEPS or freeze"
                )
        if name == "fixed":
            return Fixed(int(rest[0]))
        if name == "patience":
            return Patience(int(rest[0]), min_steps, freeze)
        kind = EntropyBelow if name == "entropy" else KLBelow
        return kind(float(rest[0]), min_steps, freeze)
    except ConfigError:
        raise
    except ValueError:
        raise ConfigError(form) from None


@dataclass
class Rules:
    """Criteria of all slots as tensors, and their evaluation.

    Attributes:
        kind: Signal of each rule, ``(S, K)`` int64 (index into :data:`REASONS`; 0 for padding).
        threshold: ``(S, K)`` float32, infinite for padding.
        min_steps: ``(S, K)`` float32.
        freeze: ``(S, K)`` bool.
    """

    kind: Tensor
    threshold: Tensor
    min_steps: Tensor
    freeze: Tensor

    @classmethod
    def table(cls, criteria: Sequence[Criterion | None], columns: int) -> Rules:
        """Rows for some slots, padded to ``columns`` rules."""
        rules = [() if c is None else c.rules() for c in criteria]
        padded = [[*row, *[None] * (columns - len(row))] for row in rules]

        def column(of: Callable[[Rule], float], absent: float, kind: torch.dtype) -> Tensor:
            rows = [[absent if rule is None else of(rule) for rule in row] for row in padded]
            return torch.tensor(rows, dtype=kind).reshape(len(rows), columns)

        return cls(
            kind=column(lambda rule: rule.kind, 0, torch.int64),
            threshold=column(lambda rule: rule.threshold, math.inf, torch.float32),
            min_steps=column(lambda rule: rule.min_steps, 0, torch.float32),
            freeze=column(lambda rule: rule.freeze, False, torch.bool),
        )

    def fired(self, step: Tensor, stable: Tensor, entropy: Tensor, kl: Tensor) -> Tensor:
        """Which rules hold, ``(S, K)`` bool.

        Args:
            step: Number of the look, ``(S,)``.
            stable: Steps without a switch, ``(S,)``.
            entropy: Mean entropy in nats, ``(S,)``.
            kl: Mean KL to the previous posterior in nats, ``(S,)``; infinite when there is none.
        """
        signals = torch.stack(
            [torch.full_like(step, -math.inf), step, stable, -entropy, -kl], dim=-1
        )
        value = signals.gather(-1, self.kind)  # (S, K)
        return (value >= self.threshold) & (step[:, None] >= self.min_steps)

    def settled(self, step: Tensor, stable: Tensor, entropy: Tensor, kl: Tensor) -> Tensor:
        """Where each ``freeze`` rule holds, ``(S, K, T)`` bool; signals ``(S, T)``, ``step (S,)``."""
        held = []
        signals = torch.stack(
            [torch.full_like(entropy, -math.inf)] * 2 + [stable.to(entropy), -entropy, -kl]
        )
        rows = torch.arange(step.shape[0], device=step.device)
        for j in range(self.kind.shape[1]):
            value = signals[self.kind[:, j], rows]  # (S, T)
            allowed = self.freeze[:, j] & (step >= self.min_steps[:, j])
            held.append((value >= self.threshold[:, j, None]) & allowed[:, None])
        return torch.stack(held, 1)


def _below(nats: float) -> float:
    """Largest float32 strictly below ``nats``: turns ``signal < nats`` into ``signal <= value``."""
    value = torch.tensor(nats, dtype=torch.float32)
    return float(torch.nextafter(value, torch.tensor(0.0)))


def _check_options(min_steps: object, freeze: object) -> None:
    _check_steps("min_steps={} was given", min_steps, 0)
    if freeze not in (True, False):
        raise ConfigError(f"{shown('freeze', freeze)} was given, it must be True or False")


def _check_steps(found: str, steps: object, least: int) -> None:
    """Refuse what is no number of steps, and what no run comes to: the engine's float32 could not even hold it."""
    if isinstance(steps, bool) or not hasattr(steps, "__index__"):
        raise ConfigError(f"{found.format(repr(steps))}, a whole number is needed")
    number = operator.index(steps)
    if number < least:
        raise ConfigError(f"{found.format(number)}, at least {least} is needed")
    if number > MOST_STEPS:
        digits = str(number) if number < 10**12 else f"more than {10**12}"
        raise ConfigError(f"{found.format(digits)}, at most {MOST_STEPS} can be: lower it")
