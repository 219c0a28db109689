"""The encoder, and the masked language model on top of it.

Packed from embedding to loss: one flat run of T tokens, sequences never see each other, and the last block computes
only the M positions that are read. Masked-token prediction: Devlin et al. 2019 (arXiv:1810.04805).

T tokens, M read positions, D hidden size, K head size, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoderkit.encoder.batch import IGNORE_INDEX, TokenBatch
from encoderkit.encoder.config import EncoderConfig
from encoderkit.encoder.layers import BLOCKS, Read, Span, autocast_dtype, init_weights, make_norm
from encoderkit.kernels.attention import AttentionMask, Choice, select_backend
from encoderkit.kernels.errors import InputError
from encoderkit.kernels.loss import LossSum, masked_cross_entropy
from encoderkit.kernels.rotary import rotary_table

VOCAB_MULTIPLE = 64  # rows of the token table are padded to this inside the model; never predicted, never exported


class Embeddings(nn.Module):
    """Tokens, plus learned positions and token types where the config has them, normalised."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        rows = math.ceil(config.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        D = config.hidden_size
        self.tokens = nn.Embedding(rows, D)
        self.positions = nn.Embedding(config.max_positions, D) if config.positions == "learned" else None
        self.token_types = nn.Embedding(config.token_types, D) if config.token_types else None
        self.norm = make_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, batch: TokenBatch) -> Tensor:
        """(T,) ids to (T, D)."""
        hidden_TD = self.tokens(batch.input_ids)
        if self.positions is not None:
            hidden_TD = hidden_TD + self.positions(batch.position_ids)
        if self.token_types is not None:
            types = batch.token_type_ids
            hidden_TD = hidden_TD + self.token_types(torch.zeros_like(batch.input_ids) if types is None else types)
        return self.dropout(self.norm(hidden_TD))


class Rotary(nn.Module):
    """Cosines and sines of one rotary base, as a table that is looked up by position."""

    table: Tensor

    def __init__(self, config: EncoderConfig, base: float) -> None:
        super().__init__()
        table = rotary_table(config.max_positions, config.head_size, base, torch.device("cpu"))
        self.register_buffer("table", table, persistent=False)

    def forward(self, position_ids: Tensor) -> Tensor:
        """(N,) positions to cosines and sines, (N, K / 2, 2)."""
        return self.table.index_select(0, position_ids)


def span_kinds(config: EncoderConfig) -> list[str]:
    """The attention span of each layer: global or local."""
    return ["global" if config.is_global(layer) else "local" for layer in range(config.num_layers)]


def choose_attention(
    config: EncoderConfig, name: str, *, device: torch.device, dtype: torch.dtype, deterministic: bool = False
) -> dict[str, Choice]:
    """The attention backend of each span of this encoder, for this device and compute dtype.

    Raises BackendUnavailable where a named backend cannot serve; "auto" picks by capability.
    """
    return {
        kind: select_backend(
            name,
            device=device,
            dtype=dtype,
            head_size=config.head_size,
            window=kind == "local",
            dropout=config.attention_dropout > 0,
            deterministic=deterministic,
        )
        for kind in sorted(set(span_kinds(config)))
    }


