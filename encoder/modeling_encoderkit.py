"""BERT-style encoders as encoderkit composes them, as Hugging Face models; torch and transformers are all they need.

encoderkit puts this file, its layers and the configuration beside the weights of encoders that transformers has no
class for: the folder then opens with AutoModel.from_pretrained(folder, trust_remote_code=True).

B sequences, L tokens of the longest, D hidden size, V vocabulary
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.models.bert.modeling_bert import BertForPreTrainingOutput
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_encoderkit import EncoderkitConfig
from .layers_encoderkit import (
    EncoderkitAttention,
    EncoderkitBlock,
    EncoderkitEmbeddings,
    EncoderkitPositions,
    EncoderkitPredictionHead,
    EncoderkitTanhPooler,
    make_norm,
)


class EncoderkitPreTrainedModel(PreTrainedModel):
    """What transformers has to know of all models here."""

    config: EncoderkitConfig
    config_class = EncoderkitConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EncoderkitBlock"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": EncoderkitBlock, "attentions": EncoderkitAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initial weights of one module by config.init; zero biases.

        normal: as in Devlin et al. 2019. truncated: cut at two standard deviations. depth_scaled: truncated, and the
        matrices that write to the residual stream, the prediction head with them, smaller by sqrt(2 * layers), as in
        Warner et al. 2024, arXiv:2412.13663.
        """
        for name in ("bias", "decoder_bias"):
            if isinstance(bias := getattr(module, name, None), Tensor):
                init.zeros_(bias)
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            return super()._init_weights(module)  # norms
        std = self.config.init_std
        # By name: transformers asks for no initial weights of modules without weights of their own, as blocks are.
        name = next((name for name, part in self.named_modules() if part is module), "")
        if self.config.init == "depth_scaled" and name.endswith(("attention.out", "feed_forward.down", "head.dense")):
            std /= math.sqrt(2 * self.config.num_layers)
        if self.config.init == "normal":
            init.normal_(module.weight, std=std)
        else:
            init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)


class EncoderkitModel(EncoderkitPreTrainedModel):
    """Hidden states of every token."""

    def __init__(self, config: EncoderkitConfig) -> None:
        super().__init__(config)
        self.embeddings = EncoderkitEmbeddings(config)
        self.positions = EncoderkitPositions(config)
        self.blocks = nn.ModuleList(EncoderkitBlock(config, layer) for layer in range(config.num_layers))
        self.final_norm = make_norm(config) if config.norm_placement == "pre" else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.tokens

    def set_input_embeddings(self, value) -> None:
        self.embeddings.tokens = value

    @capture_outputs
    def forward(
        self, input_ids=None, attention_mask=None, token_type_ids=None, position_ids=None, inputs_embeds=None, **kwargs
    ) -> BaseModelOutput:
        """Hidden states of padded sequences, or of one flat row of packed ones.

        input_ids: (B, L), or inputs_embeds: (B, L, D). attention_mask: (B, L), 1 on real tokens; position_ids count
        them from 0 unless given. cu_seq_lens_q: where the packed sequences of a flat row begin, for attention
        implementations that know it. Raises ValueError.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; expected (batch, tokens)")
        tokens_BLD = self.embeddings.tokens(input_ids) if inputs_embeds is None else inputs_embeds
        starts = kwargs.get("cu_seq_lens_q")
        longest = tokens_BLD.shape[1] if starts is None else int(starts.diff().max())
        if longest > self.config.max_positions:
            raise ValueError(f"a sequence of {longest} tokens; this encoder takes at most {self.config.max_positions}")
        implementation = self.config._attn_implementation
        if starts is not None and implementation in ("eager", "sdpa"):
            raise ValueError(f"{implementation} attention does not know cu_seq_lens_q; pad instead of packing")
        if position_ids is not None and (self.config.positions, implementation) == ("alibi", "encoderkit"):
            raise ValueError(
                "position_ids are given; encoderkit attention counts the distances of ALiBi itself, use sdpa"
            )
        if position_ids is None:
            position_ids = self._count(tokens_BLD, attention_mask, starts)

        hidden_BLD = self.embeddings(self.positions.embed(tokens_BLD, position_ids), token_type_ids)
        masks, rotations = {}, {}
        for span in {self.config.span(layer) for layer in range(self.config.num_layers)}:
            create = create_bidirectional_mask if span == "global" else create_bidirectional_sliding_window_mask
            masks[span] = create(config=self.config, inputs_embeds=hidden_BLD, attention_mask=attention_mask)
            if self.config.positions == "alibi" and implementation in ("eager", "sdpa"):
                masks[span] = self.positions.lower_scores(masks[span], position_ids, _compute_dtype(hidden_BLD))
            elif self.config.positions == "alibi" and implementation != "encoderkit":
                raise ValueError(f"{implementation} attention has no ALiBi; expected eager, sdpa or encoderkit")
            rotations[span] = self.positions.rotation(span, position_ids)
        for layer, block in enumerate(self.blocks):
            span = self.config.span(layer)
            hidden_BLD = block(hidden_BLD, masks[span], rotations[span], **kwargs)
        return BaseModelOutput(last_hidden_state=self.final_norm(hidden_BLD))

    def _count(self, tokens_BLD: Tensor, attention_mask: Tensor | None, starts: Tensor | None) -> Tensor:
        """Positions from 0 in each sequence: (B, L), or (1, L) where all are alike."""
        if attention_mask is not None and starts is None:
            return (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        counted_1L = torch.arange(tokens_BLD.shape[1], device=tokens_BLD.device).unsqueeze(0)
        return counted_1L if starts is None else counted_1L - starts[:-1].repeat_interleave(starts.diff())


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that matrix products of this tensor run in."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def first_tokens(hidden_BLD: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Hidden states of the first real token of each sequence: (B, D)."""
    if attention_mask is None:
        return hidden_BLD[:, 0]
    return hidden_BLD.take_along_dim(attention_mask.long().argmax(1).view(-1, 1, 1), dim=1).squeeze(1)


