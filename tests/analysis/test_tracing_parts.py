"""What is measured on recorded sequences: the generated part alone, and every id the model may write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ddlm.analysis import record
from ddlm.analysis.beyond import band_masks
from ddlm.analysis.trajectories import Trajectories, nll_half_width
from ddlm.evaluation.intervals import ratio
from ddlm.evaluation.judges import Score
from ddlm.lm import DiffusionLM, load
from ddlm.tracing import _frequency, nll_of, quality_rows, recording_cost, trace_sequences
from sampling.models import write_model


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> DiffusionLM:
    return load(write_model(tmp_path_factory.mktemp("model"), 16), device="cpu")


def drawn_from(lm: DiffusionLM, template: str | None, folder: Path) -> Trajectories:
    arrays, header = trace_sequences(lm, template, sequences=3, steps=5)
    record.write(folder / "t.npz", "trajectories", header, arrays)
    return Trajectories.load(folder / "t.npz")


class Judge:
    """One nat for every character that counts."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[tuple[int, int]]]] = []

    def score(self, texts: Sequence[str], ranges: Any = None) -> list[Score]:
        ranges = [[(0, len(t))] for t in texts] if ranges is None else ranges
        self.asked += zip(texts, ranges, strict=True)
        counts = [sum(b - a for a, b in r) for r in ranges]
        return [Score(2.0 * n, n, 0.0, len(t)) for n, t in zip(counts, texts, strict=True)]


def test_the_judge_counts_what_was_generated(lm: DiffusionLM, tmp_path: Path) -> None:
    judge = Judge()
    row, *_ = quality_rows(lm, drawn_from(lm, "the river {6} sea", tmp_path), [], judge)
    assert judge.asked
    for text, ((start, end),) in judge.asked:
        assert (text[:start], text[end:]) == ("the river", " sea")
    assert row["nll_tokens"] == sum(b - a for _, ((a, b),) in judge.asked)
    written = Judge()
    quality_rows(lm, drawn_from(lm, None, tmp_path), [], written)
    assert all(ranges == [(0, len(text))] for text, ranges in written.asked)


def test_a_text_of_blanks_is_judged_too(lm: DiffusionLM, tmp_path: Path) -> None:
    """Early exit leaves such texts, and the figure exists to show what it leaves."""
    drawn = drawn_from(lm, None, tmp_path)
    end = lm.tokenizer.end_id
    drawn.tokens[0] = end
    judge = Judge()
    row, *_ = quality_rows(lm, drawn, [], judge)
    assert len(judge.asked) == 3
    assert not judge.asked[0][0].strip()
    assert row["texts_judged"] == 3


def test_the_interval_of_few_texts_is_that_of_the_tables() -> None:
    nats, tokens = [8.0, 10.0, 31.0, 12.0], [2, 4, 8, 5]
    row = nll_of(nats, tokens)
    want = ratio(nats, tokens, range(4), "texts")
    assert row["nll"] == pytest.approx(want.value)
    assert row["nll_half_width"] == pytest.approx((want.high - want.low) / 2)
    assert nll_half_width(row) == row["nll_half_width"]
    assert nll_half_width({"nll_error": 0.5}) == pytest.approx(0.98)  # an older study
    assert nll_half_width(nll_of([1.0], [2])) is None


def test_ids_beyond_the_tokenizer_are_among_the_rarest(lm: DiffusionLM, tmp_path: Path) -> None:
    """A model may have more outputs than its tokenizer has entries."""
    entries, outputs = len(lm.tokenizer), lm.config.model.vocab_size
    assert entries < outputs
    shards = SimpleNamespace(
        tokens=lambda split: 10 * entries, read=lambda *_: np.repeat(np.arange(entries), 10)
    )
    header, arrays = _frequency(lm, shards)
    assert len(arrays["counts"]) == outputs
    drawn = drawn_from(lm, None, tmp_path)
    drawn.tokens[:, -1] = outputs - 1
    for counts in (arrays["counts"], arrays["counts"][:entries]):  # the last as recorded before
        record.write(tmp_path / "f.npz", "frequency", header, {"counts": counts})
        masks = band_masks(drawn, record.read(tmp_path / "f.npz"))
        assert [int(m.sum()) for _, m in masks] == [0, 0, 0, int(drawn.generated.sum())]


def test_the_cost_of_recording_is_that_of_what_is_recorded(
    lm: DiffusionLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model may refine by default; rounds are in no trace, and their time would hide the cost."""
    monkeypatch.setattr(lm.config.sample, "refine", 2)
    steps: list[int] = []
    generate = lm.generate

    def watched(*args: Any, **options: Any) -> Any:
        texts = generate(*args, **options)
        steps.extend(t.steps for t in texts)
        return texts

    monkeypatch.setattr(lm, "generate", watched)
    recording_cost(lm, sequences=1, steps=3, rounds=1)
    assert set(steps) == {3}
