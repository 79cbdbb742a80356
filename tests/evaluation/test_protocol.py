"""The paper's protocol on a small model: prompts, ranges, seeds, resumption, sanity rows, records."""

import json
import math
import shutil
import sys
from dataclasses import replace

import pytest
import torch

from ddlm.checkpoint import save_model
from ddlm.commands.evaluate import draw_pictures, evaluate, evaluate_model, load_generator
from ddlm.config import Config
from ddlm.data.tokenizer import Tokenizer
from ddlm.diffusion.process import NoiseProcess
from ddlm.evaluation import baseline, diversity, protocol
from ddlm.evaluation.generators import Settings
from ddlm.evaluation.protocol import Protocol
from ddlm.network.denoiser import DDLM
from ddlm.types import ConfigError, DataError

SMALL = Protocol(
    prompts=24,
    continuations=2,
    settings=Settings(steps=4),
    noise_scales=(0.5, 1.0),
    temperatures=(1.0,),
    curve_prompts=10,
)


def small_config(shards):
    config = Config()
    m = config.model
    m.layers, m.heads, m.width, m.feed_forward, m.length = 1, 2, 32, 64, 16
    m.embedding_width, m.time_width, m.vocab_size = 16, 16, shards.vocab_size
    config.process.t_max = 2.5
    config.data.path = str(shards.folder)
    t = config.train
    t.steps, t.batch, t.lr, t.warmup, t.precision = 10, 16, 3e-3, 2, "fp32"
    return config


@pytest.fixture(scope="module")
def model(shards, tmp_path_factory):
    """An untrained diffusion model: enough to walk every path."""
    config = small_config(shards)
    torch.manual_seed(0)
    net = DDLM(config.model, NoiseProcess(config.process.t_min, config.process.t_max))
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return save_model(folder, net, config, tokenizer_from=shards.folder)


