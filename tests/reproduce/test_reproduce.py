"""The recipes against the paper's tables, and one whole item at the smallest size there is."""

import json
import math

import pytest

from ddlm.cli import main
from ddlm.config import Config, load_config
from ddlm.data.prepare import prepare
from ddlm.downstream import report
from ddlm.downstream.glue import TASKS
from ddlm.evaluation.generators import Settings
from ddlm.evaluation.measure import Estimate, Row
from ddlm.evaluation.protocol import Protocol
from ddlm.evaluation.samples import Sample
from ddlm.reproduce import recipes, tables
from ddlm.reproduce.checks import check
from ddlm.reproduce.figures import draw_steps
from ddlm.reproduce.items import listing, reproduce_item
from ddlm.reproduce.recipes import MAIN, configuration, find, run_name
from ddlm.reproduce.workshop import Workshop, _with_steps, tasks_of
from ddlm.types import ConfigError
from evaluation.small import sentences

NAMES = [f"table{i}" for i in range(1, 9)] + ["figure1", "figure2", "figure3"]


def test_every_table_and_figure_has_a_recipe():
    assert list(recipes.recipes()) == NAMES
    for recipe in recipes.recipes().values():
        for line in recipe.lines:
            if recipe.kind == "glue":
                assert len(line.paper) == len(recipe.columns) == 7, (recipe.name, line.label)
            if recipe.kind == "measure":
                assert len(line.paper) in (0, len(recipe.columns)), (recipe.name, line.label)
                assert tasks_of(recipe, line), (recipe.name, line.label)
                Settings(**line.sample)


@pytest.mark.parametrize(
    ("item", "label", "head", "value"),
    [
        ("table2", "t_max 8, warped", "MAUVE, prefix", 0.01),
        ("table2", "t_max 300, warped", "AR-NLL", 2.15),
        ("table3", "mixed", "MAUVE, infill", 0.892),
        ("table5", "diffusion, prefix", "Zipf", 0.94),
        ("table5", "GPT-Neo, unconditional (the paper's alone)", "AR-NLL", 2.27),
        ("table5", "GPT-Neo, prefix (the paper's alone)", "Zipf", 0.96),
        ("table6", "GPT-2", "CoLA", 46.6),
        ("table7", "span masking", "QQP", "67.1/86.8"),
        ("table8", "1.1", "dist-1", 0.69),
    ],
)
def test_the_papers_numbers_stand_in_their_columns(item, label, head, value):
    recipe = find(item)
    line = next(x for x in recipe.lines if x.label == label)
    assert line.paper[[c.head for c in recipe.columns].index(head)] == value


def test_items_share_the_models_they_need():
    assert len(find("table2").trainings()) == 13
    assert len({run_name(t) for t in find("table2").trainings()}) == 13
    span = find("table3").lines[0].train
    assert span == MAIN == find("table5").lines[1].train
    assert span in find("table2").trainings()
    assert find("table5").needs_baseline()


@pytest.mark.parametrize("scale", ["tiny", "small", "base"])
def test_t_max_is_scaled_with_the_width_of_the_embeddings(scale):
    config = configuration(scale, {**MAIN, "t_max": 20, "warp": True}, "data", 7, None)
    width = config.model.embedding_width
    assert config.process.t_max / 20 == pytest.approx(math.sqrt(width) / 16)
    assert (config.time.warp, config.train.steps, config.train.budget) == (True, 7, None)
    assert configuration(scale, MAIN, "data", None, 9.0).train.budget == 9.0


