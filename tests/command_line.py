"""Checkpoints to run the command on, and ways to run it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import chat_tokenizers
import exafuse
from exafuse.cli import commands as cli
from exafuse.text.chat import load_processor
from exafuse.verification.verify import TINY_CONFIGS, make_tiny

SOURCE = Path(exafuse.__file__).parents[1]
LLAMA = next(iter(TINY_CONFIGS))


class Terminal(io.StringIO):
    """A stream that claims to be one."""

    def isatty(self):
        return True


def make_folder(folder, family, **changes):
    """A tiny checkpoint with the tokenizer and chat template of a family (None: no template)."""
    chat_tokenizers.save_family(family or "qwen2", folder)
    if family is None:
        (folder / "chat_template.jinja").unlink()
    size = max(load_processor(folder).get_vocab().values()) + 1
    eos = size - 1  # a token that the random model hardly ever picks
    values = TINY_CONFIGS[LLAMA] | {"vocab_size": size, "eos_token_id": eos} | changes
    make_tiny(values, folder)
    return folder


def run(argv, **options):
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1"}
    environment |= options.pop("env", {})
    command = [sys.executable, "-m", "exafuse", *argv]
    options = {"capture_output": True, "text": True, "timeout": 120} | options
    return subprocess.run(command, env=environment, check=False, **options)


def exit_code(argv):
    """Of main(), whether it returns or argparse leaves."""
    try:
        return cli.main(argv)
    except SystemExit as error:
        return error.code
