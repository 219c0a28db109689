"""The encoder: configuration, model, heads, and conversion to and from transformers."""

if __name__ != "encoderkit.encoder":
    raise ImportError(
        "import encoderkit.encoder, not encoder: a bare import from the repository root makes a second copy of the modules"
    )
