"""MAUVE against mauve-text, its features against mauve-text's own."""

import os
import subprocess
import sys
from types import SimpleNamespace

import mauve as reference
import numpy as np
import pytest

from ddlm.evaluation import mauve
from ddlm.evaluation.mauve import Featurizer
from ddlm.evaluation.measure import Units, measure_row
from ddlm.evaluation.report import half_width
from ddlm.evaluation.samples import Sample
from ddlm.types import ConfigError, DataError
from evaluation.small import save_gpt2, sentences


@pytest.fixture(scope="module")
def clouds():
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(200, 8)).astype(np.float32),
        (rng.normal(size=(160, 8)) * 1.3 + 0.3).astype(np.float32),
    )


def test_the_score_is_mauve_texts_own(clouds):
    ours = mauve.mauve(*clouds, seeds=(25, 3), redo=2, iterations=50)
    for seed, score in zip((25, 3), ours.per_seed, strict=True):
        out = reference.compute_mauve(
            p_features=clouds[0],
            q_features=clouds[1],
            seed=seed,
            kmeans_num_redo=2,
            kmeans_max_iter=50,
        )
        assert score == pytest.approx(out.mauve, abs=1e-6)
        assert ours.buckets == out.num_buckets == 16
    assert ours.mauve == pytest.approx(np.mean(ours.per_seed))
    assert ours.interval[0] < ours.mauve < ours.interval[1]
    assert (ours.references, ours.samples, ours.scaling) == (200, 160, 5)


def test_defaults_are_mauve_texts(clouds):
    out = reference.compute_mauve(p_features=clouds[0], q_features=clouds[1])
    assert mauve.mauve(*clouds).mauve == pytest.approx(out.mauve, abs=1e-6)


def test_area_of_histograms_equals_mauve_texts(clouds):
    out = reference.compute_mauve(p_features=clouds[0], q_features=clouds[1], kmeans_num_redo=1)
    same = mauve.area(out.p_hist[None], out.q_hist[None])
    assert same[0] == pytest.approx(out.mauve, abs=1e-9)


def test_the_interval_covers_what_other_samples_of_the_same_source_score():
    """Fresh draws of both sides stay within the interval about as often as 95% says."""
    rng = np.random.default_rng(1)

    def draw():
        return rng.normal(size=(150, 3)).astype(np.float32), (
            rng.normal(size=(150, 3)) + 0.7
        ).astype(np.float32)

    scores = [mauve.mauve(*draw(), redo=1, iterations=30, buckets=5) for _ in range(30)]
    centre = np.mean([s.mauve for s in scores])
    inside = np.mean([s.interval[0] <= centre <= s.interval[1] for s in scores])
    assert 0.75 <= inside <= 1
    widths = np.array([s.interval[1] - s.interval[0] for s in scores])
    spread = np.std([s.mauve for s in scores])
    assert 0.5 < np.median(widths) / (2 * 1.96 * spread) < 2


def test_features_are_mauve_texts_own(judge_folder, tmp_path):
    import torch
    from mauve.utils import featurize_tokens_from_model
    from transformers import AutoModel, AutoTokenizer

    texts = [t for n in (3, 12, 7) for t in sentences(5, seed=n, words=n)]
    features = Featurizer(str(judge_folder), cache=tmp_path, batch_tokens=70)(texts)
    tokenizer = AutoTokenizer.from_pretrained(judge_folder)
    rows = [torch.tensor([tokenizer.encode(t)]) for t in texts]
    expected = featurize_tokens_from_model(AutoModel.from_pretrained(judge_folder).eval(), rows, 4)
    np.testing.assert_allclose(features, expected.numpy(), atol=1e-5)


def test_features_are_cached_by_content(judge_folder, tmp_path, monkeypatch):
    texts = sentences(25, seed=8)
    first = Featurizer(str(judge_folder), cache=tmp_path)(texts)
    again = Featurizer(str(judge_folder), cache=tmp_path)
    monkeypatch.setattr(Featurizer, "_forward", lambda *a: pytest.fail("the cache was not used"))
    np.testing.assert_array_equal(again(texts), first)
    with pytest.raises(pytest.fail.Exception):
        again(texts[:-1])
    other = Featurizer(str(save_gpt2(tmp_path / "other", seed=2)), cache=tmp_path)
    with pytest.raises(pytest.fail.Exception):
        other(texts)


