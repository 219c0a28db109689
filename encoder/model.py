"""The encoder, and the masked language model on top of it.

Packed from embedding to loss: one flat run of T tokens, sequences never see each other, and the last block computes
only the M positions that are read. Masked-token prediction: Devlin et al. 2019 (arXiv:1810.04805).

T tokens, M read positions, S sequences, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from encoderkit.encoder.batch import IGNORE_INDEX, TokenBatch
from encoderkit.encoder.config import EncoderConfig
from encoderkit.encoder.heads import PredictionHead, TanhPooler
from encoderkit.encoder.layers import BLOCKS, Read, Span, autocast_dtype, init_encoder, make_norm
from encoderkit.encoder.positions import POSITIONS, NoPositions
from encoderkit.kernels.attention import AttentionMask, Choice, select_backend
from encoderkit.kernels.errors import InputError
from encoderkit.kernels.loss import LossSum, masked_cross_entropy

CPU_MULTIPLE = 32  # tokens, and positions that are read, are padded to this on the CPU
VOCAB_MULTIPLE = 64  # rows of the token table are padded to this inside the model; never predicted, never exported


class Embeddings(nn.Module):
    """Tokens, positions where the scheme adds them, and token types where the config has them, normalised."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(padded_rows(config), config.hidden_size)
        self.token_types = nn.Embedding(config.token_types, config.hidden_size) if config.token_types else None
        self.norm = make_norm(config) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, batch: TokenBatch, positions: NoPositions) -> Tensor:
        """(T,) ids to (T, D)."""
        hidden_TD = positions.embed(self.tokens(batch.input_ids), batch.position_ids)
        if self.token_types is not None:
            types = batch.token_type_ids
            hidden_TD = hidden_TD + self.token_types(torch.zeros_like(batch.input_ids) if types is None else types)
        return self.dropout(self.norm(hidden_TD))


def padded_rows(config: EncoderConfig) -> int:
    """Rows of the token table."""
    return math.ceil(config.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


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
            alibi=config.positions == "alibi",
        )
        for kind in sorted(set(span_kinds(config)))
    }


