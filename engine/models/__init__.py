"""One file per model family. A family is whitelisted by being here: an unknown architecture is never guessed at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.errors import LoadError
from engine.files.gguf import Gguf
from engine.files.safetensors import Folder
from engine.models import bert, gemma3, llama, mistral, mixtral, phi3, qwen2, qwen3, qwen3moe
from engine.models.decoder import DecoderConfig
from engine.models.encoder import EncoderConfig


@dataclass(frozen=True)
class Family:
    """How a family is recognised and read. The name is the catalogue's."""

    architecture: str  # `general.architecture` of a GGUF file
    model_type: str  # of a folder's config.json
    from_gguf: Callable[[Gguf, int], DecoderConfig | EncoderConfig]
    from_folder: Callable[[Folder, int], DecoderConfig | EncoderConfig]
    spelled: Callable[[str], str]  # a tensor's name in a folder


FAMILIES = {
    module.__name__.rpartition(".")[2]: Family(
        module.ARCHITECTURE, module.MODEL_TYPE, module.from_gguf, module.from_folder, module.spelled
    )
    for module in (llama, mistral, mixtral, qwen2, qwen3, qwen3moe, gemma3, phi3, bert)
}


def check_family(checkpoint: Gguf | Folder, family: str) -> Family:
    """Raises LoadError `unsupported_architecture` unless files and catalogue agree on a known family."""
    if isinstance(checkpoint, Gguf):
        found = checkpoint.text("general.architecture")
        known = {name for name, each in FAMILIES.items() if each.architecture == found}
    else:
        found = str(checkpoint.config.get("model_type"))[:40]
        known = {name for name, each in FAMILIES.items() if each.model_type == found}
    if not known or family not in FAMILIES:
        raise LoadError(
            "unsupported_architecture",
            f"{checkpoint.path} is of architecture {found!r} (catalogue: {family!r}); "
            f"usable are: {', '.join(FAMILIES)}",
        )
    if family not in known:
        raise LoadError(
            "bad_model_file", f"{checkpoint.path} is a {found!r} model and the catalogue says {family!r}"
        )
    return FAMILIES[family]


def read_config(checkpoint: Gguf | Folder, family: Family, context: int) -> DecoderConfig | EncoderConfig:
    """The model's shape for slots of `context` tokens. Raises LoadError."""
    if isinstance(checkpoint, Gguf):
        return family.from_gguf(checkpoint, context)
    return family.from_folder(checkpoint, context)
