"""Keeps the plainest documents of a corpus: few rare words, short sentences, little but letters.

A small model spends its compute on what its text demands; TinyStories (Eldan & Li 2023) showed how far plain text
carries it. This keeps whole documents, straightens typographic quotes and dashes (four spellings of one sign cost a
small vocabulary four pieces), and says what it dropped.

    python benchmarks/plain_text.py gutenberg_books-*.jsonl.gz c4_en_train-000.jsonl.gz --out plain.jsonl.gz
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
from collections import Counter
from pathlib import Path

WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
SENTENCE_END = re.compile(r"[.!?][\"')]*\s")
NOT_PROSE = re.compile(r"[^A-Za-z\s.,;:!?'\"()-]")
STRAIGHT = str.maketrans(
    {
        "“": '"',
        "”": '"',
        "‘": "'",
        "’": "'",
        "—": "--",
        "–": "-",
        "…": "...",
        "\u00a0": " ",
        "_": None,
    }
)


def documents(files: list[Path]) -> list[str]:
    """The texts of all files, quotes straightened and runs of spaces joined."""
    texts = []
    for path in files:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            texts.extend(
                re.sub(r" +", " ", json.loads(line)["text"].translate(STRAIGHT)) for line in lines
            )
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help="jsonl.gz files with a field `text`")
    parser.add_argument("--out", required=True, type=Path, help="jsonl.gz file to write")
    parser.add_argument(
        "--common", type=int, default=3000, help="how many of the commonest words are not rare"
    )
    parser.add_argument("--rare", type=float, default=0.155, help="largest share of rare words")
    parser.add_argument(
        "--sentence", type=float, default=24.0, help="largest mean sentence, in words"
    )
    parser.add_argument(
        "--other", type=float, default=0.006, help="largest share of characters that are not prose"
    )
    options = parser.parse_args()
    if options.out.exists():
        sys.exit(f"{options.out} exists: name another file or remove it")

    texts = documents(options.files)
    words = [WORD.findall(text.lower()) for text in texts]
    counts = Counter(word for text in words for word in text)
    common = {word for word, _ in counts.most_common(options.common)}
    dropped: Counter[str] = Counter()
    kept = total = 0
    part = options.out.with_name(options.out.name + ".part")
    with gzip.open(part, "wt", encoding="utf-8") as out:
        for text, spoken in zip(texts, words, strict=True):
            if len(spoken) < 50:
                dropped["fewer than 50 words"] += 1
            elif sum(word not in common for word in spoken) / len(spoken) > options.rare:
                dropped["rare words"] += 1
            elif len(spoken) / max(1, len(SENTENCE_END.findall(text))) > options.sentence:
                dropped["long sentences"] += 1
            elif len(NOT_PROSE.findall(text)) / len(text) > options.other:
                dropped["not prose"] += 1
            else:
                out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                kept += 1
                total += len(spoken)
    part.replace(options.out)
    print(
        f"kept {kept:,} of {len(texts):,} documents, {total / 1e6:.2f}M of {counts.total() / 1e6:.2f}M words"
    )
    print("dropped: " + ", ".join(f"{n:,} for {why}" for why, n in dropped.most_common()))


if __name__ == "__main__":
    main()
