"""The encoder: configuration, model, heads, and conversion to and from transformers."""

if __name__ != "encoderkit.encoder":
    raise ImportError(
        "import encoderkit.encoder, not encoder: a bare import from the repository root makes a second copy"
    )

_HOMES = {
    "EncoderConfig": "config",
    "preset": "config",
    "TokenBatch": "batch",
    "MaskedLM": "model",
    "SequenceClassifier": "classifier",
    "ChoiceClassifier": "classifier",
    "TokenClassifier": "classifier",
    "SpanClassifier": "classifier",
    "load": "checkpoint",
    "save": "checkpoint",
    "load_classifier": "checkpoint",
    "save_classifier": "checkpoint",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """Import torch only when something that needs it is asked for; --help stays quick."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