class Encoder(nn.Module):
    """Blocks over packed sequences. Longest sequence: config.max_positions tokens."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.rotary = nn.ModuleDict()
        if config.positions == "rope":
            self.rotary["global"] = Rotary(config, config.rope_base)
            if config.local_attention is not None:
                self.rotary["local"] = Rotary(config, config.local_attention.rope_base)
        block = BLOCKS[config.norm_placement]
        self.blocks = nn.ModuleList(block(config, first=i == 0) for i in range(config.num_layers))
        self.final_norm = make_norm(config) if config.norm_placement == "pre" else nn.Identity()

    def forward(self, batch: TokenBatch) -> Tensor:
        """Hidden states at batch.target_positions: (M, D).

        Raises InputError where a sequence is longer than config.max_positions.
        """
        if batch.segments.longest > self.config.max_positions:
            raise InputError(
                f"a sequence of {batch.segments.longest} tokens; this encoder takes at most {self.config.max_positions}"
            )
        spans = {"global": self._span(batch, "global", None)}
        if self.config.local_attention is not None:
            spans["local"] = self._span(batch, "local", self.config.local_attention.window_tokens)
        hidden_TD = self.embeddings(batch)
        *blocks, (last, last_kind) = self._blocks()
        for block, kind in blocks:
            hidden_TD = block(hidden_TD, spans[kind])
        if last_kind == "global":
            hidden_MD = last.forward_read(hidden_TD, spans[last_kind], self._read(batch))
        else:  # a window counts distances, which queries taken out of their sequence no longer show
            hidden_MD = last(hidden_TD, spans[last_kind]).index_select(0, batch.target_positions)
        return self.final_norm(hidden_MD)

    def use_attention(self, choices: dict[str, Choice]) -> None:
        """Run each span's attention through its chosen backend; see choose_attention."""
        for block, kind in self._blocks():
            block.attention.backend = choices[kind].name

    def compile_blocks(self, backend: str = "inductor") -> None:
        """torch.compile each block on its own: one graph serves all blocks of a kind."""
        # Blocks share one code object, and each kind of block has graphs of its own for training and evaluation.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        for block, _ in self._blocks():
            block.compile(fullgraph=True, backend=backend)
        last, _ = self._blocks()[-1]
        last.forward_read = torch.compile(last.forward_read, fullgraph=True, backend=backend)

    def _blocks(self) -> list[tuple[Any, str]]:
        """Each block with its attention span."""
        return list(zip(self.blocks, span_kinds(self.config)))

    def _span(self, batch: TokenBatch, kind: str, window_tokens: int | None) -> Span:
        rotation = self.rotary[kind](batch.position_ids) if kind in self.rotary else None
        return Span(AttentionMask(batch.segments, window_tokens=window_tokens), rotation)

    def _read(self, batch: TokenBatch) -> Read:
        mask = AttentionMask(batch.segments, queries=batch.target_segments)
        positions = batch.target_positions
        rotation = None
        if "global" in self.rotary:
            rotation = self.rotary["global"](batch.position_ids.index_select(0, positions))
        return Read(positions, mask, rotation)


class PredictionHead(nn.Module):
    """norm(gelu(dense(x))), before the tied decoder."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.norm = make_norm(config)

    def forward(self, hidden_MD: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(hidden_MD)))


class MaskedLM(nn.Module):
    """An encoder that predicts the tokens at batch.target_positions; the decoder is the token table plus a bias."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.head = PredictionHead(config)
        self.decoder_bias = nn.Parameter(torch.zeros(config.vocab_size))
        init_encoder(self)

    def forward(self, batch: TokenBatch) -> LossSum:
        """Sum of cross-entropies in nats over the targets, their number, and how many were predicted right."""
        if batch.targets is None:
            raise ValueError("batch has no targets; use logits(batch)")
        hidden_MD = self.hidden(batch)
        hidden_MD = hidden_MD.to(autocast_dtype(hidden_MD))
        return masked_cross_entropy(hidden_MD, *self._decoder(), batch.targets, ignore_index=IGNORE_INDEX)

    def hidden(self, batch: TokenBatch) -> Tensor:
        """What the decoder reads: (M, D)."""
        return self.head(self.encoder(batch))

    def logits(self, batch: TokenBatch) -> Tensor:
        """Scores of every token type at batch.target_positions: (M, V), at least fp32."""
        weight, bias = self._decoder()
        V = self.config.vocab_size
        scores_MV = F.linear(self.hidden(batch), weight[:V])
        return scores_MV.to(torch.promote_types(scores_MV.dtype, bias.dtype)) + bias[:V]

    def num_parameters(self) -> int:
        """Trained numbers, padding rows of the token table left out."""
        tokens = self.encoder.embeddings.tokens
        padding = (tokens.num_embeddings - self.config.vocab_size) * self.config.hidden_size
        return sum(p.numel() for p in self.parameters()) - padding

    def _decoder(self) -> tuple[Tensor, Tensor]:
        """Weight and bias with padded rows; the padding's bias is -inf, so that softmax never sees it."""
        weight = self.encoder.embeddings.tokens.weight
        return weight, F.pad(self.decoder_bias, (0, len(weight) - self.config.vocab_size), value=-math.inf)


def init_encoder(model: nn.Module) -> None:
    """Initial weights of an encoder with any head, from torch's random state.

    bert: normal. modern: truncated normal, and the matrices that write to the residual stream smaller by
    sqrt(2 * layers), as in Warner et al. 2024.
    """
    config: EncoderConfig = model.config  # type: ignore[assignment]
    truncate = config.norm_placement == "pre"
    for name, module in model.named_modules():
        writes = truncate and name.endswith(("attention.out", "feed_forward.down", "head.dense"))
        init_weights(
            module, config.init_std / math.sqrt(2 * config.num_layers) if writes else config.init_std, truncate
        )
