from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ddlm.checkpoint import load_model
from ddlm.integrations.export import export_model
from ddlm.integrations.transformers import (
    POOLINGS,
    DDLMConfig,
    DDLMForSequenceClassification,
    DDLMModel,
)
from ddlm.types import ConfigError
from downstream.tiny import write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def exported(folder: Path) -> Path:
    return export_model(folder, folder.parent / "exported")


def classifier(exported: Path, **options: object) -> DDLMForSequenceClassification:
    torch.manual_seed(0)
    model = DDLMForSequenceClassification.from_pretrained(exported, **options)
    assert isinstance(model, DDLMForSequenceClassification)
    return model.eval()


def batch(lengths: list[int], vocab: int = 250) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocab, (len(lengths), max(lengths)), generator=draw)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return tokens, mask


@pytest.mark.parametrize("time, t", [(1, 1.0), (5, 1 + 4 / 9 * 3), (10, 4.0)])
def test_hidden_states_are_the_networks_own_at_the_scaled_time(
    folder: Path, exported: Path, time: float, t: float
) -> None:
    """The paper's grid 1, 5, 10 lands on t_min, four ninths of the way, and t_max."""
    tokens, _ = batch([9, 9])
    network = load_model(folder).model
    nothing = torch.zeros(2, 9, dtype=torch.bool)
    expected = network.hidden_states(network.embed(tokens), torch.full((2,), t), nothing)
    model = DDLMModel.from_pretrained(exported, time=time)
    torch.testing.assert_close(model(tokens).last_hidden_state, expected, rtol=0, atol=1e-6)
    other = model(tokens, time=1 if time > 1 else 10).last_hidden_state
    assert (other - expected).abs().max() > 1e-3


def test_a_likelihood_head_changes_nothing_here(tmp_path: Path) -> None:
    """Its evidence belongs to noised positions; the classifier sees the transformer's states alone."""
    folder = write_tiny_model(tmp_path / "model", likelihood_head=True)
    exported = export_model(folder, tmp_path / "exported")
    tokens, mask = batch([9, 5])
    model = classifier(exported, num_labels=2)
    assert model.clean_hidden_states(tokens, mask, None).shape == (2, 9, 32)
    assert model(tokens, mask).logits.shape == (2, 2)
    xt, t, noised = torch.randn(1, 4, 16), torch.tensor([2.0]), torch.ones(1, 4, dtype=torch.bool)
    expected = load_model(folder).model(xt, t, noised)
    found = DDLMModel.from_pretrained(exported).denoise(xt, t, noised)
    torch.testing.assert_close(found.x0_hat, expected.x0_hat)


