# Cut out of ddlm.integrations.transformers of ddlm 0.1.0 (Apache-2.0) when this model was exported.
# Change the package, not this file.
from __future__ import annotations

from typing import Any
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput
from .ddlm_config import ModelConfig
from .ddlm_process import NoiseProcess
from .ddlm_denoiser import DDLM
from .ddlm_layers import ConditionalLayerNorm, Rotary, TimeEmbedding
from .ddlm_types import ConfigError, Posterior

POOLINGS = ("mean", "max", "first", "attention", "pair")

OLDEST = (4, 57)  # before it, from_pretrained takes the denoiser for a model of transformers


class DDLMConfig(PretrainedConfig):
    """Configuration of a DDLM in `transformers`.

    Args:
        model: Sizes of the network, the fields of :class:`ddlm.config.ModelConfig`.
        process: ``{"t_min": ..., "t_max": ...}``.
        time: Noise level the network is told when it reads clean text, in the paper's units [1, 10]
            (DDLM, section 4.2 and Table 8: 1, 5 or 10); see :meth:`process_time`.
        pooling: How a sequence's hidden states become one vector: mean, max, first (the first token), attention
            (one learned query) or pair (means u and v of the two texts, |u - v| and u * v beside each other, as
            InferSent's: Conneau et al. 2017; v = 0 for one text); padding never takes part.
        segments: Tell the first from the second text of a pair by learned vectors added to the embeddings; they
            start at zero, so the network starts as it was pretrained.
        classifier_dropout: Dropout before each linear map of the classification head.
    """

    model_type = "ddlm"

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        process: dict[str, float] | None = None,
        time: float = 1.0,
        pooling: str = "mean",
        segments: bool = True,
        classifier_dropout: float = 0.1,
        **kwargs: Any,
    ) -> None:
        self.model = dict(model or {})
        self.process = dict(process or {"t_min": 1.0, "t_max": 10.0})
        self.time = time
        self.pooling = pooling
        self.segments = segments
        self.classifier_dropout = classifier_dropout
        super().__init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Refuse settings that no model can have; a model asks again, since ``from_pretrained`` sets its own later.

        Raises:
            ConfigError: for an unknown pooling or a time outside 1..10.
        """
        if self.pooling not in POOLINGS:
            raise ConfigError(
                f"pooling '{self.pooling}' is unknown: choose one of {', '.join(POOLINGS)}"
            )
        self.process_time()

    @property
    def sizes(self) -> ModelConfig:
        """Sizes of the network."""
        return ModelConfig(**self.model)

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary."""
        return self.sizes.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.sizes.width

    @property
    def num_hidden_layers(self) -> int:
        """Transformer blocks."""
        return self.sizes.layers

    @property
    def num_attention_heads(self) -> int:
        """Attention heads."""
        return self.sizes.heads

    def process_time(self, time: float | None = None) -> float:
        """The paper's time in [1, 10] on this model's scale: linear, 1 -> t_min and 10 -> t_max.

        The paper trains on [1, 10]. A scaled model (another D, another range) has seen its own [t_min, t_max]
        only, so the grid 1, 5, 10 is carried over as the same fractions of that range.

        Raises:
            ConfigError: for a time outside 1..10.
        """
        wanted = self.time if time is None else time
        if not 1 <= wanted <= 10:
            raise ConfigError(f"time {wanted:g} was given, 1 to 10 (the paper's units) is needed")
        t_min, t_max = self.process["t_min"], self.process["t_max"]
        return t_min + (wanted - 1.0) / 9.0 * (t_max - t_min)