def test_the_list_says_what_every_item_needs(capsys):
    assert main(["reproduce", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in NAMES)
    heads, lines = listing("base")
    assert heads[0] == "item"
    by_name = {line[0]: line for line in lines}
    assert by_name["table2"][2] == "13 diffusion"
    assert "gpt-neo-1.3B" in by_name["table2"][-1]
    assert by_name["table5"][2] == "1 diffusion + 1 autoregressive"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tabel3"], "did you mean 'table3'"),
        ([], "name what to reproduce"),
        (["table3"], "name the prepared shards"),
        (["table3", "--data", "nowhere"], "nowhere"),
        (["table3", "--data", "x", "--prompts", "1"], "--prompts is 1"),
    ],
)
def test_mistakes_are_named_in_one_line(arguments, message, capsys):
    assert main(["reproduce", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_table_has_our_numbers_and_the_papers_apart():
    recipe = find("table8")
    rows = {
        (line.label, "unconditional"): Row(
            line.label, "unconditional", {"nll": Estimate(4.5, 4.4, 4.6, "seeds")}
        )
        for line in recipe.lines
    }
    heads, lines = tables.grid(recipe, rows)
    assert heads[1:5] == ["AR-NLL", "dist-1", "dist-2", "dist-3"]
    assert heads[5] == "AR-NLL (paper)"
    assert lines[0] == ["0.5", "4.50 ±0.10", "-", "-", "-", "2.38", "0.13", "0.29", "0.44"]
    page = tables.page(recipe, rows, [], "tiny", {"parameters": 4.9e6, "training_tokens": 8e7})
    assert "**Another scale than the paper's**" in page
    assert "4.9M parameters (paper: 147.0M)" in page
    assert tables.paper_cell(math.nan) == "NaN"


def test_the_columns_of_glue_are_the_metrics_that_decide():
    for name in ("table6", "table7"):
        for column in find(name).columns:
            task = TASKS[str(column.task)]
            assert (column.head, column.metric) == (task.title, task.metrics[0])
    assert [c.task for c in find("table6").columns] == list(report.COLUMNS)
    assert [line.paper for line in find("table6").lines] == list(report.PAPER.values())


def test_the_steps_performed_have_the_interval_of_the_seeds():
    row = Row("x", "unconditional", {"nll": Estimate(4.0)})
    steps = [10, 20, 12, 22, 14, 24]
    samples = [Sample(text="a", steps=n, seed=i // 2) for i, n in enumerate(steps)]
    found = _with_steps(row, samples).metrics["mean_steps"]
    assert (found.value, found.over) == (17.0, "seeds")
    half = 4.302653 * 2 / math.sqrt(3)  # t(2) times the standard error of 15, 17, 19
    assert (found.low, found.high) == pytest.approx((17 - half, 17 + half))
    assert _with_steps(row, [Sample(text="a", seed=0)] * 4) is row


@pytest.mark.parametrize("judged", [True, False])
def test_figure_1_is_drawn_where_it_was_judged(judged, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'ddlm[plots]'")
    recipe = find("figure1")
    shop = Workshop("tiny", tmp_path, "data", "data", Protocol(), judge="none", features="none")
    nll = {"nll": Estimate(4.0, 3.9, 4.1, "seeds")} if judged else {}
    rows = {
        (line.label, "unconditional"): Row(
            line.label, "unconditional", {**nll, "mean_steps": Estimate(31.0)}
        )
        for line in recipe.lines
    }
    (tmp_path / "figure1-quality.png").write_text("of another measurement")
    files = draw_steps(recipe, shop, rows)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(files)
    if not judged:
        assert files == []
        assert "no picture of figure1: without a judge" in capsys.readouterr().out
        return
    assert "figure1-quality.png" in files
    text = (tmp_path / "figure1-quality.svg").read_text()
    for words in ("no early exit", "= 25", "AR-NLL", "Steps performed", "Scale tiny;"):
        assert words in text


def test_repeated_tokens_are_marked():
    assert tables.repeats([5, 6, 5, 5, 6]) == [0, 0, 1, 2, 1]
    page = tables.sample_page(
        "T", [(["a<", "\n", "a<", "a<"], [False, True, True, True], [0, 0, 1, 2])], "n"
    )
    assert '<span class="given">a&lt;</span><br>' in page
    assert '<span class="r1">a&lt;</span><span class="r2">a&lt;</span>' in page
    assert "http" not in page
    text = tables.sample_lines([(["a", "b"], [False, True], [0, 1])])[0]
    assert text.plain == "ab"


def small_config(source, overrides=()):
    """A few thousand parameters instead of a shipped configuration, whatever its name."""
    config = load_config(None, overrides)
    m, t = config.model, config.train
    m.layers, m.heads, m.width, m.feed_forward, m.length = 1, 2, 16, 32, 16
    m.embedding_width, m.time_width, m.vocab_size = 16, 16, 300
    t.batch, t.warmup, t.precision, t.lr, t.eval_every, t.checkpoint_every = (
        8,
        2,
        "fp32",
        1e-3,
        5,
        5,
    )
    return config


@pytest.fixture
def shop(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("DDLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(recipes, "load_config", small_config)
    return Workshop(
        scale="tiny",
        folder=tmp_path / "tiny",
        data=str(shards),
        held_out_text=str(shards),
        protocol=Protocol(prompts=20, continuations=2, settings=Settings(steps=4)),
        steps=6,
        quiet=True,
    )


@pytest.mark.slow
def test_table_5_is_trained_measured_and_written_beside_the_paper(shop, monkeypatch):
    recipe = find("table5")
    assert reproduce_item(recipe, shop) == ["table5.md", "table5.tex", "table5.json"]
    record = json.loads((shop.folder / "table5.json").read_text())
    rows = {(r["label"], r["task"]): r for r in record["results"]["rows"]}
    assert len(rows) == sum(line.model != "paper" for line in recipe.lines)
    assert rows["diffusion, prefix", "prefix-8"]["metrics"]["mauve"]["value"] >= 0
    assert rows["data", "unconditional"]["metrics"]["nll"]["value"] > 0
    assert record["results"]["facts"]["judge"]["trained_here_on"]["tokens"] > 0
    assert record["results"]["facts"]["trainings"][0]["steps"] == 6
    page = (shop.folder / "table5.md").read_text()
    body = [line for line in page.split("\n") if line.startswith("| diffusion, unconditional ")]
    assert len(body) == 1
    assert "4.28" in body[0]
    assert "±" in body[0]
    assert "| one line repeated |" in page
    # A second call trains and samples nothing.
    monkeypatch.setattr(Workshop, "_train_model", lambda *a: pytest.fail("trained again"))
    monkeypatch.setattr(Workshop, "_train_baseline", lambda *a: pytest.fail("trained again"))
    before = {p: p.stat().st_mtime_ns for p in (shop.folder / "samples").iterdir()}
    again = Workshop(**{k: v for k, v in vars(shop).items() if not k.startswith("_")})
    reproduce_item(recipe, again)
    assert {p: p.stat().st_mtime_ns for p in (shop.folder / "samples").iterdir()} == before
    # The same models serve the other items.
    assert reproduce_item(find("table4"), again) == ["table4.html", "table4.json"]
    assert "<p>" in (shop.folder / "table4.html").read_text()
    assert reproduce_item(find("table1"), again)[0] == "table1.md"


def test_an_interrupted_item_goes_on_where_it_stopped(shop, monkeypatch):
    recipe = find("table3")
    done = []
    train = Workshop._train_model

    def stop_at_second(self, chosen, folder, share):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(folder.name)
        return train(self, chosen, folder, share)

    monkeypatch.setattr(Workshop, "_train_model", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        shop.train(recipe)
    monkeypatch.setattr(
        Workshop, "_train_model", lambda self, c, f, s: done.append(f.name) or train(self, c, f, s)
    )
    shop.judge = shop.features = "none"
    shop.train(recipe)
    assert done == [run_name(t) for t in recipe.trainings()]


def test_the_budget_is_shared_and_kept(shop):
    folder = shop.folder / "models" / "x"
    assert shop._kept_share(folder, 20.0) == 20.0
    assert shop._kept_share(folder, 30.0) == 30.0  # nothing is there that has a schedule
    (folder / "checkpoints" / "step-5").mkdir(parents=True)
    assert shop._kept_share(folder, 99.0) == 30.0  # going on with a run keeps its schedule
    assert shop._kept_share(folder, None) is None


def again(shop, **changes):
    given = {k: v for k, v in vars(shop).items() if not k.startswith("_")}
    return Workshop(**{**given, "judge": "none", "features": "none", **changes})


@pytest.fixture
def untrained(monkeypatch):
    """What was trained, by name, with its seconds; the training itself is left out."""
    done = []

    def note(self, chosen, folder, share):
        done.append((folder.name, self._kept_share(folder, share)))
        return {"steps": 1}

    monkeypatch.setattr(Workshop, "_train_model", note)
    monkeypatch.setattr(Workshop, "_train_baseline", note)
    return done


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 7}, "trained with --steps 6, wanted is 7: name another --out"),
        ({"steps": None, "budget": 40.0}, "trained with --steps 6, wanted is unset"),
        ({"data": "other"}, "trained with --data .its hash."),
        ({"scale": "small"}, "train.seed 0, wanted is 5"),
    ],
)
def test_a_finished_model_of_other_settings_is_not_used(
    changes, message, shop, untrained, shards, tmp_path, monkeypatch
):
    again(shop).train(find("table3"))
    assert len(untrained) == 4
    again(shop).train(find("table3"))
    assert len(untrained) == 4
    if "data" in changes:
        copy = tmp_path / "shards"
        rows = [json.dumps({"text": " ".join(sentences(6, seed=900 + i))}) for i in range(120)]
        (tmp_path / "text.jsonl").write_text("\n".join(rows))
        options = {"vocab_size": 300, "val_fraction": 0.2, "processes": 1}
        prepare(str(tmp_path / "text.jsonl"), copy, **options)
        changes = {"data": str(copy)}
    if "scale" in changes:

        def other(source, overrides=()):
            config = small_config(source, overrides)
            config.train.seed = 5
            return config

        monkeypatch.setattr(recipes, "load_config", other)
    with pytest.raises(ConfigError, match=message):
        check(again(shop, **changes), [find("table3")])
    with pytest.raises(ConfigError, match=message):
        again(shop, **changes).train(find("table3"))
    # A file from before this was kept is accepted.
    for file in shop.folder.glob("models/*/finished.json"):
        content = json.loads(file.read_text())
        del content["wanted"]
        file.write_text(json.dumps(content))
    again(shop, **changes).train(find("table3"))
    assert len(untrained) == 4


def test_shares_of_the_budget_are_equal_after_an_interruption(shop, untrained, monkeypatch):
    recipe, train = find("table3"), Workshop._train_model

    def stop_at_third(self, chosen, folder, share):
        if len(untrained) == 2:
            raise KeyboardInterrupt
        return train(self, chosen, folder, share)

    timed = {"steps": None, "budget": 40.0}
    with monkeypatch.context() as patch:
        patch.setattr(Workshop, "_train_model", stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            again(shop, **timed).train(recipe)
    again(shop, **timed).train(recipe)
    assert [share for _, share in untrained] == [10.0] * 4


def test_models_of_unequal_shares_do_not_come_into_one_table(shop, untrained):
    timed = {"steps": None, "budget": 40.0}
    # One command for both is refused before the first training: they share models and divide by 4 and by 13.
    with pytest.raises(ConfigError, match="name another --out, make the items one by one"):
        check(again(shop, **timed), [find("table3"), find("table2")])
    again(shop, **timed).train(find("table3"))
    with pytest.raises(ConfigError, match=r"seconds of --budget 10, wanted is 3.07692"):
        again(shop, **timed).train(find("table2"))
    # A model that stands alone may come from another item of the same budget, not from another budget.
    again(shop, **timed).train(find("table8"))
    assert len(untrained) == 4
    with pytest.raises(ConfigError, match="trained with --budget 40, wanted is 50"):
        again(shop, steps=None, budget=50.0).train(find("table8"))
    for file in shop.folder.glob("models/*/finished.json"):
        file.write_text('{"steps": 1}')  # from before this was kept
    again(shop, **timed).train(find("table2"))
    assert len(untrained) == 4 + 12


@pytest.mark.slow
def test_figures_follow_the_path(shop):
    pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'ddlm[plots]'")
    written = reproduce_item(find("figure2"), shop)
    assert "figure2-x_norm.png" in written
    curves = json.loads((shop.folder / "figure2.json").read_text())["results"]["curves"]["1"]
    assert len(curves["x_norm"]) == 200
    assert curves["score_cosine"][-1] == pytest.approx(1, abs=1e-4)
    assert curves["x0_norm"][-1] <= math.sqrt(16) + 1e-3


def test_data_of_another_vocabulary_is_refused_before_training(shop, monkeypatch):
    def smaller(source, overrides=()):
        config: Config = small_config(source, overrides)
        config.model.vocab_size = 290
        return config

    monkeypatch.setattr(recipes, "load_config", smaller)
    with pytest.raises(ConfigError, match="300 ids, the scale tiny has 290"):
        check(shop)
