"""Fine-tuning: tasks, metrics, the loop for every head, prediction."""

if __name__ != "encoderkit.finetune":
    raise ImportError(
        "import encoderkit.finetune, not finetune: a bare import from the repository root makes a second copy"
    )
