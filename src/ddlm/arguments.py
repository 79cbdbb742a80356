"""The arguments of a command, made from the signature and the docstring of its function.

jsonargparse reads the values by their types; here are the rules of :mod:`ddlm.commands`, the options of a whole
:class:`~ddlm.config.Config`, and errors in one line with the nearest valid name.
"""

from __future__ import annotations

import argparse
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
import jsonargparse

from ddlm.config import Config, load_config
from ddlm.settings import Given, convert, field_types, field_values, nearest
from ddlm.types import ConfigError, local


class Arguments:
    """The arguments of one command.

    Args:
        program: How the command is called, ``"ddlm train"``.
        function: Its signature and Google docstring are the arguments (rules in :mod:`ddlm.commands`).
    """

    def __init__(self, program: str, function: Callable[..., Any]) -> None:
        summary, texts = _document(function)
        self.program = program
        self.kinds: dict[str, Any] = {}  # parameters of the function
        self.config: inspect.Parameter | None = None  # the one that is a whole Config
        self.given: str | None = None  # the one that is told which of its settings were given
        hints = get_type_hints(function)
        parameters = inspect.signature(function).parameters
        self._starred = any(p.kind is p.KEYWORD_ONLY for p in parameters.values())
        for name, parameter in parameters.items():
            if hints[name] in (Config, Config | None):
                self.config = parameter
            elif hints[name] == Given | None:
                self.given = name
            else:
                self.kinds[name] = _without_none(hints[name])
        self.parser = jsonargparse.ArgumentParser(
            prog=program,
            description=summary,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,  # a misspelled option must not pass for a longer one
            exit_on_error=False,
        )
        for name, kind in self.kinds.items():
            self._add(parameters[name], kind, texts.get(name, ""))
        if self.config is not None:
            text = texts.get(self.config.name, "Name of a shipped configuration, or a YAML file.")
            self.parser.add_argument("--config", metavar="NAME|FILE", help=text)
            self._add_settings()
        self.options = [o for action in self.parser._actions for o in action.option_strings]

    def _add(self, parameter: inspect.Parameter, kind: Any, text: str) -> None:
        """The argument of one parameter."""
        name, default = parameter.name, parameter.default
        item = _item(kind)
        options: dict[str, Any] = {"help": text}
        if kind is bool and default is not False:
            options |= {"action": jsonargparse.ActionYesNo(no_prefix="no-")}
        elif kind is bool:
            options |= {"action": "store_true"}
        else:
            options |= {"type": str if item is Path else item, "metavar": _metavar(item)}
        if item is not kind:
            options["nargs"] = "+"
        if self._starred and parameter.kind is parameter.POSITIONAL_OR_KEYWORD and default is None:
            count = "?" if item is kind else "*"
            options |= {"nargs": count, "default": None, "metavar": name.upper()}
            self.parser.add_argument(name, **options)
        elif default is not parameter.empty:
            if isinstance(default, Path):
                default = str(default)
            self.parser.add_argument(f"--{name}", default=default, **options)
        elif parameter.kind is parameter.KEYWORD_ONLY:
            self.parser.add_argument(f"--{name}", required=True, **options)
        else:
            self.parser.add_argument(name, **options | {"metavar": name.upper()})

    def _add_settings(self) -> None:
        """One option for every field of a configuration; :func:`ddlm.config.load_config` reads the values."""
        defaults = dict(field_values(Config()))
        for section, kind in get_type_hints(Config).items():
            summary, texts = _document(kind)
            group = self.parser.add_argument_group(
                f"{section}: {summary.partition('. ')[0].rstrip('.')}"
            )
            for leaf, hint in get_type_hints(kind).items():
                group.add_argument(
                    f"--{section}.{leaf}",
                    metavar=_metavar(_without_none(hint)),
                    default=defaults[f"{section}.{leaf}"],
                    help=texts.get(leaf, ""),
                )
        plain = [_brief(a) for a in self.parser._actions if "." not in a.dest]
        self.parser.usage = " ".join([self.program, *plain, "[--SECTION.FIELD VALUE ...]"])

    def asks_for_help(self, argv: Sequence[str]) -> bool:
        """Whether ``--help`` or ``-h`` is among the options."""
        return not {"-h", "--help"}.isdisjoint(_options(argv))

    def help(self, argv: Sequence[str] = ()) -> str:
        """Usage, arguments and defaults: those of the configuration that ``argv`` names, if it does."""
        name = next((b for a, b in pairwise(argv) if a == "--config"), None)
        name = name or next((a[9:] for a in argv if a.startswith("--config=")), None)
        if self.config is not None and name is not None:
            self.parser.set_defaults(dict(field_values(load_config(name))))
        return self.parser.format_help()

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """Typed arguments of the function.

        Raises:
            ConfigError: naming the option or setting, what was found and what is needed.
        """
        argv = self._spelled(argv)
        try:
            parsed = self.parser.parse_args(argv)
        except (jsonargparse.ArgumentError, argparse.ArgumentError) as error:
            raise ConfigError(self._rephrase(error)) from error
        values = {name: _with_paths(parsed[name], kind) for name, kind in self.kinds.items()}
        if self.config is not None:
            given = {option[2:].partition("=")[0] for option in _options(argv)}
            overrides = {n: parsed[n] for n, _ in field_types(Config) if n in given}
            source = parsed.config
            # Overrides win over the file wherever they stand on the command line.
            wanted = source is not None or overrides or self.config.default is not None
            values[self.config.name] = load_config(source, overrides) if wanted else None
            if self.given is not None:
                values[self.given] = Given(overrides)
        return values

    def _spelled(self, argv: Sequence[str]) -> list[str]:
        """``argv`` with ``--noise-scale`` as ``--noise_scale``; unknown options are refused."""
        spelled, options = list(argv), set(_options(argv))
        for i, text in enumerate(spelled):
            option, equals, value = text.partition("=")
            if text not in options or option in self.options:
                continue
            option = "--" + option[2:].replace("-", "_")
            if option not in self.options:
                hint = nearest(option[2:], [o[2:] for o in self.options if o.startswith("--")])
                hint = re.sub(r"'(\S+)'", r"'--\1'", hint)
                raise ConfigError(
                    f"{self.program} has no option '{text.partition('=')[0]}'"
                    + (hint or f"; see {self.program} --help")
                )
            spelled[i] = option + equals + value
        return spelled

    def _rephrase(self, error: Exception) -> str:
        """An error of the parser as one line in our words."""
        text = " ".join(str(error).split())
        if found := re.match(r'Parser key "(\w+)"(?: element \d+)?: .*Got value: (.*)', text):
            name, value = found.groups()
            try:
                number = convert(value, _item(self.kinds[name]), self._shown(name))
            except ConfigError as mistake:
                return str(mistake)
            return f"{self._shown(name)} is {value}: write {number}"
        if found := re.match(r"the following arguments are required: (.*)", text):
            names = found[1].split(", ")
            text = f"{' and '.join(map(self._shown, names))} must be given"
        if found := re.match(r"argument (\S+): expected .* arguments?", text):
            text = f"{found[1].split('/')[0]} needs a value"
        if found := re.match(r"unrecognized arguments: (.*)", text):
            text = f"'{found[1]}' is more than this command takes"
        return f"{text}; see {self.program} --help"

    def _shown(self, name: str) -> str:
        """A parameter as it is written on the command line."""
        return f"--{name}" if f"--{name}" in self.options else name.upper()


