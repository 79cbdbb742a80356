"""``ddlm prepare``: text into token shards."""

from __future__ import annotations

from pathlib import Path

_MUCH = 0.2
"""Share of the tokens held out that is worth a word when it was not asked for."""


def prepare(
    files: list[str] | None = None,
    *,
    out: Path,
    source: list[str] | None = None,
    tokenizer: str | None = None,
    vocab_size: int = 32_000,
    val_fraction: float = 0.01,
    text_field: str = "text",
    processes: int | None = None,
    shard_tokens: int = 1 << 27,
    limit: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Turn text into token shards, with a tokenizer trained on it or a given one.

    An interrupted call goes on when it is repeated; a finished folder is left as it is. A folder that holds anything
    else is refused, and so is one made of files that have changed since (their names, sizes and content are compared;
    of a corpus over 128 MiB the beginning and the end of each file; of hub data sets nothing but names).

    Args:
        files: .txt, .jsonl or .parquet files (also compressed), folders, globs, or hf:REPO[,CONFIG[,SPLIT]] to
            stream a data set from the hub.
        out: Folder of the shards; made if missing. What lies in it is not taken for corpus.
        source: The same as FILES, in place of them.
        tokenizer: What to tokenise with: tokenizer.json, SentencePiece .model, a folder or a hub id. None trains a
            byte-level BPE.
        vocab_size: Entries of the tokenizer to be trained.
        val_fraction: Share of the documents held out, between 0 and 1.
        text_field: Field or column that holds the text.
        processes: Tokenising processes; None: one a core.
        shard_tokens: Tokens of a shard file.
        limit: Documents to take at most, for each rank: with --world_size 4 four times as many in all; None: all.
        rank: Which share of the corpus this machine takes, from 0.
        world_size: Over how many machines the corpus is spread.
    """
    from ddlm.data.prepare import prepare as run
    from ddlm.data.tokenizer import END_TOKEN
    from ddlm.types import ConfigError

    sources = [*(files or ()), *(source or ())]
    if files and source:
        raise ConfigError(
            f"'{files[0]}' was given as one of FILES and '{source[0]}' with --source: "
            "name all of them in one of the two ways"
        )
    if not sources:
        raise ConfigError(
            "no corpus was given: name FILES (or --source), such as texts/*.txt or hf:allenai/c4,en"
        )
    report = run(
        sources,
        out,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        val_fraction=val_fraction,
        text_field=text_field,
        processes=processes,
        shard_tokens=shard_tokens,
        limit=limit,
        rank=rank,
        world_size=world_size,
        progress=True,
    )
    done = "already prepared"
    if not report.reused:
        done = (
            f"prepared in {report.seconds:.1f} s ({report.documents_per_second:,.0f} documents/s, "
            f"{report.tokens_per_second:,.0f} tokens/s)"
        )
    print(
        f"{report.folder}: {report.tokens:,} tokens of {report.documents:,} documents "
        f"({report.val_documents:,} held out), vocabulary {report.vocab_size:,}, {done}"
    )
    share = report.val_tokens / max(report.tokens, 1)
    if share > max(_MUCH, 3 * val_fraction):
        print(
            f"note: {share:.0%} of the tokens are held out and {val_fraction:.0%} were asked for, the corpus has only "
            f"{report.documents:,} documents: prepare more or shorter ones (a line with nothing but {END_TOKEN} ends "
            "one in a .txt file), or hold out none with --val_fraction 0"
        )
    if not report.complete:
        print(f"shares of other machines are missing: repeat with the other ranks of {world_size}")
