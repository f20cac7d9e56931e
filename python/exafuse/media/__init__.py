"""Images and videos on their way to the model: read with care, prepared by the checkpoint's own
processor, counted into the prompt."""