class Encoder(nn.Module):
    """Blocks over packed sequences. Longest sequence: config.max_positions tokens."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.positions = POSITIONS[config.positions](config)
        block = BLOCKS[config.norm_placement]
        self.blocks = nn.ModuleList(block(config, first=i == 0) for i in range(config.num_layers))
        self.final_norm = make_norm(config) if config.norm_placement == "pre" else nn.Identity()
        self.checkpoint_blocks = False  # keep only each block's input, and compute the rest again in the backward pass
        self.cuda_graphs = False  # compiled blocks are replayed

    def forward(self, batch: TokenBatch) -> Tensor:
        """Hidden states at batch.target_positions: (M, D).

        Raises InputError where a sequence is longer than config.max_positions.
        """
        if batch.segments.longest > self.config.max_positions:
            raise InputError(
                f"a sequence of {batch.segments.longest} tokens; this encoder takes at most "
                f"{self.config.max_positions}, so cut it, or use a model of more positions"
            )
        count = len(batch.target_positions)
        batch = self.rounded(batch)
        if self.cuda_graphs:  # what the graphs of the last pass have given may be written over from here
            torch.compiler.cudagraph_mark_step_begin()
        spans = {"global": self._span(batch, "global", None)}
        if self.config.local_attention is not None:
            spans["local"] = self._span(batch, "local", self.config.local_attention.window_tokens)
        hidden_TD = self.embeddings(batch, self.positions)
        *blocks, (last, last_kind) = self._blocks()
        for block, kind in blocks:
            hidden_TD = self._run(block, hidden_TD, spans[kind])
        hidden_MD = self._run(last.forward_read, hidden_TD, spans[last_kind], self._read(batch, last_kind))
        return self.final_norm(hidden_MD)[:count]

    def rounded(self, batch: TokenBatch) -> TokenBatch:
        """On the CPU, the same batch in one of few shapes.

        oneDNN, which multiplies bf16 and on some machines fp32, makes a kernel for each new shape, for 0.3 to 1 ms a
        product, and keeps the last 1,024. With few shapes, fine-tuning on batches of 32 short texts that are not seen
        again is 1.3 times as fast, pretraining 1.2 times (recipe modern-4x256, two Zen 5 cores).
        """
        if batch.input_ids.device.type != "cpu":
            return batch
        return batch.rounded(CPU_MULTIPLE, self.config.pad_token_id)

    def use_attention(self, choices: dict[str, Choice]) -> None:
        """Run each span's attention through its chosen backend; see choose_attention."""
        for block, kind in self._blocks():
            block.attention.backend = choices[kind].name

    def compile_blocks(self, backend: str = "inductor", *, cuda_graphs: bool = False) -> None:
        """torch.compile each block on its own: one graph serves all blocks of a kind.

        cuda_graphs: record what lies between attention as CUDA graphs, and replay them. Parameters then need gradients
        that stay where they are: those of a graph are written over in the next pass. Not yet run on a GPU.
        """
        # Blocks share one code object, and each kind of block has graphs of its own for training and evaluation.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        self.cuda_graphs = cuda_graphs
        mode = "reduce-overhead" if cuda_graphs else None
        for block, _ in self._blocks():
            block.compile(fullgraph=True, backend=backend, mode=mode)
        last, _ = self._blocks()[-1]
        read = torch.compile(last.forward_read.__func__, fullgraph=True, backend=backend, mode=mode)
        last.forward_read = MethodType(read, last)  # a copy of the encoder binds it to its own block

    def _blocks(self) -> list[tuple[Any, str]]:
        """Each block with its attention span."""
        return list(zip(self.blocks, span_kinds(self.config)))

    def _run(self, block: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """A block on its inputs; with checkpoint_blocks by Chen et al. 2016 (arXiv:1604.06174)."""
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _span(self, batch: TokenBatch, kind: str, window_tokens: int | None) -> Span:
        mask = AttentionMask(batch.segments, window_tokens=window_tokens, alibi_slopes=self.positions.slopes)
        return Span(mask, self.positions.rotation(kind, batch.position_ids))

    def _read(self, batch: TokenBatch, kind: str) -> Read:
        if kind == "local" or self.positions.slopes is not None:
            return Read(batch.target_positions, None, None)
        mask = AttentionMask(batch.segments, queries=batch.target_segments)
        position_ids = batch.position_ids.index_select(0, batch.target_positions)
        return Read(batch.target_positions, mask, self.positions.rotation("global", position_ids))


class MaskedLM(nn.Module):
    """An encoder that predicts the tokens at batch.target_positions.

    The decoder is the token table, or a table of its own where config.tied_decoder is false, plus a bias.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.head = PredictionHead(config)
        self.decoder = None if config.tied_decoder else nn.Embedding(padded_rows(config), config.hidden_size)
        self.decoder_bias = nn.Parameter(torch.zeros(config.vocab_size)) if "decoder" in config.biases else None
        self.pooler = TanhPooler(config) if config.sentence_pairs or config.pooler else None
        self.pair_classifier = nn.Linear(config.hidden_size, 2) if config.sentence_pairs else None
        init_encoder(self)

    def forward(self, batch: TokenBatch) -> LossSum:
        """Sum of cross-entropies in nats over the targets, their number, and how many were predicted right."""
        return self.losses(batch)[0]

    def losses(self, batch: TokenBatch) -> tuple[LossSum, LossSum]:
        """The loss at the targets, and that of the sentence pairs among the read positions, in one pass.

        Without batch.pair_labels the second is over no pair.
        """
        if batch.targets is None:
            raise ValueError("batch has no targets; use logits(batch)")
        batch = self.encoder.rounded(batch)  # here for the targets too
        assert batch.targets is not None
        read_MD = self.encoder(batch)
        hidden_MD = self.head(read_MD)
        hidden_MD = hidden_MD.to(autocast_dtype(hidden_MD))
        tokens = masked_cross_entropy(hidden_MD, *self._decoder(), batch.targets, ignore_index=IGNORE_INDEX)
        if batch.pair_reads is None or batch.pair_labels is None:
            none = torch.zeros((), dtype=torch.int64, device=read_MD.device)
            return tokens, LossSum(torch.zeros_like(tokens.loss), none, none)
        scores_R2 = self._pair_scores(read_MD.index_select(0, batch.pair_reads))
        loss = F.cross_entropy(scores_R2, batch.pair_labels, ignore_index=IGNORE_INDEX, reduction="sum")
        correct = (scores_R2.argmax(1) == batch.pair_labels).sum()  # an ignored label is none of the two
        return tokens, LossSum(loss, batch.num_pairs(), correct)

    def hidden(self, batch: TokenBatch) -> Tensor:
        """What the decoder reads: (M, D)."""
        return self.head(self.encoder(batch))

    def logits(self, batch: TokenBatch) -> Tensor:
        """Scores of every token type at batch.target_positions: (M, V), at least fp32."""
        weight, bias = self._decoder()
        V = self.config.vocab_size
        scores_MV = F.linear(self.hidden(batch), weight[:V])
        return scores_MV.to(torch.promote_types(scores_MV.dtype, torch.float32)) + bias[:V]

    def pair_logits(self, batch: TokenBatch) -> Tensor:
        """Whether the second part of each sequence follows the first, and whether not: (S, 2), at least fp32.

        batch.target_positions are the first tokens of the S sequences. Next-sentence prediction: Devlin et al. 2019.
        """
        return self._pair_scores(self.encoder(batch))

    def _pair_scores(self, hidden_RD: Tensor) -> Tensor:
        if self.pooler is None or self.pair_classifier is None:
            raise ValueError("this model has no sentence-pair head; set config.sentence_pairs")
        scores_R2 = self.pair_classifier(self.pooler(hidden_RD))
        return scores_R2.to(torch.promote_types(scores_R2.dtype, torch.float32))

    def num_parameters(self) -> int:
        """Trained numbers, padding rows of the token table left out."""
        tables = 1 if self.config.tied_decoder else 2
        padding = (padded_rows(self.config) - self.config.vocab_size) * self.config.hidden_size * tables
        return sum(p.numel() for p in self.parameters()) - padding

    def _decoder(self) -> tuple[Tensor, Tensor]:
        """Weight and bias with padded rows; the padding's bias is -inf, so that softmax never sees it."""
        weight = (self.decoder or self.encoder.embeddings.tokens).weight
        bias_V = weight.new_zeros(self.config.vocab_size) if self.decoder_bias is None else self.decoder_bias
        return weight, F.pad(bias_V, (0, len(weight) - self.config.vocab_size), value=-math.inf)
