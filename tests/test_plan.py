"""The layer plan that `exafuse plan` prints, for the released configurations and made-up ones."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest
from exafuse.cli.commands import main
from exafuse.cli.plan import attention_picture, draw, format_bytes, plan
from exafuse.config import load_config
from exafuse.errors import CheckpointError, ConfigError

CONFIGS = Path(__file__).parent / "data" / "configs"
GIB = 2**30

# name: layers, layers with a window, norm, distinct kinds, parameters in 1e9 to three digits.
RELEASED = {
    "exaone-4.0-1.2b": (30, 0, "post", 1, 1.28),
    "exaone-4.0-32b": (64, 48, "post", 2, 32.0),
    "exaone-4.5-33b": (64, 48, "post", 2, 34.4),
    "llama-2-7b": (32, 0, "pre", 1, 6.74),
    "llama-3-8b": (32, 0, "pre", 1, 8.03),
    "llama-3.1-8b": (32, 0, "pre", 1, 8.03),
    "llama-3.2-1b": (16, 0, "pre", 1, 1.24),
    "llama-3.2-3b": (28, 0, "pre", 1, 3.21),
    "qwen2-0.5b": (24, 0, "pre", 1, 0.494),
    "qwen2-1.5b": (28, 0, "pre", 1, 1.54),
    "qwen2-7b": (28, 0, "pre", 1, 7.62),
    "qwen2-72b": (80, 0, "pre", 1, 72.7),
}


@pytest.fixture(autouse=True)
def _published_files_have_keys_nobody_reads():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def test_every_released_config_is_listed():
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(RELEASED)


@pytest.mark.parametrize("name", RELEASED)
def test_released_model(name):
    num_layers, with_window, norm, kinds, billions = RELEASED[name]
    result = plan(CONFIGS / f"{name}.json")
    assert len(result.layers) == num_layers
    assert sum(layer.window is not None for layer in result.layers) == with_window
    assert {layer.norm for layer in result.layers} == {norm}
    assert len(result.kinds()) == kinds
    assert float(f"{result.config.num_parameters() / 1e9:.3g}") == billions
    # In a model with windows the global layers have no position, everywhere else all have.
    assert all(
        layer.rope == (with_window == 0 or layer.window is not None) for layer in result.layers
    )


def test_hybrid_model_in_full():
    result = plan(CONFIGS / "exaone-4.0-32b.json", context=131072, dtype="bfloat16")
    runs = [
        (first, last, layer.window, layer.rope, layer.cache_slots)
        for first, last, layer in result.groups()
    ]
    expected = []
    for block in range(0, 64, 4):
        expected += [
            (block, block + 2, 4096, True, 6144),
            (block + 3, block + 3, None, False, 131072),
        ]
    assert runs == expected
    # k and v, 8 heads of 128, 2 bytes each.
    assert result.layers[0].cache_bytes == 2 * 8 * 128 * 2 * 6144
    assert result.cache_bytes == 4096 * (48 * 6144 + 16 * 131072)
    assert result.full_cache_bytes == 4096 * 64 * 131072
    text = str(result)
    assert "9.1 GiB (32.0 GiB if every layer kept all tokens)" in text
    assert "60-62   last 4,096  RoPE      post  6,144" in text
    assert "63      all before  NoPE      post  131,072" in text
    assert "llama3 x16, theta 1,000,000" in text


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("context", [1, 128, 5000, 100_000])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_layers_add_up_to_the_models_own_figure(batch_size, context, dtype):
    config = load_config(CONFIGS / "exaone-4.0-32b.json")
    result = plan(config, context, batch_size, dtype)
    size = {"float32": 4, "float16": 2}[dtype]
    assert result.cache_bytes == config.cache_bytes(batch_size, context, size)
    assert result.weight_bytes == config.num_parameters() * size


def test_cache_of_a_real_model_has_the_planned_size():
    from exafuse import from_config

    values = {
        "model_type": "exaone4",
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 100,
        "sliding_window_pattern": "LLLG",
        "max_position_embeddings": 8192,
    }
    model = from_config(values, dtype="bfloat16", device="cpu")
    cache = model.new_cache(2, max_length=5000)
    result = plan(values, context=5000, batch_size=2, dtype="bfloat16")
    assert result.cache_bytes == cache.nbytes
    slots = [layer.k.shape[1] for layer in cache.layers]
    assert [layer.cache_slots for layer in result.layers] == slots


@pytest.mark.parametrize(
    ("window", "context", "expected"),
    [
        (None, 3, [[1, 0, 0], [1, 1, 0], [1, 1, 1]]),
        (2, 4, [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]),
        (1, 2, [[1, 0], [0, 1]]),
        (9, 2, [[1, 0], [1, 1]]),
    ],
)
def test_picture_is_exact_for_few_tokens(window, context, expected):
    assert attention_picture(window, context) == expected


def test_picture_scales():
    picture = attention_picture(4096, 131072, cells=64)
    assert len(picture) == 64
    assert {sum(row) for row in picture[1:]} == {2}  # 4096 of 131072 is 2 of 64
    assert [sum(row) for row in attention_picture(1, 10**6, cells=10)] == [1] * 10


def test_png(tmp_path):
    file = tmp_path / "plan.png"
    draw(plan(CONFIGS / "exaone-4.0-32b.json"), file)
    from matplotlib.image import imread

    image = imread(file)
    colours = {tuple(pixel) for pixel in (image[:, :, :3] * 255).round().astype(int).reshape(-1, 3)}
    assert (0x2F, 0x6F, 0xA7) in colours  # one colour per kind of layer
    assert (0xD9, 0x82, 0x2B) in colours


def test_png_without_matplotlib(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    argv = ["plan", str(CONFIGS / "llama-2-7b.json"), "--png", str(tmp_path / "x.png")]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert 'pip install "exafuse[bench]"' in error


def test_json(capsys):
    argv = ["plan", str(CONFIGS / "exaone-4.5-33b.json"), "--context", "8192", "--batch", "2"]
    assert main([*argv, "--dtype", "float16", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["model_type"] == "exaone4_5"
    assert (result["context"], result["batch_size"], result["dtype"]) == (8192, 2, "float16")
    assert len(result["layers"]) == result["num_layers"] == 64
    assert result["cache_bytes"] == sum(layer["cache_bytes"] for layer in result["layers"])
    assert (result["vision"]["depth"], result["num_mtp_layers"]) == (28, 1)
    assert result["groups"][1] == {
        "first": 3,
        "last": 3,
        "count": 1,
        "layer": "all tokens, NoPE, post-norm",
    }


def test_a_context_beyond_the_models_is_remarked_on(capsys):
    file = str(CONFIGS / "llama-2-7b.json")  # 4,096 positions
    for context, beyond in ((4096, False), (4097, True)):
        assert main(["plan", file, "--context", str(context)]) == 0
        text = "note: the model reads at most 4,096 tokens; 4,097 are beyond that"
        assert (text in capsys.readouterr().out) is beyond
        assert main(["plan", file, "--context", str(context), "--json"]) == 0
        assert bool(json.loads(capsys.readouterr().out)["notes"]) is beyond
    stretched = json.loads((CONFIGS / "llama-2-7b.json").read_text())
    stretched["rope_scaling"] = {"rope_type": "linear", "factor": 4.0}
    assert plan(stretched, 16384).notes == ()
    assert plan(stretched, 16385).notes


def test_what_a_model_that_sees_has_besides(capsys):
    assert main(["plan", str(CONFIGS / "exaone-4.5-33b.json")]) == 0
    text = capsys.readouterr().out
    assert "vision tower: 28 blocks, hidden 2,048, heads 32/8, windows of 112 pixels" in text
    assert "whole frames in blocks 6, 13, 20, 27" in text
    assert "MTP head: 1 layer" in text
    assert main(["plan", str(CONFIGS / "llama-2-7b.json")]) == 0
    assert "tower" not in capsys.readouterr().out


def test_folder_and_mapping_and_file_agree(tmp_path):
    file = CONFIGS / "qwen2-7b.json"
    (tmp_path / "config.json").write_bytes(file.read_bytes())
    assert plan(file) == plan(tmp_path) == plan(json.loads(file.read_text()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"dtype": "int8"}, "bfloat16"),
    ],
)
def test_bad_sizes(options, words):
    with pytest.raises(ValueError, match=words):
        plan(CONFIGS / "llama-2-7b.json", **options)


def test_missing_and_malformed_files(tmp_path, capsys):
    with pytest.raises(CheckpointError, match="no such folder"):
        plan(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"owner/absent.*Hub"):
        plan("owner/absent")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match="model_type"):
        plan(tmp_path)
    assert main(["plan", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("exafuse: error: ")


def test_planning_does_not_import_torch(tmp_path):
    import subprocess

    code = (
        "import sys; from exafuse.cli.commands import main; main(sys.argv[1:]);"
        " assert 'torch' not in sys.modules, 'torch was imported'"
    )
    argv = [sys.executable, "-c", code, "plan", str(CONFIGS / "llama-2-7b.json")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "32 layers" in done.stdout


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * GIB, "3.0 GiB"), (2**41, "2.00 TiB")],
)
def test_format_bytes(count, text):
    assert format_bytes(count) == text
