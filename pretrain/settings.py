"""Every setting of a pretraining run, typed, with units and ranges. Imports no torch.

Read from YAML with dotted overrides by encoderkit.pretrain.command_line; config.yaml holds them resolved.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Literal

from encoderkit.encoder.config import (
    Architecture,
    BiasSite,
    EncoderConfig,
    FeedForward,
    HeadActivation,
    Init,
    Norm,
    NormPlacement,
    Positions,
    RopeScaling,
    Size,
    preset,
)
from encoderkit.kernels.errors import InputError

Stages = list[tuple[float, int]]  # a value up to each share of the budget
MOST_WORKERS = 1024  # processes; more are a slip of the pen that would take the machine down
LARGEST_BATCH = 2**30  # tokens a step, some thirty times the largest of the papers (64k sequences of 512)


def check_stages(key: str, stages: Stages) -> None:
    """Raise InputError unless the shares rise between 0 and 1."""
    shares = [0.0, *(until for until, _ in stages), 1.0]
    if any(a >= b for a, b in itertools.pairwise(shares)):
        raise InputError(f"{key} has the shares {shares[1:-1]}; expected rising ones between 0 and 1, such as 0.5, 0.8")


def check_range(key: str, value: float | None, low: float, high: float = float("inf")) -> None:
    """Raise InputError unless value is None or low <= value <= high, and finite."""
    if value is not None and not (low <= value <= high and value < float("inf")):
        allowed = f"at least {_shown(low)}" if high == float("inf") else f"from {_shown(low)} to {_shown(high)}"
        raise InputError(f"{key} is {_shown(value)}; expected {allowed}{' and finite' if value == high else ''}")


def _shown(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is read, and how it is laid out."""

    store: str = ""  # folder made by encoderkit-pretrain prepare
    max_tokens: int = 128  # longest sequence, [CLS] and [SEP] included
    length_curriculum: Stages = field(
        default_factory=list  # [[0.5, 128], [0.8, 256]]: at most 128 tokens until half of the budget is spent, then 256
    )
    row_tokens: int = 1024  # sequences are laid out in rows of this many tokens
    layout: Literal["packed", "padded"] = "packed"  # padded: each sequence padded as its row's, for comparison
    workers: int = 1  # processes that build batches ahead; 0 builds them in the loop

    def __post_init__(self) -> None:
        check_range("data.max_tokens", self.max_tokens, 8, 2**17 - 1)
        check_range("data.workers", self.workers, 0, MOST_WORKERS)
        if self.row_tokens < self.max_tokens:
            raise InputError(
                f"data.row_tokens is {self.row_tokens}; expected at least data.max_tokens = {self.max_tokens}"
            )
        check_stages("data.length_curriculum", self.length_curriculum)
        for _, length in self.length_curriculum:
            check_range("data.length_curriculum", length, 8, self.max_tokens)
        if self.length_curriculum and self.layout == "padded":
            raise InputError("data.layout is padded, which is for one length; leave data.length_curriculum out")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A preset at a size, or a pretrained model to go on with; a field that is set replaces theirs."""

    preset: Architecture | None = None  # the papers' parts; None: modern
    size: Size | None = None  # the papers' sizes; None: tiny
    init_from: str | None = None  # folder or hub name of a pretrained encoder to go on with, instead of a preset
    token_vectors: Literal["random", "cooccurrence"] = "random"  # what the token table begins with
    hidden_size: int | None = None  # width
    num_layers: int | None = None
    num_heads: int | None = None  # hidden_size / num_heads must be a multiple of 8
    intermediate_size: int | None = None  # width of the feed-forward layers; of gated ones after gating
    max_positions: int | None = None  # longest sequence, tokens; with init_from at least the pretrained one's
    positions: Positions | None = None
    rope_base: float | None = None  # of the layers that see the whole sequence
    rope_scaling: RopeScaling | None = None  # stretches rotary positions, for sequences longer than those trained on
    window_tokens: int | None = None  # seen to each side by a local layer
    global_every: int | None = None  # every so many layers, from the first, sees the whole sequence; 0: none, 1: all
    local_rope_base: float | None = None  # of the layers with a window
    norm: Norm | None = None
    norm_placement: NormPlacement | None = None
    embedding_norm: bool | None = None  # whether the embeddings are normalised before the first block
    norm_eps: float | None = None
    feed_forward: FeedForward | None = None
    head_activation: HeadActivation | None = None  # of the prediction head
    biases: list[BiasSite] | None = None  # which linear layers and norms have one
    token_types: int | None = None  # number of token types, 0 for none
    tied_decoder: bool | None = None  # whether the decoder's weight is the token table
    sentence_pairs: bool | None = None  # a pooler and a two-way head beside the masked LM
    hidden_dropout: float | None = None  # probability
    attention_dropout: float | None = None  # probability
    init: Init | None = None  # of the weights: normal (BERT), truncated at 2 std, depth_scaled (ModernBERT)
    init_std: float | None = None  # standard deviation of the initial weights

    def __post_init__(self) -> None:
        if self.init_from is None:
            self.encoder_config(vocab_size=64, pad_token_id=0)  # told at once, whatever the vocabulary will be
            return
        for name, value in vars(self).items():
            if name not in CONTINUED and value not in (None, "random"):
                raise InputError(
                    f"model.{name} is {value!r}, but model.init_from {self.init_from} brings its own; leave it out, "
                    f"only {', '.join(CONTINUED[1:])} may be changed"
                )

    def encoder_config(self, *, vocab_size: int, pad_token_id: int) -> EncoderConfig:
        """The preset at its size with the fields that are set; not for a model with init_from."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        for name in ("token_vectors", "preset", "size"):  # how it begins, not what it is
            given.pop(name, None)
        architecture, size = self.preset or "modern", self.size or "tiny"
        return preset(architecture, size, vocab_size=vocab_size, pad_token_id=pad_token_id, **given)


