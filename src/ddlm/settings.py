"""Strict reading of nested dataclasses from YAML, plain values and ``name=value`` text.

Unknown names are refused with the nearest valid one, values are checked against the fields' types, and every error is
one line that says what was found and what is needed.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from ddlm.types import ConfigError


class Given(tuple[str, ...]):
    """Dotted names of the single settings that a command line gave, for commands that do not read all of them."""


def field_types(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and type of every field below a dataclass, in the order of definition."""
    hints = get_type_hints(section)
    for f in fields(section):
        kind = hints[f.name]
        if is_dataclass(kind):
            yield from field_types(kind, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", kind


def field_values(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every field below a dataclass instance."""
    for f in fields(section):
        value = getattr(section, f.name)
        if is_dataclass(value):
            yield from field_values(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", value


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file; a key that occurs twice is refused rather than last-wins.

    Raises:
        ConfigError: for text that is not UTF-8, not YAML or not a mapping, naming the line.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8 text"
        ) from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: {error.problem}") from error
    except (
        yaml.YAMLError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:  # a list as a key, 30 February
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict | None):
        raise ConfigError(
            f"{path} holds {_show(values)}, needed are sections such as 'model:' and 'train:'"
        )
    return values or {}


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'train.lr'?"`` for the closest known names, or nothing when none is close."""
    names = list(known)
    leaf = name.rpartition(".")[2]
    # The right leaf without its section, or in the wrong one, beats a similar spelling.
    close = [k for k in names if k.rpartition(".")[2] == leaf]
    close = close or difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, close[:3]))}?" if close else ""


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML in which a key may occur once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key '{key}' occurs twice, keep one",
                    problem_mark=key_node.start_mark,
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def _decimal(self, node: yaml.ScalarNode) -> Any:
        """A whole number as people read it: YAML 1.1 takes 010 for eight and 1:30 for ninety."""
        for base in (10, 0):
            with contextlib.suppress(ValueError):
                return int(node.value, base)
        return node.value

    def _real(self, node: yaml.ScalarNode) -> Any:
        return node.value if ":" in node.value else self.construct_yaml_float(node)


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader._decimal)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _StrictLoader._real)


def assign(target: Any, values: Any, source: str = "") -> None:
    """Copy nested plain values into a dataclass instance of dataclasses, refusing what does not belong.

    Args:
        target: Changed in place.
        values: Mapping of mappings, as a YAML file gives it.
        source: Where the values come from, for the error message.

    Raises:
        ConfigError: for an unknown key (with the nearest valid one) or a value of the wrong type.
    """
    everywhere = [name for name, _ in field_types(type(target))]

    def walk(section: Any, values: Any, prefix: str) -> None:
        where = f" in {source}" if source else ""
        if not isinstance(values, Mapping):
            name = prefix[:-1] or "the configuration"
            raise ConfigError(f"{name} is {_show(values)}{where}, it must be a section of settings")
        hints = get_type_hints(type(section))
        for key, value in values.items():
            name = f"{prefix}{key}"
            if key not in hints:
                known = [f"{prefix}{k}" for k in hints] + everywhere
                raise ConfigError(f"unknown setting '{name}'{where}{nearest(name, known)}")
            if is_dataclass(hints[key]):
                walk(getattr(section, key), value, f"{name}.")
            else:
                setattr(section, key, convert(value, hints[key], name, where))

    walk(target, values, "")


def override(target: Any, name: str, value: Any) -> None:
    """Set one field by its dotted name; text is converted to the field's type.

    Raises:
        ConfigError: for an unknown name (with the nearest valid one) or a value of the wrong type.
    """
    known = dict(field_types(type(target)))
    if name not in known:
        raise ConfigError(f"unknown setting '{name}'{nearest(name, known)}")
    *sections, leaf = name.split(".")
    for section in sections:
        target = getattr(target, section)
    setattr(target, leaf, convert(value, known[name], name))


def split_override(text: str) -> tuple[str, str]:
    """``"train.lr=1e-3"`` as name and value.

    Raises:
        ConfigError: when there is no ``=``.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"the override '{text}' has no value: write it as in train.lr=1e-3")
    return name.strip(), value


def convert(value: Any, kind: Any, name: str, where: str = "") -> Any:
    """``value`` as the type of a field; text is read the way YAML or a command line would write it.

    Raises:
        ConfigError: when it is of another type; ``name`` and ``where`` appear in the message.
    """
    origin, args = get_origin(kind), get_args(kind)
    if getattr(value, "shape", None) == ():  # a number of NumPy or torch
        value = value.item()
    text = value.strip() if isinstance(value, str) else None
    needed = type_name(kind)
    if origin in (Union, types.UnionType):
        if value is None or (text is not None and text.lower() in ("null", "none")):
            return None
        (kind,) = (a for a in args if a is not type(None))
        return convert(value, kind, name, where)
    if origin is Literal:
        if value in args:
            return value
        needed += nearest(str(value), args)
    elif origin in (tuple, list):
        items = text.strip("[]()").split(",") if text is not None else value
        if isinstance(items, list | tuple):
            kinds = [args[0]] * len(items) if origin is list or args[-1] is ... else list(args)
            if len(kinds) == len(items):
                parts = zip(items, kinds, strict=True)
                return origin(convert(v, k, name, where) for v, k in parts)
    elif kind is bool:
        if isinstance(value, bool):
            return value
        if text is not None and text.lower() in ("true", "false"):
            return text.lower() == "true"
    elif kind is str:
        if isinstance(value, str | Path):
            return str(value)
    elif not isinstance(value, bool) and isinstance(value, int | float | str):
        number = _number(value)
        if kind is int and isinstance(number, int):
            return number
        try:
            if kind is float and not math.isnan(number):
                return float(number)
            if kind is int and math.isfinite(number) and number == int(number):
                return int(number)
        except OverflowError:  # a whole number beyond every float
            needed += f" of at most {sys.float_info.max:.0e}"
    raise ConfigError(f"{name} is {_show(value)}{where}, it must be {needed}")


def _number(value: float | str) -> float:
    """A number exactly, or NaN for text that is none; ``1e-3`` is one, though YAML 1.1 reads it as text."""
    for read in (int, float):
        try:
            return read(value) if isinstance(value, str) else value
        except ValueError:
            pass
    return math.nan


def type_name(kind: Any) -> str:
    """A field's type in words: ``a whole number``, ``one of euler, heun``."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(a) for a in args if a is not type(None)) + " or null"
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (tuple, list):
        many = "" if origin is list or args[-1] is ... else f"{len(args)} "
        return f"a list of {many}{type_name(args[0]).removeprefix('a ')}s"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(kind, kind.__name__)


def _show(value: Any) -> str:
    shown = f"'{value}'" if isinstance(value, str) else str(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
