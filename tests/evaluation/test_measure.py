"""Rows, intervals, and the measurement of any model's sample file."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from ddlm.commands.evaluate import evaluate
from ddlm.evaluation import diversity, report
from ddlm.evaluation.compare import compare, sanity_sets
from ddlm.evaluation.judges import Judge, mean_nll
from ddlm.evaluation.measure import (
    Estimate,
    Units,
    choose_units,
    group_names,
    measure_row,
    replicates,
    spread,
)
from ddlm.evaluation.results import set_sizes, what_is_absent
from ddlm.evaluation.samples import Sample, read_samples
from ddlm.types import DataError
from evaluation.small import sentences


def write(file, rows):
    file.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    return file


@pytest.fixture
def samples():
    texts = sentences(40, seed=20)
    return [Sample(t, seed=i % 4) for i, t in enumerate(texts)]


def test_the_interval_is_the_t_interval_of_the_replicates():
    values = [1.0, 2.0, 4.0, 5.0]
    found = spread(3.0, values, "seeds")
    low, high = scipy.stats.t.interval(0.95, 3, loc=3.0, scale=scipy.stats.sem(values))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert spread(3.0, [3.0], "seeds") == Estimate(3.0)
    assert spread(math.nan, values, "seeds").low is None


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """Token entropy of samples of a known source, replicated: the interval holds the mean over many draws."""
    rng = np.random.default_rng(0)
    p = 1 / np.arange(1, 41)
    found = []
    for _ in range(60):
        ids = rng.choice(40, size=(50, 30), p=p / p.sum())
        made = [Sample("x", tokens=row.tolist(), seed=i % 5) for i, row in enumerate(ids)]
        found.append(measure_row("a", "unconditional", made, units=Units("own tokens")).metrics)
    for metric in ("token_entropy", "dist_1", "zipf", "sample_entropy"):
        centre = np.mean([f[metric].value for f in found])
        inside = np.mean([f[metric].low <= centre <= f[metric].high for f in found])
        assert inside >= 0.8, metric


def test_replicates_are_the_seeds_or_fifths(samples):
    parts, over = replicates(samples)
    assert over == "seeds"
    assert parts == [list(range(k, 40, 4)) for k in range(4)]
    unseeded = [Sample(s.text) for s in samples]
    parts, over = replicates(unseeded)
    assert (over, sorted(i for p in parts for i in p)) == ("folds", list(range(40)))
    assert replicates([Sample(s.text, seed=i) for i, s in enumerate(samples)])[1] == "folds"
    assert replicates(unseeded[:9]) == ([], "none")


def test_groups_are_the_continuations_of_a_prompt():
    made = [Sample("a b x", prompt="a b"), Sample("c y", prompt="c"), Sample("a b z", prompt="a b")]
    names = group_names(made)
    assert names[0] == names[2] != names[1]
    filled = [Sample("a x c", generated=[(1, 3)]), Sample("a x d", generated=[(1, 3)])]
    assert len(set(group_names(filled))) == 2
    assert group_names([Sample("x")] * 11) == [0] * 5 + [1] * 6


def test_a_row_holds_what_the_parts_compute(samples, judge_folder, tmp_path):
    judge = Judge(str(judge_folder), cache=tmp_path)
    row = measure_row("a", "unconditional", samples, units=Units("words"), judge=judge)
    whole = diversity.measure(diversity.word_ids(s.text for s in samples))
    assert row.metrics["sample_entropy"].value == whole.sample_entropy
    assert [row.metrics[f"dist_{n}"].value for n in (1, 2, 3)] == pytest.approx(list(whole.dist))
    scores = judge.score([s.text for s in samples])
    assert row.metrics["nll"].value == mean_nll(scores).nll
    by_seed = [mean_nll(scores[k::4]).nll for k in range(4)]
    expected = spread(mean_nll(scores).nll, by_seed, "seeds")
    assert row.metrics["nll"] == expected
    assert row.facts["absent"] == {"mauve": "no reference texts"}
    assert row.facts["self_bleu_size"] == 10  # of each seed


def test_every_sample_is_counted_once(samples, monkeypatch):
    """A part of the samples has the means of what its samples have by themselves."""
    counted = []
    distinct = diversity.distinct
    monkeypatch.setattr(diversity, "distinct", lambda *given: counted.append(1) or distinct(*given))
    found = measure_row("a", "unconditional", samples, units=Units("words")).metrics
    assert len(counted) == 6  # of groups and of samples, for one, two and three words
    ids = diversity.word_ids(s.text for s in samples)
    parts, over = replicates(samples)
    pieces = [diversity.measure([ids[i] for i in part]) for part in parts]
    whole = diversity.measure(ids)
    for n in (1, 2, 3):
        values = [p.dist_per_sample[n - 1] for p in pieces]
        assert found[f"dist_{n}_per_sample"] == spread(whole.dist_per_sample[n - 1], values, over)
    for metric in ("sample_entropy", "repetition"):
        values = [getattr(p, metric) for p in pieces]
        assert found[metric] == spread(getattr(whole, metric), values, over)
    for metric in ("token_entropy", "across_entropy", "zipf", "self_bleu"):
        assert found[metric].value == np.mean([getattr(p, metric) for p in pieces])


def test_nll_of_the_real_continuation_is_under_the_same_judge(judge_folder, tmp_path):
    judge = Judge(str(judge_folder), cache=tmp_path)
    real = sentences(10, seed=21)
    cut = [t.index(" ", 25) for t in real]
    made = [
        Sample(t[:c] + " " + other, prompt=t[:c], reference=t, seed=i % 2)
        for i, (t, c, other) in enumerate(
            zip(real, cut, sentences(10, seed=22, words=5), strict=True)
        )
    ]
    row = measure_row("a", "prefix", made, units=Units("words"), judge=judge)
    expected = judge.score(real, [[(c, len(t))] for c, t in zip(cut, real, strict=True)])
    assert row.metrics["nll_reference"].value == pytest.approx(mean_nll(expected).nll)
    foreign = [*made[:9], Sample(**{**vars(made[9]), "reference": made[0].reference})]
    with pytest.raises(DataError, match="it belongs to another"):
        measure_row("a", "prefix", foreign, units=Units("words"), judge=judge)
    short = [*made[:9], Sample(**{**vars(made[9]), "reference": made[9].prompt})]
    with pytest.raises(DataError, match="no longer than its prompt"):
        measure_row("a", "prefix", short, units=Units("words"), judge=judge)


def test_all_sets_are_counted_in_the_same_units(shards):
    with_tokens, without = [Sample("a b", tokens=[1, 2])], [Sample("a b")]
    assert choose_units([with_tokens, with_tokens]).name == "own tokens"
    assert choose_units([with_tokens, without]).name == "words"
    given = choose_units([with_tokens, without], shards.tokenizer, "mine")
    assert given.name == "mine"
    assert given.ids(without) == [shards.tokenizer.encode("a b")]


def test_no_ngram_crosses_a_given_part_and_no_unit_is_invented(shards):
    made = [
        Sample("a b X c d", generated=[(0, 3), (6, 9)]),
        Sample("c d Y a b", generated=[(0, 0), (2, 3), (6, 9)]),
        Sample("a b"),
    ]
    gap = diversity.GAP
    assert Units("words").ids(made) == [[0, 1, gap, 2, 3], [3, gap, 0, 1], [0, 1]]
    crossing = Sample("b c", seed=1)  # "b c" is whole here only
    ids = Units("words").ids([made[0], crossing])
    assert diversity.distinct(diversity.table(ids), 2, np.zeros(2, dtype=np.int64))[0] == 1
    assert Units("words").ids([made[0]] * 2) != Units("words").ids([Sample("a b c d")] * 2)
    encode = shards.tokenizer.encode
    found = Units("mine", shards.tokenizer).ids(made)
    assert found[0] == [*encode("a b"), gap, *encode("c d")]
    assert found[1] == [*encode("d"), gap, *encode("a b")]
    assert found[2] == encode("a b")
    newline = set(encode("\n"))
    assert not newline & {i for row in found for i in row}


def test_sanity_sets_keep_what_they_promise():
    base = [Sample(t, tokens=list(range(i, i + 9))) for i, t in enumerate(sentences(20, seed=23))]
    sets = dict(sanity_sets(base, 0))
    for made, real in zip(sets["shuffled text"], base, strict=True):
        assert sorted(made.text.split()) == sorted(real.text.split())
        assert sorted(made.tokens) == sorted(real.tokens)
        assert made.text != real.text
    words = {w for s in base for w in s.text.split()}
    assert {w for s in sets["unigram draws"] for w in s.text.split()} <= words
    assert len({s.text for s in sets["one line repeated"]}) == 1


def test_blank_texts_stay_texts_in_the_sanity_sets():
    base = [Sample(t, tokens=[1, 2, 3]) for t in ["\n\n", *sentences(4, seed=23)]]
    assert all(s.text for _, made in sanity_sets(base, 0) for s in made)


def test_what_is_left_over_after_groups_of_five_joins_the_last():
    samples = [Sample(t, tokens=list(range(9))) for t in sentences(12, seed=23)]
    row = measure_row("a", "unconditional", samples, units=Units("own tokens"))
    assert row.metrics["dist_1"].value == pytest.approx((9 / 45 + 9 / 63) / 2)
    assert (row.facts["groups"], row.facts["group_size"]) == (2, 7)
    few = measure_row("a", "unconditional", samples[:3], units=Units("own tokens"))
    assert few.metrics["dist_1"].value == pytest.approx(9 / 27)


def test_any_models_sample_file_is_measured(tmp_path, judge_folder, capsys, monkeypatch):
    monkeypatch.setenv("DDLM_CACHE", str(tmp_path / "cache"))
    made = write(tmp_path / "made.jsonl", [{"text": t} for t in sentences(30, seed=24)])
    real = write(tmp_path / "real.jsonl", [{"text": t} for t in sentences(25, seed=25)])
    evaluate(
        samples=made,
        reference=real,
        judge=str(judge_folder),
        features=str(judge_folder),
        out=tmp_path / "out",
    )
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    rows = {r["name"]: r for r in record["results"]["rows"]}
    assert list(rows) == [
        "made",
        "real text",
        "shuffled text",
        "unigram draws",
        "one line repeated",
    ]
    assert record["results"]["facts"]["judge"]["judge"] == str(judge_folder)
    assert all({"nll", "dist_1", "self_bleu", "zipf"} <= set(r["metrics"]) for r in rows.values())
    assert {n for n, r in rows.items() if "mauve" not in r["metrics"]} == {"real text"}
    assert rows["real text"]["facts"]["absent"]["mauve"].startswith("this is the reference")
    line = "sets of 30 samples, except real text 25, shuffled text 25"
    assert line in (tmp_path / "out" / "table.md").read_text()
    shown = capsys.readouterr().out
    assert "made" in shown
    assert "AR-NLL" in shown


def test_bad_sample_files_are_named(tmp_path, judge_folder):
    one = write(tmp_path / "one.jsonl", [{"text": "a b c d"}])
    with pytest.raises(DataError, match="1 sample given: diversity needs at least 2"):
        evaluate(samples=one, judge="none", out=tmp_path / "out")
    empty = write(tmp_path / "empty.jsonl", [{"text": "a b c"}, {"text": ""}])
    with pytest.raises(DataError, match="line 2: the text is empty"):
        evaluate(samples=empty, judge="none", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_few_samples_leave_mauve_out_and_say_why(tmp_path):
    class Never:
        def __call__(self, texts, progress=None):
            raise AssertionError

    made = [Sample(t) for t in sentences(6, seed=26)]
    rows = compare("few", made, made, features=Never())
    assert rows[0].facts["absent"]["mauve"] == "6 texts, MAUVE needs at least 20"
    assert "mauve" not in rows[0].metrics


def test_seeds_with_too_few_samples_for_mauve_are_pooled_and_it_is_said():
    def features(texts, progress=None):
        rng = np.random.default_rng(len(texts))
        return rng.normal(size=(len(texts), 3)).astype(np.float32)

    made = [Sample(t, seed=i % 2) for i, t in enumerate(sentences(60, seed=26))]
    real = sentences(40, seed=27)
    facts = {"features": {"features": "x"}}
    for count, pooled in ((60, False), (30, True)):
        row = measure_row(
            "few",
            "unconditional",
            made[:count],
            units=Units("words"),
            features=features,
            references=real,
        )
        assert row.facts["intervals_over"] == "seeds"
        assert len(row.facts["mauve"]["per_sample_seed"]) == (1 if pooled else 2)
        line = "MAUVE of few: of all seeds' samples together, a seed has 15 and 20 are needed."
        assert what_is_absent([row], facts) == ([line] if pooled else [])


def test_references_of_another_length_are_refused():
    made = [Sample(t) for t in sentences(6, seed=26)]
    longer = [Sample(f"{s.text} {s.text}") for s in made]
    with pytest.raises(DataError, match=r"the references have \d+ words .*, the samples \d+"):
        compare("short", made, longer)
    with pytest.raises(DataError, match="cut both to one length"):
        compare("long", longer, made)
    own = [replace(s, reference=f"{s.text} {s.text} {i}") for i, s in enumerate(made)]
    with pytest.raises(DataError, match="cut both to one length"):
        compare("own", own, [])


def test_the_samples_own_references_are_the_real_text():
    texts = sentences(12, seed=26)
    made = [Sample(t, reference=r) for t, r in zip(texts[:6], texts[6:], strict=True)]
    rows = compare("few", made, [])
    assert [r.name for r in rows] == [
        *("few", "real text", "shuffled text", "unigram draws", "one line repeated")
    ]
    given = compare("few", made, [Sample(t) for t in texts[6:]])
    assert [r.metrics for r in rows] == [r.metrics for r in given]


def test_tables_show_every_number_with_its_interval(tmp_path):
    made = [Sample(t, seed=i % 2) for i, t in enumerate(sentences(20, seed=27))]
    row = measure_row("a|b_c", "unconditional", made, units=Units("words"))
    table = report.to_markdown([row])
    heads, marks, line = table.strip().split("\n")
    assert heads.count("|") == marks.count("|") == line.replace("\\|", "").count("|")
    assert "MAUVE" not in heads
    value = row.metrics["dist_1"]
    assert f"{value.value:.2f} ±{value.high - value.value:.2f}" in line
    assert r"a|b\_c" in report.to_latex([row])
    escaped = r"\textbackslash{}\$x\textasciicircum{}2\textasciitilde{}\{a\}\& $\pm$"
    assert escaped in report.latex(["\\$x^2~{a}& ±"], [])
    assert report.cell(None) == "-"
    assert report.cell(Estimate(1.234)) == "1.23"
    assert report.cell(Estimate(0.95, 0.9, 1.0)) == "0.95 ±0.05"


def test_a_part_of_the_samples_for_self_bleu_is_said():
    made = [Sample(t) for t in sentences(20, seed=27)]
    rows = [
        measure_row("made", "", made, units=Units("words"), self_bleu_size=n) for n in (10, 1000)
    ]
    assert set_sizes(rows[:1]).endswith("sets of 20 samples (self-BLEU: 10 of them).")
    assert set_sizes(rows[1:]).endswith("sets of 20 samples.")


def test_what_the_protocol_writes_can_be_measured_as_a_file(tmp_path):
    rows = [
        {"text": "a b c d e f", "generated": [[1, 11]], "seed": k, "tokens": [1, 2, 3, 4, 5, 6]}
        for k in (0, 1)
    ]
    file = write(tmp_path / "s.jsonl", rows)
    assert read_samples(file)[0].generated == [(1, 11)]
