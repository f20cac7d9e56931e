"""Tiny checkpoints, and our side of a comparison with a defect planted in it."""

from __future__ import annotations

import importlib

import pytest
import torch

# The package's attribute of this name is the function.
verify = importlib.import_module("exafuse.verification.verify")
verify_sides = importlib.import_module("exafuse.verification.sides")
verify_report = importlib.import_module("exafuse.verification.report")

LLAMA, QWEN2, HYBRID, GLOBAL, PICTURES = verify.TINY_CONFIGS


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One checkpoint of each tiny configuration."""
    result = {}
    for name, values in verify.TINY_CONFIGS.items():
        result[name] = tmp_path_factory.mktemp("tiny")
        verify.make_tiny(values, result[name])
    return result


def compare(folder, **options):
    ids = verify.random_ids(60, 97)
    options = {"backend": "reference", "prefill_chunk": verify.TINY_CHUNK} | options
    return verify.compare_folder(folder, "model", ids, 12, **options)


@pytest.fixture
def broken(monkeypatch):
    """Have our side loaded with a defect: ``change(model)`` is applied after loading."""

    def use(change):
        sound = verify_sides.load_exafuse

        def load(*args):
            model = sound(*args)
            with torch.no_grad():
                change(model)
            return model

        monkeypatch.setattr(verify_sides, "load_exafuse", load)

    return use
