"""exafuse.patch: transformers models on our kernels, against themselves unpatched."""

from __future__ import annotations

import copy
import logging
import pickle
import sys
from pathlib import Path
from typing import Any

import drop_in_cases
import exafuse
import pytest
import tiny_models
import torch
import transformers
from exafuse.integrations import transformers as integration
from torch import Tensor, nn

FAMILIES = list(drop_in_cases.FAMILIES)
VISION = {
    "depth": 4,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 56,
    "out_hidden_size": 64,
    "fullatt_block_indexes": [1, 3],
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> transformers.PreTrainedModel:
    return drop_in_cases.build(request.param)


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    integration._said.clear()


@pytest.fixture(scope="module")
def vision_model() -> transformers.PreTrainedModel:
    from transformers.models.exaone4_5 import Exaone4_5_Config, Exaone4_5_ForConditionalGeneration

    text = {
        **tiny_models.BASE,
        "num_hidden_layers": 4,
        "sliding_window": 5,
        "model_type": "exaone4_5_text",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = Exaone4_5_Config(
        text_config=text,
        vision_config=VISION,
        image_token_id=7,
        video_token_id=8,
        tie_word_embeddings=False,
    )
    torch.manual_seed(4)
    model = Exaone4_5_ForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        start = 1.0 if "norm" in name or "ln_q" in name else 0.0
        parameter.data = start + 0.15 * torch.randn_like(parameter)
    return model


def pictures(model: Any) -> dict[str, Tensor]:
    """Two images of odd grids and a clip, with their placeholders."""
    grids, clip = torch.tensor([[1, 6, 10], [1, 4, 2]]), torch.tensor([[2, 4, 6]])
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(9, 97, (1, 45), generator=generator)
    ids[0, 2:17], ids[0, 20:22], ids[0, 25:37] = 7, 7, 8

    def pixels(grid: Tensor) -> Tensor:
        return torch.randn(int(grid.prod(1).sum()), 1176, generator=generator)

    return {
        "input_ids": ids,
        "pixel_values": pixels(grids),
        "image_grid_thw": grids,
        "pixel_values_videos": pixels(clip),
        "video_grid_thw": clip,
    }


def plain_and_patched(model: Any, call: Any, **options: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        plain = call(model)
        with exafuse.patched(model, **options):
            return plain, call(model)


@pytest.mark.parametrize("name", list(drop_in_cases.FORWARDS))
def test_logits_equal_those_of_the_model(model: Any, name: str) -> None:
    plain, ours = plain_and_patched(model, drop_in_cases.FORWARDS[name])
    drop_in_cases.close(ours, plain)


@pytest.mark.parametrize("name", list(drop_in_cases.GENERATIONS))
def test_greedy_tokens_equal_those_of_the_model(model: Any, name: str) -> None:
    plain, ours = plain_and_patched(model, drop_in_cases.GENERATIONS[name])
    assert torch.equal(ours, plain)


def test_unpatch_gives_the_original_back(model: Any) -> None:
    with torch.no_grad():
        before = drop_in_cases.logits(model)
        state, name = dict(model.state_dict()), model.config._attn_implementation
        assert exafuse.patch(model) is model
        assert model.config._attn_implementation == "exafuse"
        assert model.state_dict().keys() == state.keys()
        assert not torch.equal(drop_in_cases.logits(model), before), "nothing was replaced"
        assert exafuse.unpatch(model) is model
        assert torch.equal(drop_in_cases.logits(model), before)
    assert model.config._attn_implementation == name
    assert not [m for m in model.modules() if "forward" in vars(m)]


def test_every_layer_is_replaced(model: Any) -> None:
    """No norm, activation or attention of transformers is left in the layers."""
    with exafuse.patched(model):
        for module in model.modules():
            kind = type(module).__name__
            if kind.endswith(("RMSNorm", "MLP", "Attention", "DecoderLayer", "RotaryEmbedding")):
                assert "forward" in vars(module), kind


def test_a_second_patch_and_a_stray_unpatch_are_refused(model: Any) -> None:
    with exafuse.patched(model), pytest.raises(ValueError, match="patched already"):
        exafuse.patch(model)
    with pytest.raises(ValueError, match=r"exafuse\.patch"):
        exafuse.unpatch(model)


def test_a_model_that_we_do_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Llama, Qwen2, EXAONE.*got Linear"):
        exafuse.patch(nn.Linear(2, 2))


def test_an_error_inside_the_block_still_unpatches(model: Any) -> None:
    with pytest.raises(KeyError), exafuse.patched(model):
        raise KeyError
    assert not [m for m in model.modules() if "forward" in vars(m)]


def test_two_models_of_a_class_do_not_share_a_patch(model: Any) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad(), exafuse.patched(model):
        plain = drop_in_cases.logits(other)
        twin = copy.deepcopy(model)  # a copy of a patched model is a patched model of its own
        assert torch.equal(drop_in_cases.logits(twin), drop_in_cases.logits(model))
        exafuse.unpatch(twin)
        assert torch.equal(drop_in_cases.logits(twin), plain)
        assert not torch.equal(drop_in_cases.logits(model), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patched_model_is_not_pickled(family: str) -> None:
    """pickle would keep the marks of a patch and lose the forwards."""
    # A model of its own: one that was asked for hidden states keeps transformers' hooks, which
    # pickle takes from nobody.
    model = drop_in_cases.build(family)
    with exafuse.patched(model), pytest.raises(pickle.PicklingError, match=r"exafuse\.unpatch"):
        pickle.dumps(model)
    assert torch.equal(
        drop_in_cases.logits(pickle.loads(pickle.dumps(model))), drop_in_cases.logits(model)
    )


def test_our_own_graph_needs_no_patch() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    own = exafuse.from_config({"model_type": "llama", **sizes}, dtype="float32", device="cpu")
    with pytest.raises(ValueError, match="exafuse's own CausalLM, which runs on the kernels"):
        exafuse.patch(own)


def test_saved_files_are_those_of_the_model(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "plain")
    with exafuse.patched(model):
        model.save_pretrained(tmp_path / "patched")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / file).read_bytes() == (
            tmp_path / "patched" / file
        ).read_bytes()


def test_another_attention_chosen_later_is_respected(model: Any) -> None:
    with torch.no_grad():
        expected = model.eval()(drop_in_cases.prompts(model))
        with exafuse.patched(model):
            model.set_attn_implementation("eager")
            out = model(drop_in_cases.prompts(model), output_attentions=True)
    assert len(out.attentions) == model.config.num_hidden_layers
    drop_in_cases.close(out.logits, expected.logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_the_model(model: Any, checkpointing: bool) -> None:
    ids, gradients = drop_in_cases.prompts(model), []
    twin = copy.deepcopy(model).train()
    if checkpointing:
        enable = "activation_checkpointing_enable"  # its name since transformers 6
        getattr(twin, enable, twin.gradient_checkpointing_enable)()
    for patch in (False, True):
        twin.zero_grad()
        if patch:
            exafuse.patch(twin)
        twin(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in twin.parameters()])
    for plain, ours in zip(*gradients, strict=True):
        assert float((ours - plain).norm()) <= 2e-5 * float(plain.norm()) + 1e-9


@pytest.mark.slow
def test_training_follows_the_same_loss(model: Any) -> None:
    """20 steps of Adam from the same start."""
    losses = []
    for patch in (False, True):
        twin = copy.deepcopy(model).train()
        if patch:
            exafuse.patch(twin)
        optimizer = torch.optim.Adam(twin.parameters(), lr=2e-3)
        curve = []
        for step in range(20):
            ids = drop_in_cases.prompts(twin, length=12 + step % 3)
            loss = twin(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(float(loss.detach()))
        losses.append(curve)
    plain, ours = losses
    assert plain[-1] < plain[0] - 0.1
    assert max(abs(a - b) for a, b in zip(plain, ours, strict=True)) <= 1e-3


def test_offloaded_layers_keep_their_hooks(model: Any) -> None:
    """Every weight on the disk side of accelerate: norms cannot be fused by their weight."""
    from accelerate import cpu_offload

    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = drop_in_cases.left_padded(twin)
        cpu_offload(twin, execution_device=torch.device("cpu"))
        assert all(p.is_meta for p in twin.parameters())
        with exafuse.patched(twin):
            drop_in_cases.close(drop_in_cases.left_padded(twin), expected)
        assert torch.equal(drop_in_cases.left_padded(twin), expected)


def test_hooks_on_norms_are_heard(model: Any) -> None:
    twin, heard = copy.deepcopy(model), []
    norms = [m for n, m in twin.named_modules() if type(m).__name__.endswith("RMSNorm")]
    for norm in norms:
        norm.register_forward_hook(lambda *_: heard.append(1))
    with torch.no_grad(), exafuse.patched(twin):
        drop_in_cases.close(drop_in_cases.logits(twin), drop_in_cases.logits(model))
    assert len(heard) == len(norms)


def test_backward_hooks_on_norms_are_heard(model: Any) -> None:
    """Of tensor parallelism, or a look at gradients."""
    twin, heard = copy.deepcopy(model), []
    norms = [m for n, m in twin.named_modules() if type(m).__name__.endswith("RMSNorm")]
    for norm in norms:
        norm.register_full_backward_hook(lambda *_: heard.append(1))
    ids = drop_in_cases.prompts(twin)
    with exafuse.patched(twin):
        twin(ids, labels=ids, use_cache=False).loss.backward()
    assert len(heard) == len(norms)


def test_replaced_linear_layers_are_called(model: Any) -> None:
    """Adapters and quantised layers stand where the projections stood."""

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    twin = copy.deepcopy(model)
    layer = twin.model.layers[0]
    for owner, name in ((layer.self_attn, "q_proj"), (layer.mlp, "up_proj")):
        setattr(owner, name, Doubled(getattr(owner, name)))
    plain, ours = plain_and_patched(twin, drop_in_cases.logits)
    drop_in_cases.close(ours, plain)
    with torch.no_grad():
        assert not torch.allclose(plain, drop_in_cases.logits(model))


def test_the_vision_language_model(vision_model: Any) -> None:
    inputs = pictures(vision_model)
    plain, ours = plain_and_patched(vision_model, lambda m: m(**inputs).logits)
    drop_in_cases.close(ours, plain)
    plain, ours = plain_and_patched(
        vision_model, lambda m: m.generate(**inputs, max_new_tokens=12, do_sample=False)
    )
    assert torch.equal(ours, plain)


def test_the_tower_calls_attention_once_a_layer(
    vision_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exafuse import ops

    calls = []
    original = ops.vision_attn

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args[6])  # max_seqlen
        return original(*args, **kwargs)

    monkeypatch.setattr(ops, "vision_attn", counted)
    with torch.no_grad(), exafuse.patched(vision_model):
        vision_model(**pictures(vision_model))
    # Windows of 56 / 14 = 4 x 4 patches; the largest frame has 6 x 10. Images, then the clip.
    if hasattr(sys.modules[type(vision_model).__module__], "get_max_seqlen"):
        assert calls == [16, 60, 16, 60, 16, 24, 16, 24]
    else:  # older transformers tells no layer which of the two it has
        assert calls == [60, 60, 60, 60, 24, 24, 24, 24]


@pytest.mark.emulated
@pytest.mark.emulated
@pytest.mark.slow
def test_half_precision_runs_on_the_kernels(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    """On the emulator in bf16: as near to fp32 as the plain model in bf16."""
    from kernel_backends import _emulated

    _emulated()  # builds it
    half = copy.deepcopy(model).bfloat16()
    for name in ("left_padded", "chunked"):
        call = drop_in_cases.FORWARDS[name]
        with torch.no_grad(), caplog.at_level(logging.WARNING, "exafuse"):
            exact = call(model)
            plain, ours = plain_and_patched(half, call, backend="emulated")
        mine, theirs = (float((x.float() - exact).norm() / exact.norm()) for x in (ours, plain))
        assert mine <= 1.25 * theirs, f"{name}: error {mine:.3e}, transformers {theirs:.3e}"
    assert "SDPA" not in caplog.text


@pytest.mark.parametrize("grad", [True, False])
def test_autocast_rounds_as_little_as_the_model(model: Any, grad: bool) -> None:
    """Linear layers give bf16 beside fp32 residuals and norm weights."""
    ids = drop_in_cases.prompts(model)
    exact = model(ids).logits.detach()

    def call(model: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(grad):
            return model(ids).logits.detach().float()

    plain, ours = plain_and_patched(model, call)
    mine, theirs = (float((x - exact).norm() / exact.norm()) for x in (ours, plain))
    assert mine <= 1.5 * theirs, (mine, theirs)


@pytest.mark.slow
def test_a_patched_model_compiles_whole(model: Any) -> None:
    def call(model: Any) -> Tensor:
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        return compiled(drop_in_cases.prompts(model), use_cache=False).logits

    plain, ours = plain_and_patched(model, call)
    drop_in_cases.close(ours, plain)


def test_another_activation_stays_transformers_own(caplog: pytest.LogCaptureFixture) -> None:
    model = drop_in_cases.build("llama", hidden_act="gelu")
    with caplog.at_level(logging.WARNING, "exafuse"):
        plain, ours = plain_and_patched(model, drop_in_cases.logits)
    drop_in_cases.close(ours, plain)
    assert "its activation is GELUActivation" in caplog.text


def test_a_norm_hooked_after_the_patch_is_restored_in_its_hook(model: Any) -> None:
    """accelerate's hooks wrap the forward that they find; unpatch gives them the plain one."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = drop_in_cases.logits(twin)
        exafuse.patch(twin)
        cpu_offload(twin, execution_device=torch.device("cpu"))
        drop_in_cases.close(drop_in_cases.logits(twin), expected)
        exafuse.unpatch(twin)
        assert torch.equal(drop_in_cases.logits(twin), expected)
        remove_hook_from_submodules(twin)
        assert not [m for m in twin.modules() if type(vars(m).get("forward")).__name__ == "partial"]
