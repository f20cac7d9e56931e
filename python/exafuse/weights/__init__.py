"""Reading and writing checkpoints: strict safetensors, merged projections, the Hub, memory."""
