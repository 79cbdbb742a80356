"""The page of results from the committed records.

    python benchmarks/results.py                 # benchmarks/results/*.json -> docs/results.md
    python benchmarks/results.py --check         # exit status 1 when the page is not what the records say
    python benchmarks/results.py --speed MODEL   # the seconds of the table alone -> benchmarks/results/NAME-speed.json

Each record is the record.json of ``ddlm evaluate --model DIR``, under any name, or one of the sampling speed: of
``--speed`` or of the whole ``ddlm benchmark sample``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ddlm.files import write_text
from ddlm.reproduce.results import results_page
from ddlm.types import ConfigError


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
    parser.add_argument("--queue", type=int, default=128, help="sequences of --speed")
    parser.add_argument("--slots", type=int, default=64, help="sequences at once of --speed")
    parser.add_argument(
        "--rounds", type=int, default=3, help="measurements of the peer, for --speed"
    )
    arguments = parser.parse_args()
    try:
        if arguments.speed:
            return speed(arguments)
        page = results_page(arguments.records, arguments.root)
    except ConfigError as error:
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
    """Early exit over a queue, and the autoregressive peers at as many sequences at once."""
    from ddlm.benchmark.sample import benchmark_sample

    out = arguments.records / f"{Path(arguments.speed).name}-speed.json"
    benchmark_sample(
        arguments.speed,
        rounds=arguments.rounds,
        lengths=(64,),
        batches=(arguments.slots,),
        queue=arguments.queue,
        slots=arguments.slots,
        out=out,
    )
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