# What may be set beside init_from: how long sequences are, and how training goes.
CONTINUED = (
    "init_from",
    "max_positions",
    "rope_base",
    "rope_scaling",
    "local_rope_base",
    "hidden_dropout",
    "attention_dropout",
)


Select = Literal["token", "word", "span"]
Pairs = Literal["none", "nsp", "sop"]
OptimizerName = Literal["adamw", "stable_adamw", "lamb", "muon"]
MaskingPreset = Literal["plain", "bert"]
PRESET_SHARES: dict[MaskingPreset, tuple[float, float, float]] = {  # rate, mask_share, random_share
    "plain": (0.30, 1.0, 0.0),  # Wettig et al. 2023
    "bert": (0.15, 0.8, 0.1),  # Devlin et al. 2019
}


@dataclass(frozen=True, kw_only=True)
class Masking:
    """Masked language modelling: a preset; a field that is set replaces the preset's.

    Devlin et al. 2019; rates: Wettig et al. 2023, arXiv:2202.08005. Readers take start_rate and shares.
    """

    preset: MaskingPreset = "plain"  # plain: rate 0.3, all [MASK]; bert: rate 0.15, mask_share 0.8, random_share 0.1
    select: Select = "token"  # tokens, whole words, or spans of 1 to 10 whole words (SpanBERT)
    rate: float | None = None  # share of the tokens that are predicted, at the start; null: the preset's
    final_rate: float | None = None  # share at the end, reached linearly; None keeps rate
    mask_share: float | None = None  # of the selected: replaced by [MASK]; null: the preset's
    random_share: float | None = None  # of the selected: replaced by a random token, the rest stay; null: the preset's

    def __post_init__(self) -> None:
        check_range("masking.rate", self.rate, 0.01, 0.9)
        check_range("masking.final_rate", self.final_rate, 0.01, 0.9)
        check_range("masking.mask_share", self.mask_share, 0, 1)
        check_range("masking.random_share", self.random_share, 0, 1)
        if sum(self.shares) > 1:
            raise InputError("masking.mask_share + masking.random_share is over 1; expected at most 1")

    @property
    def start_rate(self) -> float:
        """Share of the tokens that are predicted at the start."""
        return PRESET_SHARES[self.preset][0] if self.rate is None else self.rate

    @property
    def shares(self) -> tuple[float, float]:
        """Of the selected: replaced by [MASK], replaced by a random token."""
        _, mask, random = PRESET_SHARES[self.preset]
        given = self.mask_share, self.random_share
        return mask if given[0] is None else given[0], random if given[1] is None else given[1]