class _DDLMPreTrained(PreTrainedModel):
    """What both models share: the denoiser, its precision, and how weights that no file holds are filled."""

    config_class = DDLMConfig
    # A DDLM model folder names its weights without this prefix; from_pretrained adds it.
    base_model_prefix = "denoiser"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False
    _supports_sdpa = True

    def __init__(self, config: DDLMConfig) -> None:
        if tuple(map(int, transformers_version.split(".")[:2])) < OLDEST:
            raise ConfigError(
                f"transformers {transformers_version} was found, DDLM needs {OLDEST[0]}.{OLDEST[1]} or later:"
                " pip install -U transformers"
            )
        super().__init__(config)
        config.check()
        self.denoiser = DDLM(config.sizes, NoiseProcess(**config.process))

    def get_input_embeddings(self) -> nn.Module:
        """Refused: the table is a parameter, normalised on every use."""
        raise NotImplementedError("DDLM's embeddings are read through model.denoiser.embed(tokens)")

    def _init_weights(self, module: nn.Module) -> None:
        """Fill what a checkpoint does not hold: new heads, and the tables that are computed, never stored."""
        if isinstance(module, Rotary):
            module.frequencies.data.copy_(module.exact)
        elif isinstance(module, TimeEmbedding):
            # a whole new one draws random numbers, which the heads of a seed come after in every recorded run
            fresh = TimeEmbedding(2 * module.frequencies.numel())
            module.frequencies.data.copy_(fresh.frequencies)
        elif isinstance(module, ConditionalLayerNorm):
            nn.init.zeros_(module.film.weight)
        elif isinstance(module, SegmentEmbedding):
            nn.init.zeros_(module.weight)

    def clean_hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        time: float | None,
        offset: Tensor | None = None,
    ) -> Tensor:
        """Hidden states ``(B, T, H)`` over clean embeddings: nothing is noised, the time alone is chosen.

        Args:
            input_ids: ``(B, T)``; T may exceed the length of pretraining (positions are rotary).
            attention_mask: 1 at tokens and 0 at padding ``(B, T)``, or None.
            time: In the paper's units; None takes the configuration's.
            offset: Added to the embeddings ``(B, T, D)`` (segments), or None.
        """
        x0 = self.denoiser.embed(input_ids)  # (B, T, D)
        if offset is not None:
            x0 = x0 + offset
        t = x0.new_full((1,), self.config.process_time(time))  # one for all
        valid = None if attention_mask is None else attention_mask.bool()
        if valid is not None and valid.device.type == "cpu" and bool(valid.all()):
            valid = None  # no padding: the attention runs without a mask
        self.denoiser.compute_dtype = self._compute_dtype(x0)
        return self.denoiser.encode_clean(x0, t, valid)

    def _names_outputs(self, return_dict: bool | None) -> bool:
        """Whether a call returns an object and not a tuple."""
        return bool(self.config.return_dict if return_dict is None else return_dict)

    def _compute_dtype(self, like: Tensor) -> torch.dtype:
        """Precision of the network: that of an autocast around the call, or of the loaded weights."""
        kind = like.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        stored = self.denoiser.head.weight.dtype
        return stored if stored in (torch.bfloat16, torch.float16) else torch.float32


