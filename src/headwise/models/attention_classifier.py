"""A BiLSTM whose states are summed up by additive attention: one sequence, or a pair for questions and inference.

    h = BiLSTM(x),  c = sum_t softmax(w . tanh(W1 h + b))_t h_t,  logits = W c
    pair: q = the query's last states,  scores w . tanh(W1 h + b + W2 q),  logits = W tanh(W_c c + W_q q)

Paper: headwise/papers/attention_adversarial_training.py (Kitada and Iyatomi, 2021), after Jain and Wallace (2019).
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from headwise.attention.additive import AdditiveAttention

__all__ = ["AttentionClassifier", "AttentionClassifierConfig", "Encoded"]


class AttentionClassifierConfig(PreTrainedConfig):
    """Sizes; the defaults are the paper's.

    hidden_size: LSTM units per direction. attention_size: width of the scorer. num_labels: 1 is one logit and binary
    cross-entropy with `positive_weight` on the positive class, more is cross-entropy. pair: with a second sequence.
    """

    model_type = "headwise-attention-classifier"

    def __init__(
        self,
        vocab_size: int = 30522,
        embedding_size: int = 300,
        hidden_size: int = 128,
        attention_size: int = 128,
        pad_token_id: int | None = 0,
        pair: bool = False,
        positive_weight: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.embedding_size = embedding_size
        self.hidden_size = hidden_size
        self.attention_size = attention_size
        self.pad_token_id = pad_token_id
        self.pair = pair
        self.positive_weight = positive_weight
        super().__init__(**kwargs)


@dataclass
class Encoded:
    """What the LSTMs made of a batch: states `[b t c]`, their mask `[b t]`, and the query's last states `[b c]`."""

    states: Float[Tensor, "b t c"]
    mask: Bool[Tensor, "b t"]
    query: Float[Tensor, "b c"] | None = None


class AttentionClassifier(PreTrainedModel):
    """The classifier. Its scores are at `attention.score_point`, where `AttentionAT` perturbs them.

    >>> model = AttentionClassifier(AttentionClassifierConfig(vocab_size=20, hidden_size=8, num_labels=2))
    >>> ids = torch.randint(1, 20, (3, 7))
    >>> encoded = model.encode(ids)  # once, however often the rest is run
    >>> model(encoded=encoded, labels=torch.tensor([0, 1, 1])).logits.shape
    torch.Size([3, 2])
    """

    config_class = AttentionClassifierConfig
    config: Any
    base_model_prefix = ""
    main_input_name = "input_ids"

    def __init__(self, config: AttentionClassifierConfig) -> None:
        super().__init__(config)
        width = 2 * config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size, config.pad_token_id)
        sizes, form = (config.embedding_size, config.hidden_size), {"batch_first": True, "bidirectional": True}
        self.encoder = nn.LSTM(*sizes, **form)
        self.query_encoder = nn.LSTM(*sizes, **form) if config.pair else None
        self.attention = AdditiveAttention(width, config.attention_size, query_dim=width if config.pair else None)
        self.context_proj = nn.Linear(width, width) if config.pair else None
        self.query_proj = nn.Linear(width, width, bias=False) if config.pair else None
        number: Any = config.num_labels
        self.classifier = nn.Linear(width, number)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Torch's own initialisation is the paper's."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value

    def encode(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Tensor | None = None,
        *,
        query_ids: Int[Tensor, "b q"] | None = None,
        query_mask: Tensor | None = None,
    ) -> Encoded:
        """Run the LSTMs. Masks are True (or 1) for real tokens, None reads them off the padding id; padding is right.

        Raises ValueError for a mask with padding before a real token, and a query missing or too much.
        """
        if (query_ids is None) == self.config.pair:
            raise ValueError(
                f"AttentionClassifier: query_ids is {'missing' if query_ids is None else 'given'} but pair is "
                f"{self.config.pair}; a pair model reads two sequences, another one"
            )
        states, mask, _ = self._read(self.encoder, input_ids, attention_mask)
        if query_ids is None or self.query_encoder is None:
            return Encoded(states, mask)
        return Encoded(states, mask, self._read(self.query_encoder, query_ids, query_mask)[2])

    def _read(self, lstm: nn.LSTM, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """States `[b t c]`, mask and last states `[b c]` of both directions."""
        pad = self.config.pad_token_id
        if mask is not None:
            real = mask.bool()
        else:
            real = torch.ones_like(ids, dtype=torch.bool) if pad is None else ids.ne(pad)
        lengths = real.sum(1).cpu()
        if (real[:, 1:] & ~real[:, :-1]).any():
            raise ValueError("AttentionClassifier: padding stands before a real token; pad on the right")
        words = self.embedding(ids)
        if not len(ids):
            return (
                words.new_zeros(0, ids.shape[1], 2 * lstm.hidden_size),
                real,
                words.new_zeros(0, 2 * lstm.hidden_size),
            )
        # A sequence of nothing but padding is read as one padding word; attention gives it no weight.
        packed = nn.utils.rnn.pack_padded_sequence(words, lengths.clamp_min(1), batch_first=True, enforce_sorted=False)
        out, (last, _) = lstm(packed)
        states, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True, total_length=ids.shape[1])
        return states, real, last.transpose(0, 1).flatten(1)

    def forward(
        self,
        input_ids: Int[Tensor, "b t"] | None = None,
        attention_mask: Tensor | None = None,
        *,
        query_ids: Int[Tensor, "b q"] | None = None,
        query_mask: Tensor | None = None,
        labels: Tensor | None = None,
        encoded: Encoded | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Logits `[b n]`, the loss where labels are given, and `attentions`: the weights, `[b 1 1 t]`.

        labels: `[b]`, class numbers, or 0 and 1 for one logit. encoded: from `encode`, instead of ids. return_dict:
        False gives a tuple.
        """
        if (encoded is None) == (input_ids is None):
            raise ValueError("AttentionClassifier: give input_ids, or encoded, and not both")
        if encoded is None:
            assert input_ids is not None
            encoded = self.encode(input_ids, attention_mask, query_ids=query_ids, query_mask=query_mask)
        context, weights = self.attention.pool(encoded.states, encoded.mask, encoded.query)
        if self.context_proj is not None and self.query_proj is not None:
            context = torch.tanh(self.context_proj(context) + self.query_proj(encoded.query))
        logits = self.classifier(context)
        loss = None if labels is None else self._loss(logits, labels)
        out = SequenceClassifierOutput(loss=loss, logits=logits, attentions=(weights[:, None, None],))
        return out.to_tuple() if return_dict is False else out

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.config.num_labels > 1:
            return nn.functional.cross_entropy(logits, labels)
        weight = self.config.positive_weight
        weight = None if weight is None else torch.as_tensor(weight, dtype=logits.dtype, device=logits.device)
        return nn.functional.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype), pos_weight=weight)
