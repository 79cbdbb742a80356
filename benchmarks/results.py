"""The page of results from the committed records.

    python benchmarks/results.py                 # benchmarks/results/*.json -> docs/results.md
    python benchmarks/results.py --check         # exit status 1 when the page is not what the records say
    python benchmarks/results.py --speed MODEL   # seconds of the model's rows -> benchmarks/results/NAME-speed.json
    python benchmarks/results.py --real MODEL    # real text on the stretches of its rows -> .../NAME-real.json

Each record is the record.json of ``ddlm evaluate --model DIR``, under any name, or one of ``--speed``, which takes the
samplings that it times from the other records of the model, or of ``--real``, which takes the held-out text from them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ddlm.files import write_text
from ddlm.record import write_record
from ddlm.reproduce.results import REAL, read_records, results_page, settings
from ddlm.reproduce.stretches import measure_real
from ddlm.types import ConfigError, DataError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--records", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--root", type=Path, default=Path(), help="what model folders are relative to"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    parser.add_argument(
        "--speed", metavar="MODEL", help="measure the speed of this model, write its record"
    )
    parser.add_argument(
        "--real",
        metavar="MODEL",
        help="measure real text as this model's rows are, write its record",
    )
    parser.add_argument("--queue", type=int, default=32, help="sequences of --speed")
    parser.add_argument("--slots", type=int, default=16, help="sequences at once of --speed")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each, for --speed")
    arguments = parser.parse_args()
    try:
        if arguments.speed:
            return speed(arguments)
        if arguments.real:
            return real(arguments)
        page = results_page(arguments.records, arguments.root)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.check:
        same = arguments.out.is_file() and arguments.out.read_text(encoding="utf-8") == page
        print(f"{arguments.out} {'is' if same else 'is not'} what {arguments.records} says")
        return 0 if same else 1
    write_text(arguments.out, page)
    print(arguments.out)
    return 0


def speed(arguments: argparse.Namespace) -> int:
    """Every sampling of the model's records, and the autoregressive peer at as many sequences at once."""
    from ddlm.benchmark.speed import measure_speed

    name = Path(arguments.speed).name
    samplings: list[dict[str, Any]] = []
    for record in read_records(arguments.records)[0]:
        how = settings(record)
        del how["halt"]
        of_it = Path(record.content["config"].get("model") or "").name == name
        if of_it and how not in samplings:
            samplings.append(how)
    if not samplings:
        raise ConfigError(
            f"{arguments.records} holds no evaluation of {name}: only samplings that have a row are timed"
        )
    out = arguments.records / f"{name}-speed.json"
    measure_speed(
        arguments.speed,
        samplings,
        queue=arguments.queue,
        slots=arguments.slots,
        rounds=arguments.rounds,
        out=out,
    )
    print(out)
    return 0


def real(arguments: argparse.Namespace) -> int:
    """Diversity of real text, whole and where the tasks of the model's records write."""
    name = Path(arguments.real).name
    for record in read_records(arguments.records)[0]:
        of_it = Path(record.content["config"].get("model") or "").name == name
        if of_it and any(row["name"] == REAL for row in record.results["rows"]):
            out = arguments.records / f"{name}-real.json"
            write_record(out, measure_real(arguments.real, record.content))
            print(out)
            return 0
    raise ConfigError(f"{arguments.records} holds no evaluation of {name} with a row of real text")


if __name__ == "__main__":
    sys.exit(main())