def test_equal_texts_are_read_once(judge_folder, tmp_path, monkeypatch):
    feature = Featurizer(str(judge_folder), cache=tmp_path)
    a, b = sentences(2)
    read = []
    forward = feature._forward
    monkeypatch.setattr(
        feature, "_forward", lambda rows, progress: read.extend(rows) or forward(rows, progress)
    )
    found = feature([a, b, a, a])
    assert len(read) == 2
    assert np.array_equal(found, feature([a, b])[[0, 1, 0, 0]])


def test_what_cannot_be_compared_is_named(clouds, judge_folder, tmp_path):
    p, q = clouds
    with pytest.raises(DataError, match="19 sample texts: MAUVE needs at least 20"):
        mauve.mauve(p, q[:19])
    with pytest.raises(DataError, match="width 8 and 7"):
        mauve.mauve(p, q[:, :7])
    with pytest.raises(ConfigError, match="161 MAUVE buckets for 160 texts"):
        mauve.mauve(p, q, buckets=161)
    broken = q.copy()
    broken[4, 0] = np.inf
    with pytest.raises(DataError, match="sample text 5 are not finite"):
        mauve.mauve(p, broken)
    features = Featurizer(str(judge_folder), cache=tmp_path)
    with pytest.raises(DataError, match="text 2 is empty"):
        features(["fine", ""])
    with pytest.raises(DataError, match=r"text 1 has .* tokens, but"):
        features(["word " * 90])
    with pytest.raises(ConfigError, match="no feature model folder"):
        Featurizer(str(tmp_path / "none"), cache=tmp_path)


def test_what_the_clustering_writes_stays_off_the_terminal(clouds, capfd):
    mauve.mauve(*clouds, redo=1, iterations=20)
    os.write(2, b"heard again")
    assert capfd.readouterr() == ("", "heard again")


def test_a_failure_of_the_clustering_comes_through(clouds, capfd, monkeypatch):
    def fails(**options):
        os.write(2, b"unheard")
        raise RuntimeError("of the clustering")

    monkeypatch.setattr(mauve, "missing_extra", lambda *a: SimpleNamespace(compute_mauve=fails))
    with pytest.raises(RuntimeError, match="of the clustering"):
        mauve.mauve(*clouds)
    os.write(2, b"heard again")
    assert capfd.readouterr() == ("", "heard again")


def test_a_closed_stderr_is_no_failure(tmp_path):
    code = "import os, sys; os.close(2); from ddlm.evaluation.extras import no_stderr\n"
    code += "with no_stderr(): pass\nprint('done')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_a_side_against_itself_is_one_and_never_more(clouds):
    """The trapezia of equal histograms may add up to a rounding above 1."""
    for buckets in range(2, 12):
        same = mauve.mauve(clouds[0], clouds[0], buckets=buckets, redo=1, iterations=20)
        assert 1 - 1e-6 < same.mauve <= 1
        assert same.interval[1] <= 1


@pytest.mark.parametrize("shift", [0.0, 2.5])
def test_a_row_keeps_the_width_of_a_score_near_0_or_1(shift):
    """Cut at 0 and 1 once, not before half of the interval is taken."""
    rng = np.random.default_rng(4)
    human = rng.normal(size=(40, 3)).astype(np.float32)
    machine = (rng.normal(size=(40, 3)) + shift).astype(np.float32)

    def features(texts, progress=None):
        return human if texts[0].startswith("real") else machine

    made = [Sample(f"made {i} {i + 1}") for i in range(40)]
    row = measure_row(
        "a",
        "unconditional",
        made,
        units=Units("words"),
        features=features,
        references=[f"real {i}" for i in range(40)],
    )
    alone, found = mauve.mauve(human, machine), row.metrics["mauve"]
    assert alone.half_width > min(alone.mauve, 1 - alone.mauve)  # one side is cut
    assert found.value == alone.mauve
    assert (found.low, found.high) == alone.interval
    assert half_width(found) == pytest.approx(alone.half_width)
