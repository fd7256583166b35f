"""A model's files on this host, whichever format they have: headers and tokenizer."""

from __future__ import annotations

from pathlib import Path

from engine.files import gguf, safetensors
from engine.files.gguf import Gguf
from engine.files.safetensors import Folder
from engine.text import folder_tokenizer, tokenizer
from engine.text.tokenizer import Vocabulary


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
