"""A model's files on this host, whichever format they have: headers and tokenizer."""

from __future__ import annotations

from pathlib import Path

from engine import folder_tokenizer, gguf, safetensors, tokenizer
from engine.gguf import Gguf
from engine.safetensors import Folder
from engine.tokenizer import Vocabulary


def open_checkpoint(path: str | Path) -> Gguf | Folder:
    """A GGUF file's header, or a Hugging Face folder's. Raises LoadError."""
    path = Path(path)
    return safetensors.read(path) if path.is_dir() else gguf.read(path)


def vocabulary_of(checkpoint: Gguf | Folder) -> Vocabulary:
    """The tokenizer. Raises LoadError `unsupported_tokenizer` or `bad_model_file`."""
    if isinstance(checkpoint, Gguf):
        return tokenizer.from_gguf(checkpoint)
    return folder_tokenizer.from_folder(checkpoint)


def tokenizer_file(path: str) -> Path:
    """The file that changes when the tokenizer may have."""
    return Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
