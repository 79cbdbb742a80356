"""Samples with prompts beside real text: the same stretch of each is counted."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ddlm.cli import main
from ddlm.commands.evaluate import evaluate
from ddlm.evaluation import diversity
from ddlm.evaluation.compare import compare, sanity_sets
from ddlm.evaluation.judges import Judge
from ddlm.evaluation.samples import Sample, write_samples
from ddlm.types import DataError
from evaluation.small import sentences

GIVEN, WRITTEN = 10, 12


def parts(text, count=GIVEN):
    words = text.split(" ")
    return " ".join(words[:count]), " ".join(words[count:])


@pytest.fixture
def real():
    return sentences(12, seed=40, words=GIVEN + WRITTEN)


@pytest.fixture
def made(real):
    """Two continuations of each prompt, of about the words of the real one."""
    return [
        Sample(f"{parts(text)[0]} {other}", prompt=parts(text)[0], reference=text, seed=k)
        for k in range(2)
        for text, other in zip(real, sentences(12, seed=41 + k, words=WRITTEN), strict=True)
    ]


def test_the_same_stretch_of_real_text_and_sanity_rows_is_counted(real, made):
    rows = compare("made", made, [])
    assert {r.task for r in rows} == {"conditional"}
    assert [r.facts["generated_units"] / r.facts["samples"] for r in rows] == [WRITTEN] * 5
    assert {r.facts["group_size"] for r in rows} == {2}
    expected = diversity.measure(
        diversity.word_ids(parts(text)[1] for text in real), diversity.consecutive(12, 2)
    )
    row = {r.name: r for r in rows}["real text"]
    assert row.metrics["dist_2"].value == pytest.approx(expected.dist[1])
    assert row.metrics["self_bleu"].value == expected.self_bleu
    of_file = compare("made", made, [Sample(text) for text in real])
    assert [r.metrics for r in of_file] == [r.metrics for r in rows]


def test_real_text_has_the_likelihood_of_its_continuations(made, judge_folder, tmp_path):
    judge = Judge(str(judge_folder), cache=tmp_path)
    rows = compare("made", made, [], judge=judge, sanity=False)
    assert rows[1].metrics["nll"].value == rows[0].metrics["nll_reference"].value
    assert rows[1].facts["tokens_scored"] == rows[0].facts["tokens_scored_reference"]


def test_sanity_sets_keep_what_was_given():
    text = "The old man saw\n the river again and again under it."
    ids = list(range(20, 32))
    noised = [False] * 4 + [True] * 5 + [False] * 3
    base = [
        Sample(text, tokens=ids, is_noised=noised, generated=[(15, 35)], seed=k) for k in range(4)
    ]
    sets = dict(sanity_sets(base, 0))
    for name, made in sets.items():
        for sample in made:
            (start, end) = sample.ranges()[0]
            assert sample.text[:start] == text[:15], name
            assert sample.text[end:] == text[35:], name
            assert sample.tokens[:4] + sample.tokens[9:] == ids[:4] + ids[9:], name
            assert set(sample.tokens[4:9]) <= set(ids[4:9]), name
    for sample in sets["shuffled text"]:
        assert sorted(sample.generated_text().split()) == sorted(text[15:35].split())
        assert sorted(sample.tokens) == ids
    assert [s.seed for s in sets["one line repeated"]] == [0, 1, 2, 3]


def test_tokens_of_a_reference_are_cut_as_the_samples_are(made, real):
    """Where they are not known to stand side by side, words count."""
    mask = [False] * 4 + [True] * 6
    with_ids = [replace(s, tokens=[*range(10)], is_noised=mask) for s in made]
    like = [Sample(text, tokens=[*range(5, 15)]) for text in real]
    rows = compare("made", with_ids, like)
    assert [r.facts["units"] for r in rows] == ["own tokens"] * 5
    assert [r.facts["generated_units"] / r.facts["samples"] for r in rows] == [6] * 5
    longer = [replace(s, tokens=[*range(11)]) for s in like]
    assert compare("made", with_ids, longer)[1].facts["units"] == "words"


def test_generated_parts_of_unlike_length_are_refused(real, made):
    """Long prompts made the whole texts alike."""
    short = [replace(s, text=f"{s.prompt} {' '.join(parts(s.text)[1].split()[:5])}") for s in made]
    whole = [len(x.split()) for s in short for x in (s.text, s.reference)]
    assert max(whole) < 1.5 * min(whole)
    with pytest.raises(DataError, match=r"the references have 12 words .*, the samples 5"):
        compare("short", short, [])


def test_whole_real_texts_beside_continuations_are_noted(made, tmp_path):
    others = sentences(12, seed=50, words=GIVEN + WRITTEN)
    write_samples(tmp_path / "real.jsonl", [Sample(t) for t in others])
    write_samples(tmp_path / "made.jsonl", made)
    evaluate(
        samples=tmp_path / "made.jsonl",
        reference=tmp_path / "real.jsonl",
        judge="none",
        features="none",
        out=tmp_path / "out",
    )
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    tasks = {r["name"]: r["task"] for r in record["results"]["rows"]}
    assert (tasks["made"], tasks["real text"]) == ("conditional", "unconditional")
    line = "Of made only what was generated counts, of real text, shuffled text, unigram draws,"
    assert line in (tmp_path / "out" / "table.md").read_text()
    # The same prompts: nothing to note.
    evaluate(samples=tmp_path / "made.jsonl", judge="none", features="none", out=tmp_path / "own")
    assert "only what was generated" not in (tmp_path / "own" / "table.md").read_text()


def measured(made, folder, capsys, *more):
    """What `ddlm evaluate --samples` prints, and its table."""
    folder.mkdir()
    write_samples(folder / "made.jsonl", made)
    command = ["evaluate", "--samples", str(folder / "made.jsonl"), "--features", "none"]
    assert main([*command, "--out", str(folder / "out"), *more]) == 0
    return capsys.readouterr().out, (folder / "out" / "table.md").read_text()


def test_samples_of_which_some_are_continuations_are_noted(made, tmp_path, capsys):
    free = [Sample(t, seed=s.seed) for s, t in zip(made, sentences(24, seed=60), strict=True)]
    mixed = [a if i % 2 else b for i, (a, b) in enumerate(zip(made, free, strict=True))]
    given = "12 of 24 samples have a given part: of these only what was generated counts"
    own = "12 of 24 samples have a reference: rows of real text and sanity rows are made of these"
    for text in measured(mixed, tmp_path / "mixed", capsys, "--judge", "none"):
        assert given in text
        assert own in text
    rows = compare("made", mixed, [], sanity=False)
    assert [r.task for r in rows] == ["partly conditional", "conditional"]
    for text in measured(made, tmp_path / "all", capsys, "--judge", "none"):
        assert "24 samples have" not in text


def test_tokens_that_do_not_say_which_were_written_are_no_hindrance(made, tmp_path, capsys):
    silent = [replace(s, tokens=[1, 2, 3], is_noised=None) for s in made]
    assert not silent[0].tells_generated_tokens
    said, table = measured(silent, tmp_path / "silent", capsys, "--judge", "none")
    for text in (said, table):
        assert "shuffled text" in text
        assert "unigram draws" in text


def test_some_samples_without_a_reference_are_noted(made, judge_folder, tmp_path, capsys):
    some = [replace(s, reference=None if i % 3 else s.reference) for i, s in enumerate(made)]
    for text in measured(some, tmp_path / "some", capsys, "--judge", str(judge_folder)):
        assert "8 of 24 samples have a reference: rows of real text" in text
        assert "No real NLL: 8 of 24 samples have a reference." in text
        assert "given part" not in text
    for text in measured(made, tmp_path / "all", capsys, "--judge", str(judge_folder)):
        assert "No real NLL" not in text


def test_references_with_their_own_prompts_stay_as_they_are(made, real):
    given = [Sample(text, prompt=parts(text)[0]) for text in real]
    rows = compare("made", [replace(s, reference=None) for s in made], given)
    assert {r.task for r in rows} == {"conditional"}
    assert rows[1].facts["generated_units"] == 12 * WRITTEN
    with pytest.raises(DataError, match="the references have 2 words"):
        compare("made", made, [Sample(t, prompt=parts(t, 20)[0]) for t in real])


def test_too_few_texts_for_mauve_are_said(judge_folder, tmp_path, capsys):
    for name, seed in (("made", 1), ("real", 2)):
        rows = [json.dumps({"text": text}) for text in sentences(12, seed=seed)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    command = ["evaluate", "--samples", str(tmp_path / "made.jsonl"), "--judge", "none"]
    command += ["--reference", str(tmp_path / "real.jsonl"), "--features", str(judge_folder)]
    assert main([*command, "--out", str(tmp_path / "out"), "--no-sanity"]) == 0
    said = "No MAUVE: 12 texts, MAUVE needs at least 20."
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "out" / "table.md").read_text()


def test_what_is_too_short_is_named_with_its_set():
    made = [Sample(t) for t in sentences(6, seed=1)]
    with pytest.raises(DataError, match=r"^real text: sample 2 is too short: .*--tokenizer"):
        compare("made", made, [made[0], Sample("川" * 30), *made[1:]])
    with pytest.raises(DataError, match=r"^real text: 1 sample given"):
        compare("made", made, made[:1])


def test_features_without_real_text_are_said(tmp_path, capsys):
    write_samples(tmp_path / "made.jsonl", [Sample(t) for t in sentences(6, seed=1)])
    command = ["evaluate", "--samples", str(tmp_path / "made.jsonl"), "--judge", "none"]
    said = "No MAUVE: no reference texts."
    (tmp_path / "asked").mkdir()
    (tmp_path / "asked" / "curves.svg").write_text("of a model")
    for features, out in (("smollm2", "asked"), ("none", "not")):
        more = ["--features", features, "--no-sanity", "--out", str(tmp_path / out)]
        assert main([*command, *more]) == 0
        for text in (capsys.readouterr().out, (tmp_path / out / "table.md").read_text()):
            assert (said in text) is (features != "none")
    assert not (tmp_path / "asked" / "curves.svg").exists(), "it would show another measurement"


def test_a_reference_that_the_judge_cannot_read_is_named_as_one(made, judge_folder):
    judge = Judge(str(judge_folder))
    long = f"{made[1].reference} {'river ' * 60}"
    made[1] = replace(made[1], reference=long)
    with pytest.raises(
        DataError, match=r"^made: of the different references, text 2 has \d+ judge"
    ):
        compare("made", made, [Sample(s.text) for s in made], judge=judge)
