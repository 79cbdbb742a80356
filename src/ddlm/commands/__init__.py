"""The commands of ``ddlm``, one thin function each: it translates arguments, the work is done in the rooms.

The signature and the Google docstring of the function are its command line (see :mod:`ddlm.cli`):

- a parameter without default before ``*`` is positional, ``files: list[Path]`` takes one or more; one that is None by
  default, before a ``*`` that is there, may be left out;
- any other parameter with a default is an option, a keyword-only one without default a required option;
- ``bool`` becomes ``--live`` / ``--no-live`` (None by default: neither was given), ``list[...]`` takes several values,
  ``Literal`` lists its choices;
- a parameter ``config: Config`` becomes ``--config NAME|FILE`` and one option for every field, ``--train.lr 1e-3``;
  ``config: Config | None = None`` stays None when none of them is given;
- a parameter ``given: Given | None = None`` is no option: it receives the names of the single settings that were given;
- text under ``Args:`` is the help and names the unit.

Modules import nothing heavy at the top, so that help comes at once. A command is reachable once
:data:`ddlm.cli.COMMANDS` names it. Mistakes of the user are :class:`ddlm.types.ConfigError`.
"""