class EncoderkitDecodingModel(EncoderkitPreTrainedModel):
    """An encoder with the prediction head and the decoder, which is the token table or a table of its own."""

    def __init__(self, config: EncoderkitConfig) -> None:
        super().__init__(config)
        self.encoder = EncoderkitModel(config)
        self.head = EncoderkitPredictionHead(config)
        self.decoder = None if config.tied_decoder else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.decoder_bias = nn.Parameter(torch.zeros(config.vocab_size)) if "decoder" in config.biases else None

    def token_logits(self, hidden_BLD: Tensor) -> Tensor:
        """Scores of every token type: (B, L, V)."""
        decoder = self.encoder.embeddings.tokens if self.decoder is None else self.decoder
        return F.linear(self.head(hidden_BLD), decoder.weight, self.decoder_bias)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.decoder

    def set_output_embeddings(self, value) -> None:
        self.decoder = value

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True) -> nn.Embedding:
        """As in transformers; new tokens have decoder bias 0."""
        tokens = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if self.decoder_bias is not None:
            more = len(tokens.weight) - len(self.decoder_bias)
            self.decoder_bias = nn.Parameter(F.pad(self.decoder_bias.detach(), (0, more)))
        return tokens


class EncoderkitForMaskedLM(EncoderkitDecodingModel):
    """Predicts the tokens that labels name."""

    _keys_to_ignore_on_load_unexpected = [r"^pooler\.", r"^pair_classifier\."]  # noqa: RUF012

    def __init__(self, config: EncoderkitConfig) -> None:
        super().__init__(config)
        self.pooler = EncoderkitTanhPooler(config) if config.pooler else None  # not read here, but kept
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, **kwargs
    ) -> MaskedLMOutput:
        """EncoderkitModel's arguments; labels: (B, L), -100 where nothing is asked; loss: the mean over the others."""
        outputs = self.encoder(input_ids, attention_mask, token_type_ids, return_dict=True, **kwargs)
        logits_BLV = self.token_logits(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BLV, labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(loss, logits_BLV, outputs.hidden_states, outputs.attentions)


class EncoderkitForPreTraining(EncoderkitDecodingModel):
    """Predicts tokens, and whether the second part of each sequence follows the first; for config.sentence_pairs."""

    accepts_loss_kwargs = False  # the sum of two means has not one denominator: the Trainer must not hand one over

    def __init__(self, config: EncoderkitConfig) -> None:
        super().__init__(config)
        if not config.sentence_pairs:
            raise ValueError("sentence_pairs is false: this encoder has no pair head; use EncoderkitForMaskedLM")
        self.pooler = EncoderkitTanhPooler(config)
        self.pair_classifier = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, next_sentence_label=None, **kwargs
    ) -> BertForPreTrainingOutput:
        """EncoderkitForMaskedLM's arguments; next_sentence_label: (B,), 0 where the second part follows, 1 where not.

        loss: the sum of the two means, where both kinds of labels are given.
        """
        if kwargs.get("cu_seq_lens_q") is not None:
            raise ValueError("cu_seq_lens_q is given; a packed row has no one first token, pad instead")
        outputs = self.encoder(input_ids, attention_mask, token_type_ids, return_dict=True, **kwargs)
        logits_BLV = self.token_logits(outputs.last_hidden_state)
        pairs_B2 = self.pair_classifier(self.pooler(first_tokens(outputs.last_hidden_state, attention_mask)))
        loss = None
        if labels is not None and next_sentence_label is not None:
            loss = F.cross_entropy(logits_BLV.flatten(0, 1).float(), labels.flatten())
            loss = loss + F.cross_entropy(pairs_B2.float(), next_sentence_label.flatten())
        return BertForPreTrainingOutput(loss, logits_BLV, pairs_B2, outputs.hidden_states, outputs.attentions)