def test_denoise_is_the_networks_posterior(folder: Path, exported: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    xt = torch.randn(2, 6, 16, generator=draw)
    t, is_noised = torch.tensor([2.0, 3.0]), torch.ones(2, 6, dtype=torch.bool)
    expected = load_model(folder).model(xt, t, is_noised)
    found = DDLMModel.from_pretrained(exported).denoise(xt, t, is_noised)
    torch.testing.assert_close(found.x0_hat, expected.x0_hat)
    assert torch.equal(found.tokens, expected.tokens)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_changes_nothing(exported: Path, pooling: str, left: bool) -> None:
    model = classifier(exported, num_labels=3, pooling=pooling)
    tokens, mask = batch([4, 11, 7])
    segments = torch.zeros_like(tokens)
    together = model(tokens, mask, segments).logits
    for i, length in enumerate([4, 11, 7]):
        alone = model(tokens[i : i + 1, :length]).logits
        if left:  # positions are rotary: where a text stands tells the network nothing
            turned = [x[i : i + 1].roll(-length, 1) for x in (tokens, mask, segments)]
            torch.testing.assert_close(model(*turned).logits, alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-6)


def test_poolings_differ(exported: Path) -> None:
    tokens, mask = batch([4, 11, 7])
    logits = [
        classifier(exported, num_labels=3, pooling=p)(tokens, mask).logits
        for p in ("mean", "max", "first")
    ]
    assert (logits[0] - logits[1]).abs().max() > 1e-4
    assert (logits[0] - logits[2]).abs().max() > 1e-4


def test_a_pair_is_its_two_means_beside_each_other(exported: Path) -> None:
    """u, v, |u - v| and u * v of each row by a loop over it; padding belongs to neither."""
    model = classifier(exported, num_labels=2, pooling="pair").eval()
    tokens, mask = batch([9, 6])
    segments = torch.zeros_like(tokens)
    segments[0, 5:], segments[1, 2:6] = 1, 1
    pooled = []
    states = model.clean_hidden_states(tokens, mask, None, model.segment(segments))
    for row, second, length in zip(states, segments, (9, 6), strict=True):
        u, v = (
            row[:length][second[:length] == 0].mean(0),
            row[:length][second[:length] == 1].mean(0),
        )
        pooled.append(torch.cat([u, v, (u - v).abs(), u * v]))
    expected = model.classifier(torch.stack(pooled))
    torch.testing.assert_close(model(tokens, mask, segments).logits, expected)
    one = model(tokens[:1], mask[:1]).logits  # one text: the second mean is zero
    assert one.isfinite().all()


@pytest.mark.parametrize(
    ("problem", "labels", "loss"),
    [
        (None, torch.tensor([2, 0]), torch.nn.CrossEntropyLoss()),
        ("single_label_classification", torch.tensor([2, 0]), torch.nn.CrossEntropyLoss()),
        (
            "multi_label_classification",
            torch.tensor([[1.0, 0, 1], [0, 0, 1]]),
            torch.nn.BCEWithLogitsLoss(),
        ),
        ("regression", torch.tensor([[0.5, -1, 2], [0, 3, 1]]), torch.nn.MSELoss()),
        (None, torch.tensor([[1.0, 0, 1], [0, 0, 1]]), torch.nn.BCEWithLogitsLoss()),
        (None, torch.tensor([2, 0], dtype=torch.int32), torch.nn.CrossEntropyLoss()),
        (None, torch.tensor([[2], [0]]), torch.nn.CrossEntropyLoss()),
    ],
)
def test_the_problem_type_chooses_the_loss(
    exported: Path, problem: str | None, labels: torch.Tensor, loss: torch.nn.Module
) -> None:
    model = classifier(exported, num_labels=3, problem_type=problem).eval()
    tokens, mask = batch([9, 6])
    out = model(tokens, mask, labels=labels)
    if isinstance(loss, torch.nn.CrossEntropyLoss):
        labels = labels.view(-1).long()
    torch.testing.assert_close(out.loss, loss(out.logits, labels))


def test_a_configuration_may_ask_for_tuples(exported: Path) -> None:
    tokens, mask = batch([9, 6])
    labels = torch.tensor([1, 0])
    model = classifier(exported, num_labels=2, return_dict=False)
    loss, logits = model(tokens, mask, labels=labels)
    assert loss.dim() == 0
    assert logits.shape == (2, 2)
    assert model(tokens, mask, return_dict=True).logits.shape == (2, 2)
    (hidden,) = DDLMModel.from_pretrained(exported, return_dict=False)(tokens, mask)
    assert hidden.shape[:2] == (2, 9)


def test_segments_start_neutral_and_learn(exported: Path) -> None:
    model = classifier(exported, num_labels=2)
    tokens, mask = batch([8, 8])
    second = torch.zeros_like(tokens)
    second[:, 4:] = 1
    plain = model(tokens, mask).logits
    torch.testing.assert_close(model(tokens, mask, second).logits, plain, rtol=0, atol=1e-6)
    model(tokens, mask, second, labels=torch.tensor([0, 1])).loss.backward()
    assert model.segment is not None
    assert model.segment.weight.grad is not None
    assert (model.segment.weight.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("found", ["4.48.0", "4.56.2"])
def test_a_version_that_cannot_load_it_is_named(
    monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    config = DDLMConfig(model={"vocab_size": 300, "width": 32, "layers": 1, "heads": 2})
    monkeypatch.setattr("ddlm.integrations.transformers.transformers_version", found)
    with pytest.raises(
        ConfigError, match=f"transformers {found} was found, DDLM needs 4.57 or later"
    ):
        DDLMModel(config)


def test_longer_than_pretraining(exported: Path) -> None:
    """The tiny model was made for 16 positions; 100 work, and position still matters there."""
    model = classifier(exported, num_labels=2)
    tokens, mask = batch([100])
    logits = model(tokens, mask).logits
    assert torch.isfinite(logits).all()
    swapped = tokens.clone()
    swapped[0, [90, 40]] = tokens[0, [40, 90]]
    assert not torch.allclose(model(swapped, mask).logits, logits, atol=1e-7)


def test_heads_and_losses(exported: Path) -> None:
    tokens, mask = batch([5, 5])
    three = classifier(exported, num_labels=3)(tokens, mask, labels=torch.tensor([2, 0]))
    assert three.logits.shape == (2, 3)
    expected = torch.nn.functional.cross_entropy(three.logits, torch.tensor([2, 0]))
    torch.testing.assert_close(three.loss, expected)
    one = classifier(exported, num_labels=1)(tokens, mask, labels=torch.tensor([2.5, 0.0]))
    assert one.logits.shape == (2, 1)
    torch.testing.assert_close(
        one.loss, ((one.logits[:, 0] - torch.tensor([2.5, 0.0])) ** 2).mean()
    )


def test_new_parts_are_initialised_and_the_rest_is_pretrained(folder: Path, exported: Path) -> None:
    model = classifier(exported, num_labels=2)
    assert 0.01 < model.classifier.dense.weight.std().item() < 0.03
    assert model.classifier.out.bias.abs().max().item() == 0
    for name, value in load_model(folder).model.state_dict().items():
        assert torch.equal(model.state_dict()[f"denoiser.{name}"], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_again(exported: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model = classifier(exported, num_labels=3, pooling="attention", dtype=dtype)
    tokens, mask = batch([5, 9])
    model.save_pretrained(tmp_path)
    again = DDLMForSequenceClassification.from_pretrained(tmp_path, dtype=dtype).eval()
    assert torch.equal(again(tokens, mask).logits, model(tokens, mask).logits)


def test_the_states_between_the_blocks(exported: Path) -> None:
    model = DDLMModel.from_pretrained(exported).eval()
    tokens, mask = batch([9, 5])
    plain = model(tokens, mask)
    assert plain.hidden_states is None
    out = model(tokens, mask, output_hidden_states=True)
    assert torch.equal(out.last_hidden_state, plain.last_hidden_state)
    blocks, network = model.denoiser.transformer.blocks, model.denoiser.transformer
    assert len(out.hidden_states) == len(blocks) + 1
    time = network.embed_time(torch.full((2,), model.config.process_time(None)))
    torch.testing.assert_close(
        network.output_norm(out.hidden_states[-1], time), out.last_hidden_state
    )
    last, states = model(tokens, mask, output_hidden_states=True, return_dict=False)
    assert torch.equal(last, out.last_hidden_state)
    assert all(torch.equal(a, b) for a, b in zip(states, out.hidden_states, strict=True))
    assert not any(b._forward_hooks or b._forward_pre_hooks for b in blocks)


def test_times_are_exact_in_half_precision(exported: Path) -> None:
    """The table of frequencies stays float32 where transformers builds a network in bfloat16."""
    half = DDLMModel.from_pretrained(exported, dtype=torch.bfloat16)
    exact = DDLMModel.from_pretrained(exported, dtype=torch.float32)
    tables = [dict(m.named_buffers()) for m in (half, exact)]
    assert any("frequencies" in name for name in tables[0])
    for name, table in tables[0].items():
        torch.testing.assert_close(table, tables[1][name], rtol=0, atol=0)


def test_autocast_reaches_the_network(exported: Path) -> None:
    model = DDLMModel.from_pretrained(exported)
    tokens, _ = batch([9])
    full = model(tokens).last_hidden_state
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(tokens).last_hidden_state
    assert 0 < (half - full).abs().max() < 0.2
    assert torch.equal(model(tokens).last_hidden_state, full), "the precision must not stick"


def test_bad_settings_are_one_line(exported: Path) -> None:
    with pytest.raises(ConfigError, match="pooling 'cls' is unknown: choose one of mean"):
        DDLMConfig(pooling="cls")
    with pytest.raises(ConfigError, match="time 300 was given, 1 to 10"):
        DDLMConfig(time=300)
    for settings, message in (
        ({"pooling": "mena"}, "pooling 'mena' is unknown"),
        ({"time": 50}, "time 50 was given, 1 to 10"),
        ({"time": 0}, "time 0 was given, 1 to 10"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            DDLMForSequenceClassification.from_pretrained(exported, **settings)
        assert "\n" not in str(error.value)
    model = DDLMModel.from_pretrained(exported)
    with pytest.raises(ConfigError, match="time 0 was given"):
        model(batch([4])[0], time=0)


def test_times_are_exact_after_a_cast(exported: Path) -> None:
    model = DDLMModel.from_pretrained(exported)
    exact = {name: table.clone() for name, table in model.named_buffers()}
    half = model.to(torch.bfloat16)
    assert half(batch([4])[0]).last_hidden_state.isfinite().all()
    for name, table in half.named_buffers():
        torch.testing.assert_close(table, exact[name], rtol=0, atol=0)
