"""AR-NLL against the judge's own loss, and what a judge refuses."""

import json
import math

import numpy as np
import pytest
import torch

from ddlm.evaluation import judges
from ddlm.evaluation.judges import Judge, mean_nll
from ddlm.files import write_tensors
from ddlm.types import ConfigError, DataError
from evaluation.small import save_gpt2, sentences


@pytest.fixture
def judge(judge_folder, tmp_path):
    return Judge(str(judge_folder), cache=tmp_path / "cache", batch_tokens=200, device="cpu")


@pytest.fixture(scope="module")
def reference(judge_folder):
    """The model and tokenizer as transformers loads them, apart from our code."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(judge_folder).eval()
    return model, transformers.AutoTokenizer.from_pretrained(judge_folder)


def own_loss(reference, text, from_token=0):
    """Sum and number of the judge's own loss terms of one text after the beginning-of-text token."""
    model, tokenizer = reference
    ids = [tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    labels = [-100] * (1 + from_token) + ids[1 + from_token :]
    with torch.no_grad():
        loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
    count = sum(label != -100 for label in labels[1:])
    return float(loss) * count, count


def test_unconditional_nll_is_the_judges_own_loss(judge, reference):
    texts = [
        *sentences(12, seed=1),
        "Ünïcödé 🌊 text, split into bytes!",
        "  spaces   kept \n\nand lines",
    ]
    scores = judge.score(texts)
    total = count = 0.0
    for text, score in zip(texts, scores, strict=True):
        nll, tokens = own_loss(reference, text)
        assert score.tokens == score.whole_tokens == tokens
        assert score.nll == pytest.approx(nll, rel=1e-6)
        total, count = total + nll, count + tokens
    assert mean_nll(scores).nll == pytest.approx(total / count, rel=1e-6)
    assert mean_nll(scores).tokens == count


def test_conditional_nll_counts_the_continuation_only(judge, reference):
    prompts = sentences(6, seed=2, words=4)
    texts = [p[:-1] + " " + s for p, s in zip(prompts, sentences(6, seed=3, words=7), strict=True)]
    starts = [len(p) - 1 for p in prompts]
    scores = judge.score(texts, [[(a, len(t))] for a, t in zip(starts, texts, strict=True)])
    _, tokenizer = reference
    for text, start, score in zip(texts, starts, scores, strict=True):
        given = len(tokenizer.encode(text[:start], add_special_tokens=False))
        nll, tokens = own_loss(reference, text, from_token=given)
        assert (score.tokens, score.nll) == (tokens, pytest.approx(nll, rel=1e-6))
        whole, whole_tokens = own_loss(reference, text)
        assert (score.whole_tokens, score.whole_nll) == (
            whole_tokens,
            pytest.approx(whole, rel=1e-6),
        )


def test_infilled_text_counts_its_middle_only(judge):
    text = "The river walked into the green sea."
    a, b = text.index(" walked"), text.index(" the green")
    left, middle, right = ((0, a), (a, b), (b, len(text)))
    parts = judge.score([text] * 3, [[left], [middle], [right]])
    whole = judge.score([text])[0]
    assert sum(p.nll for p in parts) == pytest.approx(whole.nll, rel=1e-6)
    assert sum(p.tokens for p in parts) == whole.tokens
    assert judge.score([text], [[left, right]])[0].nll == pytest.approx(
        parts[0].nll + parts[2].nll, rel=1e-6
    )


def test_a_token_that_straddles_the_boundary_is_scored():
    offsets = [
        (0, 3),
        (4, 9),
        (9, 12),
    ]  # the space before a word is part of the token, not of its offsets
    assert judges._generated(offsets, [(3, 12)]) == [False, True, True]
    assert judges._generated(offsets, [(7, 12)]) == [False, True, True]
    assert judges._generated(offsets, [(9, 12)]) == [False, False, True]
    assert judges._generated([(0, 1), (0, 1), (1, 2)], [(1, 2)]) == [
        False,
        False,
        True,
    ]  # one character, two tokens


def test_batching_changes_no_score(judge_folder, tmp_path):
    texts = [t for n in (2, 5, 9, 13) for t in sentences(4, seed=n, words=n)]
    one = Judge(str(judge_folder), cache=tmp_path / "a", batch_tokens=1).score(texts)
    all_ = Judge(str(judge_folder), cache=tmp_path / "b", batch_tokens=10_000).score(texts)
    np.testing.assert_allclose([s.nll for s in one], [s.nll for s in all_], rtol=1e-5)


def test_bf16_is_close_and_kept_apart_in_the_cache(judge_folder, tmp_path):
    texts = sentences(5, seed=4)
    full = mean_nll(Judge(str(judge_folder), cache=tmp_path).score(texts)).nll
    half = mean_nll(Judge(str(judge_folder), cache=tmp_path, precision="bf16").score(texts)).nll
    assert half == pytest.approx(full, rel=0.02)
    assert half != full


def test_scores_are_cached_by_content_and_resumed(judge_folder, tmp_path, monkeypatch):
    texts = sentences(10, seed=5)
    first = Judge(str(judge_folder), cache=tmp_path, batch_tokens=60)
    seen = []

    def stop(done, total):
        seen.append(done)
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.score(texts, progress=stop)
    cache = next((tmp_path / "judge").glob("*.jsonl"))
    with cache.open("a") as file:
        file.write('["torn, [1.0')  # a killed writer's last line
    again = Judge(str(judge_folder), cache=tmp_path, batch_tokens=60)
    progress = []
    scores = again.score(texts, progress=lambda done, total: progress.append(done))
    assert progress[0] == seen[-1] >= 4
    clean = Judge(str(judge_folder), cache=tmp_path / "clean", batch_tokens=60).score(texts)
    np.testing.assert_allclose([s.nll for s in scores], [s.nll for s in clean], rtol=1e-6)
    # A third run computes nothing at all: the model is not even loaded.
    third = Judge(str(judge_folder), cache=tmp_path)
    monkeypatch.setattr(Judge, "_load", lambda self: pytest.fail("the cache was not used"))
    assert third.score(texts) == scores
    # Other ranges of the same text are another entry.
    with pytest.raises(pytest.fail.Exception):
        third.score(texts[:1], [[(0, 5)]])


def test_other_weights_never_share_a_cache(judge_folder, tmp_path):
    other = save_gpt2(tmp_path / "other", seed=1)
    text = sentences(1, seed=6)
    assert Judge(str(judge_folder), cache=tmp_path).score(text) != Judge(
        str(other), cache=tmp_path
    ).score(text)


@pytest.mark.parametrize(
    ("texts", "ranges", "message"),
    [
        (["fine", ""], None, "text 2 is empty"),
        (
            ["fine", "word " * 80],
            None,
            "text 2 has .* judge tokens .* is 64: take a judge with a longer context",
        ),
        (["some text"], [[(4, 4)]], "text 1 has no generated character"),
        (["some text"], [], "1 texts but 0 entries"),
    ],
)
def test_what_cannot_be_scored_is_named(judge, texts, ranges, message):
    with pytest.raises(DataError, match=message):
        judge.score(texts, ranges)


def test_a_non_finite_likelihood_is_named(tmp_path):
    folder = save_gpt2(tmp_path / "broken")
    judge = Judge(str(folder), cache=tmp_path)
    torch.nn.init.constant_(judge._load().transformer.ln_f.weight, math.nan)
    with pytest.raises(DataError, match=r"text 1: the likelihood .* is not finite"):
        judge.score(["some text"])


def test_a_judge_that_cannot_be_had_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="no judge folder at"):
        Judge(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"config.json"):
        Judge(str(tmp_path))
    import huggingface_hub

    def offline(*args, **kwargs):
        raise huggingface_hub.errors.OfflineModeIsEnabled("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        ConfigError,
        match=r"neither a local folder .* --judge PATH, .*--judge smollm2.* or train one with `ddlm baseline`",
    ):
        Judge("EleutherAI/gpt-neo-1.3B", cache=tmp_path)


def test_a_judge_never_scores_what_it_was_trained_on(judge_folder, tmp_path):
    folder = save_gpt2(tmp_path / "judge")
    judge = Judge(str(folder), cache=tmp_path)
    judge.check_held_out([1, 2, 3])  # nothing is known about a judge from elsewhere
    hashes = np.array([2, 5, 2**63 + 9], dtype=np.uint64)  # one that needs the sign bit of int64
    write_tensors(
        folder / judges.TRAINED_HASHES, {"hashes": torch.from_numpy(hashes.view(np.int64))}
    )
    (folder / judges.TRAINED_ON).write_text(json.dumps({"tokens": 3}))
    judge.check_held_out([1, 3])
    with pytest.raises(
        DataError, match="2 of 3 documents of the validation split are training data"
    ):
        judge.check_held_out([1, 2, 2**63 + 9], "the validation split")
    assert judge.describe()["trained_here_on"] == {"tokens": 3}


def test_text_that_looks_like_a_special_token_is_text(judge):
    score = judge.score(["a <|end|> b"])[0]
    assert score.tokens == len("a") + len("Ġ") + len(["<", "|", "e", "nd", "|", ">"]) + 2