@pytest.fixture(scope="module")
def judge(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("judge") / "gpt"
    plan = baseline.make_plan(small_config(shards), shards, "gpt-neox", 64)
    baseline.train_baseline(plan, shards, out)
    return out


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DDLM_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_ranges_are_the_generated_characters(shards):
    tokenizer = shards.tokenizer
    real = shards.document("val", 0)[:16].tolist()
    for task in ("unconditional", "prefix", "infill"):
        mask = protocol.is_noised(task, 16).tolist()
        made = [7 + i if n else t for i, (t, n) in enumerate(zip(real, mask, strict=True))]
        sample = protocol.make_sample(
            tokenizer, made, mask, real if task != "unconditional" else None
        )
        (start, end) = sample.ranges()[0]
        first, last = mask.index(True), 15 - mask[::-1].index(True)
        assert sample.text[:start] == protocol.decode(tokenizer, made[:first])
        assert sample.text[start:end] == protocol.decode(tokenizer, made[first : last + 1])
        assert sample.conditional is (task != "unconditional")


def test_a_character_cut_at_the_boundary_counts_as_generated(shards):
    wave = shards.tokenizer.encode("a🌊b")  # four bytes, four tokens
    assert len(wave) == 6
    mask = [False, False, False, True, True, True]
    other = [*wave[:3], *shards.tokenizer.encode("xyz")]
    sample = protocol.make_sample(shards.tokenizer, other, mask, wave)
    assert sample.ranges()[0][0] == 1
    from ddlm.evaluation.measure import real_range

    assert real_range(sample) == (1, 3)


def test_a_piece_that_reads_otherwise_alone_counts_as_generated(tmp_path):
    """WordPiece's ``##s`` stands bare at the beginning of a text."""
    (tmp_path / "vocab.txt").write_text("[UNK]\n[SEP]\nthe\nriver\n##s\nsea\nflow\n")
    tokenizer = Tokenizer.load(tmp_path / "vocab.txt")
    real, other = (tokenizer.encode(t) for t in ("the river the rivers flow", "the sea seas flow"))
    real = [*real[:2], *real[3:]]
    assert len(real) == len(other) == 5
    mask = [False, True, True, False, False]
    sample = protocol.make_sample(tokenizer, other, mask, real)
    assert sample.text == "the sea seas flow"
    assert sample.generated_text() == " sea sea"
    from ddlm.evaluation.measure import real_range

    start, end = real_range(sample)
    assert sample.reference[start:end] == " river river"


def test_a_space_that_a_given_word_begins_with_is_given(tmp_path):
    """SentencePiece drops the space at the beginning of a text; behind what was generated it is there."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers

    pieces = ["<unk>", "<eos>", "\u2581the", "\u2581old", "\u2581man", "\u2581said", "\u2581sea"]
    fast = Fast(models.WordLevel({x: i for i, x in enumerate(pieces)}, unk_token="<unk>"))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    real, other = tokenizer.encode("the old man said"), tokenizer.encode("the old sea said")
    sample = protocol.make_sample(tokenizer, other, [False, False, True, False], real)
    assert sample.text == "the old sea said"
    assert sample.generated_text() == " sea"


def test_the_end_of_a_document_is_an_empty_line(shards):
    tokenizer = shards.tokenizer
    ids = [*tokenizer.encode("one"), tokenizer.end_id, *tokenizer.encode("two")]
    assert protocol.decode(tokenizer, ids) == "one\n\ntwo"
    assert protocol.decode(tokenizer, [tokenizer.end_id] * 3) == "\n\n" * 3


def test_samples_are_drawn_once_and_each_has_its_own_noise(model, shards, tmp_path, monkeypatch):
    generator, tokenizer, length, data = load_generator(str(model))
    assert (length, data) == (16, str(shards.folder))
    windows = protocol.held_out(shards.folder, tokenizer, 16, 6)
    small = Protocol(prompts=6, continuations=2, length=16)
    args = (small, "prefix", generator, tokenizer, windows, tmp_path, Settings(steps=3))
    first = protocol.draw(*args)
    assert [s.seed for s in first] == [0] * 6 + [1] * 6
    assert len({s.text for s in first}) == 12
    for i, sample in enumerate(first):
        assert sample.tokens[:8] == windows.tokens[i % 6, :8].tolist()
        assert sample.reference == protocol.decode(tokenizer, windows.tokens[i % 6].tolist())
    # An interruption leaves the first seed's file; the rest is drawn again, equal to the first time.
    files = sorted(tmp_path.glob("*.jsonl"))
    files[1].unlink()
    assert protocol.draw(*args) == first
    origins = []
    protocol.draw(*args, None, origins)
    assert len(origins) == 2
    assert origins[0] == origins[1]
    assert origins[0]["hardware"]["threads"] == torch.get_num_threads()
    monkeypatch.setattr(type(generator), "write", lambda *a: pytest.fail("drawn again"))
    assert protocol.draw(*args) == first
    with pytest.raises(pytest.fail.Exception):
        protocol.draw(*args[:-1], Settings(steps=4))


def test_the_protocol_writes_rows_curves_and_sanity(model, judge, shards, tmp_path):
    record = evaluate_model(
        str(model), SMALL, None, str(judge), str(judge), "fp32", tmp_path / "out", show=False
    )
    read = json.loads((tmp_path / "out" / "record.json").read_text())
    assert read["results"] == record["results"]
    rows = {(r["name"], r["task"]): r for r in read["results"]["rows"]}
    assert list(rows) == [
        ("tiny", "unconditional"),
        ("tiny", "prefix-8"),
        ("tiny", "infill-8"),
        ("real text", "unconditional"),
        ("real text", "prefix-8"),
        ("real text", "infill-8"),
        ("shuffled text", "unconditional"),
        ("unigram draws", "unconditional"),
        ("one line repeated", "unconditional"),
    ]
    for row in rows.values():
        metrics = row["metrics"]
        assert math.isfinite(metrics["nll"]["value"])
        assert metrics["nll"]["low"] <= metrics["nll"]["value"] <= metrics["nll"]["high"]
        assert row["facts"]["tokens_scored"] > 0
    assert "nll_reference" in rows["tiny", "prefix-8"]["metrics"]
    assert rows["tiny", "prefix-8"]["facts"]["group_size"] == 2
    assert rows["tiny", "unconditional"]["facts"]["intervals_over"] == "seeds"
    assert {row["facts"]["samples_of_a_set"] for row in rows.values()} == {24}
    assert rows["tiny", "prefix-8"]["metrics"]["nll_reference"]["over"] == "texts"
    for (name, task), row in rows.items():
        if name == "real text" and task != "unconditional":
            assert "compared with itself" in row["facts"]["absent"]["mauve"]
        else:
            assert 0 <= row["metrics"]["mauve"]["value"] <= 1
    # What the sanity rows are for: real text beats noise, one repeated line shows in diversity.
    nll = {
        name: row["metrics"]["nll"]["value"]
        for (name, task), row in rows.items()
        if task == "unconditional"
    }
    assert nll["real text"] < nll["tiny"]
    assert rows["one line repeated", "unconditional"]["metrics"]["across_entropy"]["value"] == 0
    assert rows["one line repeated", "unconditional"]["metrics"]["self_bleu"]["value"] == 1
    curves = [r["name"] for r in read["results"]["curves"]]
    assert curves == ["noise scale 0.5", "noise scale 1", "temperature 1"]
    assert read["results"]["facts"]["judge"]["trained_here_on"]["data"] == shards.hash
    # A point of a curve is a number of the picture too: text stays text in an SVG.
    picture = (tmp_path / "out" / "curves.svg").read_text()
    assert [picture.count(f">{n}<") for n in ("noise scale", "temperature", "real text")] == [1] * 3
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.count("\n| tiny |") == 3
    assert "±" in table
    latex = (tmp_path / "out" / "table.tex").read_text()
    assert latex.count("&") == (latex.count(r"\\")) * (
        latex.split(r"\toprule")[1].split(r"\\")[0].count("&")
    )


@pytest.mark.parametrize(
    ("can", "asked", "used"), [(True, None, "bf16"), (False, None, "fp32"), (True, "fp32", "fp32")]
)
def test_samples_are_drawn_in_what_the_device_computes_in(model, monkeypatch, can, asked, used):
    monkeypatch.setattr("ddlm.device.has_bf16", lambda device: can)
    generator, *_ = load_generator(str(model), asked)
    assert generator.fingerprint.split()[-1] == used


def test_an_autoregressive_baseline_takes_the_same_protocol(judge, shards, tmp_path):
    record = evaluate_model(
        str(judge), SMALL, str(shards.folder), "none", "none", "fp32", tmp_path / "ar", show=False
    )
    tasks = [r.task for r in [*record_rows(record)] if r.name == "gpt"]
    assert tasks == ["unconditional", "prefix-8"]
    assert not (tmp_path / "ar" / "curves.png").exists()


def test_without_a_judge_or_matplotlib_a_line_stands_for_the_picture(tmp_path, monkeypatch):
    row = {"name": "temperature 1", "metrics": {"dist_2": {"value": 0.5, "low": None}}}
    record = {"results": {"rows": [], "curves": [row], "facts": {"judge": None}}}
    (tmp_path / "curves.png").write_text("of an earlier measurement")
    pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'ddlm[plots]'")
    assert draw_pictures(record, tmp_path) == (
        [],
        "no picture of the curves: without a judge there is no AR-NLL to draw",
    )
    assert list(tmp_path.iterdir()) == []
    assert draw_pictures({"results": {"curves": []}}, tmp_path) == ([], "")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    files, note = draw_pictures(record, tmp_path)
    assert (files, note.count("\n")) == ([], 0)
    assert "pip install 'ddlm[plots]'" in note


@pytest.mark.parametrize("task", ["prefix", "infill"])
def test_real_text_is_counted_where_a_task_writes(model, judge_folder, shards, tmp_path, task):
    """Its row beside a task's: as many tokens, in groups as large, and as likely as the references are."""
    few = replace(SMALL, tasks=("unconditional", task), noise_scales=(), temperatures=())
    few = replace(few, continuations=3, prompts=12)
    out = tmp_path / "out"
    record = evaluate_model(
        str(model), few, None, str(judge_folder), "none", "fp32", out, show=False
    )
    rows = {(r.name, r.task): r for r in record_rows(record)}
    ours, real = rows["tiny", f"{task}-8"], rows["real text", f"{task}-8"]
    assert real.facts["generated_units"] == 12 * 8
    for fact in ("group_size", "samples_of_a_set", "units"):
        assert real.facts[fact] == ours.facts[fact]
    windows = protocol.held_out(shards.folder, shards.tokenizer, 16, 12)
    part = windows.tokens[:, 8:] if task == "prefix" else windows.tokens[:, 4:12]
    expected = diversity.measure(part.tolist(), [i // 3 for i in range(12)])
    found = {k: e["value"] for k, e in real.metrics.items()}
    assert [found[f"dist_{n}"] for n in (1, 2, 3)] == pytest.approx(list(expected.dist))
    for metric in ("self_bleu", "token_entropy", "zipf"):
        assert found[metric] == getattr(expected, metric)
    assert found["nll"] == pytest.approx(ours.metrics["nll_reference"]["value"])
    assert "nll_reference" not in found
    assert rows["real text", "unconditional"].facts["generated_units"] == 12 * 16
    line = f"Tokens of a text that count: unconditional 16; {task}-8 8."
    assert line in (out / "table.md").read_text()


def test_rows_of_one_stretch_have_nothing_to_say_of_it(model, tmp_path, capsys):
    few = replace(SMALL, prompts=5, noise_scales=(), temperatures=(), tasks=("unconditional",))
    evaluate_model(str(model), few, None, "none", "none", "fp32", tmp_path)
    assert "Tokens of a text" not in capsys.readouterr().out
    few = replace(few, tasks=("unconditional", "prefix"), sanity=False)
    evaluate_model(str(model), few, None, "none", "none", "fp32", tmp_path)
    shown = " ".join(capsys.readouterr().out.split())
    assert "unconditional 16; prefix-8 8. All measures but MAUVE" in shown
    assert "Real text has a row" not in shown


def record_rows(record):
    from types import SimpleNamespace

    return [SimpleNamespace(**r) for r in record["results"]["rows"]]


def test_a_judge_trained_on_the_prompts_is_refused(model, judge, shards, tmp_path):
    text = shards.tokenizer.decode(shards.document("train", 0).tolist())
    file = tmp_path / "seen.jsonl"
    file.write_text("\n".join(json.dumps({"text": t}) for t in [text, text + " more of it"]))
    with pytest.raises(DataError, match="never scores what it was trained on"):
        evaluate_model(
            str(model), SMALL, str(file), str(judge), "none", "fp32", tmp_path, show=False
        )


def test_a_baseline_is_not_measured_on_what_it_was_trained_on(judge, shards, tmp_path):
    texts = [shards.tokenizer.decode(shards.document("train", i).tolist()) for i in range(3)]
    file = tmp_path / "seen.jsonl"
    file.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    with pytest.raises(DataError, match=r"3 of 3 documents of .* training data of the model"):
        evaluate_model(str(judge), SMALL, str(file), "none", "none", "fp32", tmp_path, show=False)
    assert [p.name for p in tmp_path.iterdir()] == ["seen.jsonl"]


def test_a_baseline_takes_no_options_of_diffusion(judge, tmp_path):
    with pytest.raises(ConfigError, match=r"--halt is for diffusion models .* is autoregressive"):
        evaluate(model=str(judge), halt="patience:3", out=tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--model_precision is for diffusion models"):
        evaluate(model=str(judge), model_precision="bf16", out=tmp_path / "out")


def test_the_title_of_a_baseline_names_no_steps(judge, shards, tmp_path, capsys):
    few = replace(SMALL, prompts=5, curve_prompts=2, temperatures=(), tasks=("unconditional",))
    evaluate_model(str(judge), few, str(shards.folder), "none", "none", "fp32", tmp_path)
    shown = capsys.readouterr().out
    assert "steps" not in shown
    assert "gpt" in shown


def test_a_baseline_that_cannot_read_a_sample_is_named(judge, shards, tmp_path):
    folder = shutil.copytree(judge, tmp_path / "short")
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan | {"context": 8}))
    with pytest.raises(ConfigError, match="context of 8 tokens and samples of 16"):
        load_generator(str(folder))


def test_data_that_was_prepared_again_is_noted(shards, tmp_path, capsys):
    config = small_config(shards)
    torch.manual_seed(0)
    net = DDLM(config.model, NoiseProcess(config.process.t_min, config.process.t_max))
    few = replace(
        SMALL, prompts=5, noise_scales=(), temperatures=(), tasks=("unconditional",), sanity=False
    )
    for name, trained_on, noted in (("same", shards.hash, False), ("other", "0" * 64, True)):
        model = save_model(
            tmp_path / name,
            net,
            config,
            tokenizer_from=shards.folder,
            provenance={"data": trained_on},
        )
        out = tmp_path / f"{name}-out"
        record = evaluate_model(str(model), few, None, "none", "none", "fp32", out, show=False)
        line = f"was trained on data {'0' * 12}, {shards.folder} now holds data {shards.hash[:12]}"
        assert (line in capsys.readouterr().out) is noted
        assert (line in str(record["results"]["facts"].get("notes"))) is noted
        assert (line in (out / "table.md").read_text()) is noted


def test_real_text_that_is_the_reference_has_no_mauve(shards):
    windows = protocol.held_out(shards.folder, shards.tokenizer, 16, 24)
    assert protocol.no_mauve(windows, "real text") is None
    alone = replace(windows, more=windows.more[:23])  # one fewer than the model's rows have
    sets = dict(protocol.sanity_sets(alone, shards.tokenizer, 0))
    assert {name: len(rows) for name, rows in sets.items()} == dict.fromkeys(sets, 24)
    assert "compared with itself" in protocol.no_mauve(alone, "real text")
    assert protocol.no_mauve(alone, "shuffled text") is None


def test_what_is_missing_on_the_command_line_is_named(model, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="either a model"):
        evaluate()
    with pytest.raises(ConfigError, match="--prompts is 0"):
        evaluate(model=str(model), prompts=0)
    with pytest.raises(ConfigError, match="--prompts is 1, it must be at least 2"):
        evaluate(model=str(model), prompts=1)
    with pytest.raises(ConfigError, match="--continuations is 21, it must be at most 20"):
        evaluate(model=str(model), continuations=21)
    with pytest.raises(ConfigError, match="--tokenizer goes with --samples, and --model was given"):
        evaluate(model=str(model), tokenizer="x")
    with pytest.raises(ConfigError, match="--steps goes with --model, and --samples was given"):
        evaluate(samples=tmp_path / "s.jsonl", steps=3)
    with pytest.raises(ConfigError, match="task nonsense is unknown"):
        protocol.is_noised("nonsense", 8)