class DDLMModel(_DDLMPreTrained):
    """The bidirectional network without a task head: hidden states over clean text, or the denoising forward."""

    def __init__(self, config: DDLMConfig) -> None:
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        time: float | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Hidden states over clean embeddings at a fixed time.

        Args:
            input_ids: ``(B, T)``.
            attention_mask: 1 at tokens, 0 at padding, ``(B, T)``.
            token_type_ids: Accepted and ignored: pretraining knows no segments.
            time: 1 to 10, the paper's units; None takes ``config.time``.
            output_hidden_states: Also return what goes into the first block and what comes out of each.
            return_dict: False returns a tuple; None takes ``config.return_dict``.

        Returns:
            ``last_hidden_state (B, T, H)``, the norm before the head included; ``hidden_states``, a tuple of one more
            than there are blocks, each ``(B, T, H)``, its last without that norm.
        """
        wanted = (
            self.config.output_hidden_states
            if output_hidden_states is None
            else output_hidden_states
        )
        states: list[Tensor] = []
        blocks = list(self.denoiser.transformer.blocks) if wanted else []
        hooks: list[Any] = [
            b.register_forward_hook(lambda _, __, out: states.append(out)) for b in blocks
        ]
        if wanted:
            first = blocks[0].register_forward_pre_hook(lambda _, given: states.append(given[0]))
            hooks.append(first)
        try:
            hidden = self.clean_hidden_states(input_ids, attention_mask, time)
        finally:
            for hook in hooks:
                hook.remove()
        found = tuple(states) if wanted else None
        if not self._names_outputs(return_dict):
            return (hidden,) if found is None else (hidden, found)
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=found)

    def denoise(
        self,
        xt: Tensor,
        t: Tensor,
        is_noised: Tensor,
        x0_hat: Tensor | None = None,
        *,
        valid: Tensor | None = None,
    ) -> Posterior:
        """p(x_0 | x_t, t) at every position; arguments and units (the process's own t) as in `ddlm.types.Denoiser`."""
        self.denoiser.compute_dtype = self._compute_dtype(xt)
        return self.denoiser(xt, t, is_noised, x0_hat, valid=valid)


class SegmentEmbedding(nn.Embedding):
    """Vectors that tell the texts of a pair apart; zero at first."""

    def reset_parameters(self) -> None:
        """Start at zero: the pretrained function is unchanged."""
        nn.init.zeros_(self.weight)


class DDLMForSequenceClassification(_DDLMPreTrained):
    """A classifier or regressor on pooled hidden states (DDLM, section 4.2).

    Input: ``text <end>`` or ``first <end> second <end>`` where ``<end>`` is the token that closed documents in
    pretraining; ``token_type_ids`` are 0 up to the first ``<end>`` and 1 after it. ``config.num_labels`` 1 makes a
    regression (mean squared error), more a classification: one class of integer labels (cross-entropy), any number of
    float ones (binary cross-entropy); ``config.problem_type`` chooses, all as for the models of transformers.
    """

    def __init__(self, config: DDLMConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.segment = (
            SegmentEmbedding(2, config.sizes.embedding_width) if config.segments else None
        )
        self.query = nn.Linear(width, 1, bias=False) if config.pooling == "attention" else None
        pooled = 4 * width if config.pooling == "pair" else width
        self.classifier = ClassificationHead(
            pooled, width, config.num_labels or 2, config.classifier_dropout
        )
        # The output head of pretraining takes no part; an unused parameter must not wait for a gradient.
        self.denoiser.head.requires_grad_(False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # Leaf by leaf: transformers marks a layer as done before it comes to the module around it.
        if module is self.query:
            nn.init.zeros_(self.query.weight)
        elif module is self.classifier.dense or module is self.classifier.out:
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        time: float | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Logits of each sequence, and the loss when labels are given.

        Args:
            input_ids: ``(B, T)``.
            attention_mask: 1 at tokens, 0 at padding, ``(B, T)``.
            token_type_ids: 0 for the first, 1 for the second text, ``(B, T)``; None: one text.
            labels: Class ids ``(B,)`` or ``(B, 1)`` integers, values ``(B,)`` or ``(B, C)`` float for a regression,
                0 or 1 for each class ``(B, C)`` float when several may hold (``multi_label_classification``).
            time: 1 to 10, the paper's units; None takes ``config.time``.
            return_dict: False returns a tuple; None takes ``config.return_dict``.

        Returns:
            ``logits (B, C)`` and ``loss``.
        """
        offset = None
        if self.segment is not None and token_type_ids is not None:
            offset = self.segment(token_type_ids)
        hidden = self.clean_hidden_states(input_ids, attention_mask, time, offset)
        logits = self.classifier(self._pool(hidden, attention_mask, token_type_ids))  # (B, C)
        loss = None
        if labels is not None:
            loss = self._loss(logits.float(), labels)
        if not self._names_outputs(return_dict):
            return (logits,) if loss is None else (loss, logits)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Scalar loss of float32 ``logits (B, C)``; what the labels are tells the problem where nothing else does."""
        problem = self.config.problem_type
        if problem is None:
            if self.config.num_labels == 1:
                problem = "regression"
            elif labels.dtype not in (torch.int64, torch.int32):
                problem = "multi_label_classification"
        if problem == "regression":
            return F.mse_loss(logits.squeeze(-1), labels.float().view_as(logits.squeeze(-1)))
        if problem == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels.float())
        return F.cross_entropy(logits, labels.view(-1).long())

    def _pool(
        self, hidden: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None
    ) -> Tensor:
        """One vector ``(B, H)``, or ``(B, 4 H)`` of a pair, of the hidden states ``(B, T, H)`` of each sequence."""
        if attention_mask is None:
            attention_mask = hidden.new_ones(hidden.shape[:2])
        if self.config.pooling == "first":
            rows = torch.arange(len(hidden), device=hidden.device)
            return hidden[rows, attention_mask.argmax(1)]  # behind padding on the left, too
        valid = attention_mask[..., None].bool()  # (B, T, 1)
        if self.config.pooling == "max":
            return hidden.masked_fill(~valid, float("-inf")).amax(1)
        if self.query is not None:
            scores = self.query(hidden).float().masked_fill(~valid, float("-inf"))  # (B, T, 1)
            return (scores.softmax(1).to(hidden.dtype) * hidden).sum(1)
        if self.config.pooling == "mean":
            return _mean(hidden, valid)
        is_second = torch.zeros_like(valid)
        if token_type_ids is not None:
            is_second = token_type_ids[..., None].bool()
        u, v = _mean(hidden, valid & ~is_second), _mean(hidden, valid & is_second)
        return torch.cat([u, v, (u - v).abs(), u * v], dim=-1)


def _mean(hidden: Tensor, chosen: Tensor) -> Tensor:
    """Mean of ``hidden (B, T, H)`` where ``chosen (B, T, 1)`` holds, zero where it never does: ``(B, H)``."""
    weight = chosen.to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)


class ClassificationHead(nn.Module):
    """Dropout, linear, tanh, dropout, linear: ``(B, P)`` -> ``(B, H)`` -> ``(B, C)``, as RoBERTa's head."""

    def __init__(self, pooled: int, width: int, labels: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(pooled, width)
        self.out = nn.Linear(width, labels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, pooled: Tensor) -> Tensor:
        """Logits ``(B, C)`` of pooled states ``(B, P)``."""
        dense = torch.tanh(self.dense(self.dropout(pooled)))
        return self.out(self.dropout(dense))


# so that every version of transformers copies these files, too
from .ddlm_posterior import _Summary  # noqa: F401
from .ddlm_transformer import Block  # noqa: F401
from .ddlm_head import CHUNK  # noqa: F401
from .ddlm_elementwise import add_neighbours  # noqa: F401