class EncoderkitClassifyingModel(EncoderkitPreTrainedModel):
    """An encoder with a linear layer over some outputs, behind a prediction head in the modern architecture."""

    def __init__(self, config: EncoderkitConfig, num_outputs: int) -> None:
        super().__init__(config)
        self.encoder = EncoderkitModel(config)
        self.head = EncoderkitPredictionHead(config) if config.architecture == "modern" else None
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.classifier = nn.Linear(config.hidden_size, num_outputs)

    def encode(self, input_ids, attention_mask, token_type_ids, kwargs):
        """Hidden states of padded sequences."""
        if kwargs.get("cu_seq_lens_q") is not None:
            raise ValueError("cu_seq_lens_q is given; task models read padded sequences, pad instead")
        return self.encoder(input_ids, attention_mask, token_type_ids, return_dict=True, **kwargs)

    def token_scores(self, hidden_BLD: Tensor) -> Tensor:
        """Outputs of every token: (B, L, outputs)."""
        return self.classifier(self.dropout(hidden_BLD if self.head is None else self.head(hidden_BLD)))


class EncoderkitPoolingModel(EncoderkitClassifyingModel):
    """Outputs for whole sequences, from the first token or from the mean of all, special tokens counted in."""

    accepts_loss_kwargs = False  # not all of its losses divide by the denominator that the Trainer would hand over

    def __init__(self, config: EncoderkitConfig, num_outputs: int) -> None:
        super().__init__(config, num_outputs)
        self.pooler = EncoderkitTanhPooler(config) if self.head is None else None

    def sequence_scores(self, hidden_BLD: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, outputs)."""
        if self.config.pooling == "cls":
            pooled_BD = first_tokens(hidden_BLD, attention_mask)
        elif attention_mask is None:
            pooled_BD = hidden_BLD.mean(1)
        else:
            real_BL1 = attention_mask.unsqueeze(-1).to(hidden_BLD.dtype)
            pooled_BD = (hidden_BLD * real_BL1).sum(1) / real_BL1.sum(1).clamp(min=1)
        transform = self.pooler or self.head
        assert transform is not None
        return self.classifier(self.dropout(transform(pooled_BD)))


class EncoderkitForSequenceClassification(EncoderkitPoolingModel):
    """Labels for whole sequences."""

    def __init__(self, config: EncoderkitConfig) -> None:
        super().__init__(config, len(config.id2label or ()))
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, **kwargs
    ) -> SequenceClassifierOutput:
        """EncoderkitModel's arguments but packed rows; labels: (B,), the loss as in transformers' own classes."""
        outputs = self.encode(input_ids, attention_mask, token_type_ids, kwargs)
        logits = self.sequence_scores(outputs.last_hidden_state, attention_mask)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class EncoderkitForMultipleChoice(EncoderkitPoolingModel):
    """Which of a question's choices is the answer."""

    def __init__(self, config: EncoderkitConfig) -> None:
        super().__init__(config, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, **kwargs
    ) -> MultipleChoiceModelOutput:
        """input_ids, attention_mask, token_type_ids: (B, choices, L); labels: (B,), the index of the answer."""
        B = len(input_ids)
        parts = (input_ids, attention_mask, token_type_ids)
        input_ids, attention_mask, token_type_ids = (part if part is None else part.flatten(0, 1) for part in parts)
        outputs = self.encode(input_ids, attention_mask, token_type_ids, kwargs)
        logits = self.sequence_scores(outputs.last_hidden_state, attention_mask).view(B, -1)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return MultipleChoiceModelOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class EncoderkitForTokenClassification(EncoderkitClassifyingModel):
    """Labels for tokens."""

    def __init__(self, config: EncoderkitConfig) -> None:
        super().__init__(config, len(config.id2label or ()))
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, **kwargs
    ) -> TokenClassifierOutput:
        """EncoderkitModel's arguments but packed rows; labels: (B, L), -100 where nothing is asked."""
        outputs = self.encode(input_ids, attention_mask, token_type_ids, kwargs)
        logits_BLC = self.token_scores(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BLC, labels, config=self.config, **kwargs)
        return TokenClassifierOutput(loss, logits_BLC, outputs.hidden_states, outputs.attentions)


class EncoderkitForQuestionAnswering(EncoderkitClassifyingModel):
    """Where in a context the answer to a question begins and ends."""

    def __init__(self, config: EncoderkitConfig) -> None:
        super().__init__(config, 2)
        if self.head is None:
            self.dropout = nn.Dropout(0.0)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        start_positions=None,
        end_positions=None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        """EncoderkitModel's arguments but packed rows; start_positions, end_positions: (B,), L and above ignored."""
        outputs = self.encode(input_ids, attention_mask, token_type_ids, kwargs)
        start_BL, end_BL = self.token_scores(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_BL, end_BL, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(loss, start_BL, end_BL, outputs.hidden_states, outputs.attentions)