def _document(documented: Any) -> tuple[str, dict[str, str]]:
    """The description of a function or dataclass, and the text of each parameter or field."""
    if inspect.isclass(documented):
        document = docstring_parser.parse_from_object(documented)
    else:
        document = docstring_parser.parse(inspect.getdoc(documented) or "")
    texts = {p.arg_name: " ".join((p.description or "").split()) for p in document.params}
    parts = (document.short_description, document.long_description)
    return "\n\n".join(p for p in parts if p), {k: v.replace("%", "%%") for k, v in texts.items()}


def _item(kind: Any) -> Any:
    """The type of one value: ``int`` of ``list[int]``, otherwise the type itself."""
    return get_args(kind)[0] if get_origin(kind) in (list, tuple) else kind


def _with_paths(value: Any, kind: Any) -> Any:
    if value is None or _item(kind) is not Path:
        return value
    return local(value) if kind is Path else [local(v) for v in value]


def _brief(action: argparse.Action) -> str:
    """One argument of the usage line."""
    if not action.option_strings and action.nargs == "?":
        return f"[{action.metavar}]"
    if not action.option_strings:
        return f"{action.metavar} ..." if action.nargs == "+" else str(action.metavar)
    text = " ".join([action.option_strings[0], *([str(action.metavar)] if action.metavar else [])])
    return text if action.required else f"[{text}]"


class _HelpFormatter(argparse.HelpFormatter):
    """Paragraphs kept, defaults shown."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=30, **options)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.split("\n\n")
        return "\n\n".join(textwrap.fill(p, width) for p in paragraphs)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").rstrip()
        if not action.option_strings or action.dest in ("help", "config"):
            return text
        if action.required:
            return f"{text} (required)"
        default = "none" if action.default is None else _written(action.default)
        return f"{text} (default: {default.replace('%', '%%')})".strip()


def _written(value: Any) -> str:
    """A default as it would be written on the command line."""
    if isinstance(value, list | tuple):
        return ",".join(map(_written, value)) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value) or "''"


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        return next(a for a in get_args(hint) if a is not type(None))
    return hint


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    if get_origin(kind) in (list, tuple):
        return ",".join(_metavar(a) for a in get_args(kind) if a is not ...)
    return {int: "N", float: "X", bool: "{true,false}", Path: "PATH"}.get(kind, "TEXT")


def _options(argv: Sequence[str]) -> Iterable[str]:
    """The arguments that are options: what starts with two dashes (or is ``-h``), up to a lone ``--``."""
    for text in argv:
        if text == "--":
            return
        if text == "-h" or (text.startswith("--") and text[2:3].isalpha()):
            yield text
