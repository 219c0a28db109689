"""Pretraining: corpora, store, order, objectives, optimizer, loop, checkpoints, run folder."""

if __name__ != "encoderkit.pretrain":
    raise ImportError(
        "import encoderkit.pretrain, not pretrain: a bare import from the repository root makes a second copy"
    )