@dataclass(frozen=True, kw_only=True)
class TaskOptimizer:
    """One for everything, or Muon for the matrices of the blocks and AdamW for the rest."""

    name: OptimizerName = "muon"  # muon: for the matrices of the blocks, AdamW for the rest
    lr: float = 2e-3  # peak learning rate; of lamb in lengths of the matrix that a step moves
    muon_lr: float = 4e-3  # peak learning rate of Muon, in units of AdamW's update size
    weight_decay: float = 0.01  # decoupled; not on norms and biases
    betas: tuple[float, float] = (0.9, 0.98)  # of all but Muon
    eps: float = 1e-6  # of all but Muon
    clip: float = 1.0  # largest gradient norm; 0 leaves gradients alone

    def __post_init__(self) -> None:
        check_range("optimizer.lr", self.lr, 0, 10)
        check_range("optimizer.muon_lr", self.muon_lr, 0, 10)
        check_range("optimizer.weight_decay", self.weight_decay, 0)
        check_range("optimizer.eps", self.eps, 0)
        for beta in self.betas:
            check_range("optimizer.betas", beta, 0, 0.99999)
        check_range("optimizer.clip", self.clip, 0)


@dataclass(frozen=True, kw_only=True)
class Optimizer(TaskOptimizer):
    """The same, with steps of pretraining that are skipped."""

    skip_sigmas: float = 6.0  # steps whose loss or gradient norm is this far above the last 128 are skipped; 0: none

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("optimizer.skip_sigmas", self.skip_sigmas, 0)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate as a pure function of progress, 0 to 1."""

    name: Literal["linear", "cosine", "wsd"] = "linear"  # wsd: warm-up, stable, 1 - sqrt decay
    warmup: float = 0.03  # share of the budget spent rising to the peak; 0.5 with linear makes a triangle
    decay: float = 0.2  # share of the budget spent falling at the end; wsd only (1 - sqrt)
    final: float = 0.0  # share of the peak that is left at the end

    def __post_init__(self) -> None:
        for name in ("warmup", "decay", "final"):
            check_range(f"schedule.{name}", getattr(self, name), 0, 1)
        if self.name == "wsd" and self.warmup + self.decay > 1 + 1e-9:
            raise InputError(
                f"schedule.warmup is {self.warmup:g} and schedule.decay {self.decay:g}; expected at most 1 together"
            )


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long to train: exactly one of the three. Minutes are not reproducible bit for bit; steps and tokens are."""

    steps: int | None = None
    tokens: int | None = None  # row padding counted in, rounded up to whole steps
    minutes: float | None = None  # wall-clock time; token vectors, validation and saving counted in

    def __post_init__(self) -> None:
        for name in ("steps", "tokens", "minutes"):
            check_range(f"budget.{name}", getattr(self, name), 0.01 if name == "minutes" else 1)
        if sum(value is not None for value in (self.steps, self.tokens, self.minutes)) > 1:
            raise InputError("budget has more than one of steps, tokens and minutes; set exactly one")


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When the state is written, and how many states are kept.

    Where neither every_steps nor log.validate_every_steps is set, it is also written at each validation with the lowest
    loss so far: no step of a save by minutes need be one of a validation.
    """

    every_steps: int | None = None
    every_minutes: float | None = 10.0
    keep: int = 2  # newest whole ones that stay, beside the best of those written at the step of a validation
    average: int = 1  # final/ is the mean of so many newest ones, of as many as there are; keep must be as large
    asynchronous: bool = False  # written behind the training steps, from a copy in memory (12 bytes a parameter)

    def __post_init__(self) -> None:
        check_range("checkpoints.every_steps", self.every_steps, 1)
        check_range("checkpoints.every_minutes", self.every_minutes, 0.01)
        check_range("checkpoints.keep", self.keep, 2)
        check_range("checkpoints.average", self.average, 1)
        if self.average > self.keep:
            raise InputError(f"checkpoints.keep is {self.keep}; expected at least checkpoints.average = {self.average}")


@dataclass(frozen=True, kw_only=True)
class Log:
    """What is told while the run goes on."""

    every_steps: int = 10  # steps between lines of log.jsonl
    validate_every_steps: int | None = (
        None  # steps between losses at the probe; null: at each tenth, of minutes as often as a tenth of them allows
    )
    trackers: list[str] = field(default_factory=list)  # names that Accelerate knows: tensorboard, wandb, ...

    def __post_init__(self) -> None:
        check_range("log.every_steps", self.every_steps, 1)
        check_range("log.validate_every_steps", self.validate_every_steps, 1)


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """Seconds after which a part that hangs ends the run, by name."""

    collective: float = 1800.0  # that ranks wait for each other: also for the first one's validation and save
    loader: float = 120.0  # that a step waits for the processes that build its batches

    def __post_init__(self) -> None:
        check_range("timeouts.collective", self.collective, 1, 10**6)
        check_range("timeouts.loader", self.loader, 1, 10**6)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What is measured beside the fixed probe, whenever that is."""

    minimal_pairs: str | None = None  # file of minimal pairs, as encoderkit-finetune minimal-pairs takes
    num_pairs: int = 300  # of the file, those with the smallest hashes; 300 give an accuracy to 3 points

    def __post_init__(self) -> None:
        check_range("validation.num_pairs", self.num_pairs, 1)


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """A pretraining run."""

    out: str = "runs/pretrain"  # run folder
    seed: int = 0  # of initial weights, order, masking and dropout
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    masking: Masking = field(default_factory=Masking)
    pairs: Pairs = "none"  # nsp: does B follow A (BERT); sop: is their order right (ALBERT); beside masked tokens
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    budget: Budget = field(default_factory=Budget)
    batch_tokens: int = 8192  # tokens an optimizer step, over all ranks; a multiple of data.row_tokens
    batch_ramp: Stages = field(
        default_factory=list  # [[0.05, 1024], [0.1, 2048]]: 1,024 tokens a step until 5% of the budget, then 2,048
    )
    micro_batch_tokens: int = 8192  # tokens that one rank holds at once; a multiple of data.row_tokens
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"  # of matrix products; weights are fp32; fp8: torchao
    gradient_reduction: Literal["fp32", "bf16"] = "fp32"  # of gradients, over ranks; bf16 sends half, rounded
    attention: Literal["auto", "reference", "torch", "xformers", "varlen"] = "auto"  # backend; auto picks the fastest
    deterministic: bool = False  # on GPU: only kernels whose bits repeat; on CPU they always do
    compile: bool = False  # torch.compile each block
    cuda_graphs: bool = False  # with compile: replay each block's kernels but attention; not yet run on a GPU
    gradient_checkpointing: bool = False  # blocks run twice, so that memory for activations falls to their inputs
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    log: Log = field(default_factory=Log)
    timeouts: Timeouts = field(default_factory=Timeouts)
    validation: Validation = field(default_factory=Validation)
    price_per_hour: float | None = None  # of the machines, in any currency: tells what the run costs

    def __post_init__(self) -> None:
        check_range("seed", self.seed, 0, 2**32 - 1)
        check_range("price_per_hour", self.price_per_hour, 0)
        check_stages("batch_ramp", self.batch_ramp)
        sizes = [("batch_tokens", self.batch_tokens), ("micro_batch_tokens", self.micro_batch_tokens)]
        for key, value in [*sizes, *(("batch_ramp", tokens) for _, tokens in self.batch_ramp)]:
            check_range(key, value, 1, LARGEST_BATCH)
            if value % self.data.row_tokens:
                raise InputError(f"{key} is {value}; expected a multiple of data.row_tokens = {self.data.row_tokens}")
        if self.cuda_graphs and not self.compile:
            raise InputError("cuda_graphs is true, which records compiled blocks; set compile true too")
        if self.model.init_from is None:
            positions = self.model.encoder_config(vocab_size=64, pad_token_id=0).max_positions
            if self.data.max_tokens > positions:
                raise InputError(
                    f"data.max_tokens has sequences of {self.data.max_tokens} tokens; "
                    f"model.max_positions is {positions}"
                )


@dataclass(frozen=True, kw_only=True)
class DoctorSettings(PretrainSettings):
    """A pretraining run that is looked at."""

    out: str = "runs/pretrain"  # the recipe's run folder, which is left alone
