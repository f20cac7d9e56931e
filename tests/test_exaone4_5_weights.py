"""Weights of EXAONE 4.5: names of today and of older files, the draft module, saving, sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoint_files as files
import exafuse
import pytest
import tiny_models
import tiny_vision
import torch
from exafuse.errors import CheckpointError, ConfigError
from exafuse.models.exaone4_5 import Exaone4_5
from torch import Tensor

HIDDEN = 64


def load(folder: Path, **kwargs: Any) -> Exaone4_5:
    model = exafuse.from_pretrained(folder, backend="reference", device="cpu", **kwargs)
    assert isinstance(model, Exaone4_5)
    return model


def mtp_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A draft module: a layer like the model's first, three norms and a projection."""
    generator = torch.Generator().manual_seed(1)
    layer = "model.language_model.layers.0."
    new = {f"mtp.layers.0.{n.removeprefix(layer)}": t for n, t in state.items() if layer in n}
    new["mtp.fc.weight"] = torch.zeros(HIDDEN, 2 * HIDDEN)
    for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        new[f"mtp.{norm}.weight"] = torch.zeros(HIDDEN)
    return {n: torch.randn(t.shape, generator=generator) for n, t in new.items()}


def released_like(folder: Path, **changes: Any) -> None:
    """Write what the released config says and transformers' class does not."""
    values = json.loads((folder / "config.json").read_text())
    text = values["text_config"]
    text["model_type"] = "exaone4_5_text"
    text["layer_types"].append("sliding_attention")
    rope = text.get("rope_parameters") or text["rope_scaling"]
    rope["rope_theta"] = 1e6
    text |= {"num_kv_heads": 2, "reorder_qk_norm": True, "video_token_id": None}
    text |= {"tie_word_embeddings": True, "max_window_layers": 4}
    values["vision_config"] |= {"in_chans": 3, "spatial_patch_size": 14, "tokens_per_second": 2}
    values |= {"sliding_window": None, "vocab_size": 97, "vision_token_id": 7, **changes}
    (folder / "config.json").write_text(json.dumps(values))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint as released: odd keys, 5 layer types for 4 layers, a draft module."""
    tiny_models.save(tiny_vision.build(), tmp_path)
    state = files.read(tmp_path)
    files.write(tmp_path, {**state, **mtp_weights(state)})
    released_like(tmp_path)
    return tmp_path


def test_as_released(folder: Path) -> None:
    """The draft module is loaded if it is there, and saved; transformers reads the rest."""
    model = load(folder)
    assert model.mtp is not None
    assert model.config.layers[3].window_size == (-1, 0)
    assert (len(model.config.layers), len(model.config.mtp_layers)) == (4, 1)
    assert model.config.rope.theta == 1e6
    files.assert_same(_saved(model, folder), files.read(folder))
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == model.config.num_parameters()


def _saved(model: Exaone4_5, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder / "saved")
    assert load(folder / "saved").config == model.config
    return files.read(folder / "saved")


@torch.no_grad()
def test_transformers_reads_what_is_saved(folder: Path) -> None:
    model = load(folder)
    _saved(model, folder)
    theirs = tiny_vision.load(folder / "saved", attn_implementation="eager", dtype=torch.float32)
    state = files.read(folder)
    ours = {n: t for n, t in state.items() if not n.startswith("mtp.")}
    files.assert_same(dict(theirs.state_dict()), ours)
    generator = torch.Generator().manual_seed(0)
    prompt = tiny_vision.make_prompt(theirs.config, [[1, 4, 6]], [[2, 4, 4]], generator)
    a, b = model(prompt.ids, **prompt.vision).logits, theirs(prompt.ids, **prompt.vision).logits
    assert float((a - b).abs().max()) <= 2e-5 * float(b.abs().max())


def test_mtp_on_and_off(folder: Path) -> None:
    without = load(folder, mtp=False)
    assert without.mtp is None
    assert without.config.mtp_layers == ()
    assert not any(name.startswith("mtp.") for name in _saved(without, folder))
    assert load(folder, mtp=True).mtp is not None
    # a silent config, weights that are there
    values = json.loads((folder / "config.json").read_text())
    values["text_config"]["layer_types"].pop()
    (folder / "config.json").write_text(json.dumps(values))
    assert load(folder).mtp is not None
    # a config that speaks of a module, weights that are not there
    state = files.read(folder)
    files.write(folder, {n: t for n, t in state.items() if not n.startswith("mtp.")})
    released_like(folder)
    assert load(folder).mtp is None
    with pytest.raises(ValueError, match=r"mtp: expected a checkpoint with mtp\.\* tensors"):
        load(folder, mtp=True)


@pytest.mark.parametrize("name", ["mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight"])
def test_half_a_draft_module_is_refused(folder: Path, name: str) -> None:
    state = files.read(folder)
    files.write(folder, {n: t for n, t in state.items() if n != name})
    with pytest.raises(CheckpointError, match=f"1 tensors are missing: '{name}'"):
        load(folder)
    assert load(folder, mtp=False).mtp is None


OLDER = {
    "tower beside the language model": ("visual.", "language_model.model.", "language_model."),
    "text model's own names": ("visual.", "model.", ""),
    "bare language model": ("model.visual.", "language_model.", ""),
}


@pytest.mark.parametrize("layout", OLDER)
def test_older_names(folder: Path, layout: str) -> None:
    visual, language, head = OLDER[layout]
    expected = load(folder).state_dict()

    def older(name: str) -> str:
        for now, then in (("model.visual.", visual), ("model.language_model.", language)):
            if name.startswith(now):
                return then + name.removeprefix(now)
        return head + name if name.startswith("lm_head") else name

    state = {older(name): tensor for name, tensor in files.read(folder).items()}
    files.write(folder, state)
    files.assert_same(load(folder).state_dict(), expected)
    name = f"{visual}patch_embed.proj.weight"
    for wrong in (state[name].flatten(1), state[name][:1]):
        files.write(folder, {**state, name: wrong.contiguous()})
        with pytest.raises(CheckpointError, match=f"'{name}'"):
            load(folder)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("visual.merger.ln_q.weight", "model.visual.merger.ln_q.weight"),
        ("model.norm.weight", "model.language_model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
    ],
)
def test_two_layouts_in_one_file_are_refused(folder: Path, name: str, source: str) -> None:
    state = files.read(folder)
    files.write(folder, {**state, name: state[source] + 1})
    with pytest.raises(CheckpointError, match="expected one prefix"):
        load(folder)


def test_a_missing_tower_is_named(folder: Path) -> None:
    state = files.read(folder)
    files.write(folder, {n: t for n, t in state.items() if "visual" not in n})
    with pytest.raises(CheckpointError, match=r"model\.visual\."):
        load(folder)
    values = json.loads((folder / "config.json").read_text())
    del values["vision_config"]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="vision_config: expected the vision tower"):
        load(folder)


def test_only_the_outer_tie_counts(tmp_path: Path) -> None:
    theirs = tiny_vision.build({"tie_word_embeddings": True})
    tiny_models.save(theirs, tmp_path)
    state = files.read(tmp_path)
    assert "lm_head.weight" not in state
    model = load(tmp_path)
    assert model.lm_head.weight is model.text.embed_tokens.weight
    model.save_pretrained(tmp_path / "saved")
    files.assert_same(files.read(tmp_path / "saved"), state)
    ids = torch.tensor([[20, 21, 22]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits)


def test_random_weights_from_a_config(folder: Path) -> None:
    model = exafuse.from_config(folder / "config.json", dtype="float32", device="cpu", seed=1)
    assert isinstance(model, Exaone4_5)
    assert model.mtp is not None  # the config says so
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert float(model.model.visual.patch_embed.proj.weight.detach().std()) == pytest.approx(
        0.02, rel=0.1
    )
    prompt = tiny_vision.make_prompt(
        tiny_vision.build().config, [[1, 4, 4]], [], torch.Generator().manual_seed(0)
    )
    assert bool(model(prompt.ids, **prompt.vision).logits.isfinite().all())
    model.save_pretrained(folder / "random")
    again = load(folder / "random")
    assert again.config == model.config
    files.assert_same(again.state_dict(), model.state_dict())
