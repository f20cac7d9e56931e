"""Continuing prompts: settings, inputs, sampling, the decoding loop, when to stop."""
