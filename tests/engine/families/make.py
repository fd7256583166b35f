"""Makes the fixtures beside it: tiny random models of every family, and what `transformers` computes with them.

Not run by the tests, which only read what it wrote: torch from a plain index is gigabytes of CUDA. Run again with

    pip install torch==2.13.0 transformers==5.23.0 sentencepiece==0.2.3 protobuf==7.36.2 gguf==0.19.0
    python tests/engine/families/make.py LLAMA_CPP [FAMILY...]

where LLAMA_CPP is a checkout of llama.cpp (the one of llama-cpp-python 0.3.36 was used), whose own converter writes the
GGUF files. Everything is drawn from SEED; the same versions give the same files.

A folder per family: config.json, model*.safetensors (bfloat16), tokenizer.json, tokenizer_config.json as Hugging Face
has them, model.gguf (Q8_0), expected.npz and expected.json. Every weight is an integer times a power of two, with a 127
in every 32, so that bfloat16, float16 and Q8_0 all hold it exactly and one reference serves both formats.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SEED = 20261122
HERE = Path(__file__).resolve().parent
CORPUS = (HERE / "corpus.txt").read_text()
PROMPT_LENGTHS = (45, 9, 21)
UNPADDED = ("llama3", "qwen3")
LONG_LENGTHS = (70, 66, 81)  # of "phi3-long"
STEPS = 8
INNER = (0, 7, 20, 33)  # positions of the first prompt whose logits are kept too
MARGIN = 0.02  # of the best logit over the second: greedy tokens are then no matter of rounding
BLOCK = 32  # Q8_0's

BASE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0, 1.05, 1.1, 1.2],
    "long_factor": [1.0, 1.5, 4.0, 9.0],
}
PHI3_LONG = {"sliding_window": None, "rope_parameters": LONG_ROPE, "original_max_position_embeddings": 64}
# name -> (configuration class, tokenizer, what differs from BASE)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "spm", {"head_dim": 16}),
    "llama3": (
        "LlamaConfig",
        "bpe-llama3",
        {"head_dim": 16, "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    ),
    "mistral": ("MistralConfig", "spm", {"head_dim": 16, "sliding_window": None}),
    "mistral-window": ("MistralConfig", "spm", {"head_dim": 16, "sliding_window": 8}),
    "mixtral": (
        "MixtralConfig",
        "spm",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
    ),
    "qwen2": ("Qwen2Config", "bpe-qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "bpe-qwen2", {"head_dim": 16}),
    "qwen3moe": (
        "Qwen3MoeConfig",
        "bpe-qwen2",
        {
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "spm-gemma",
        {
            "head_dim": 16,
            "num_hidden_layers": 7,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 32,
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": ("Phi3Config", "spm", {"sliding_window": 12, "original_max_position_embeddings": 256}),
    # as Phi-4 mini: half of each head is turned
    "phi4": (
        "Phi3Config",
        "spm",
        {
            "sliding_window": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "original_max_position_embeddings": 256,
            "tie_word_embeddings": True,
        },
    ),
    # more tokens than the original context, for which long_factor is made, and fewer
    "phi3-long": ("Phi3Config", "spm", PHI3_LONG),
    "phi3-short": ("Phi3Config", "spm", PHI3_LONG),
}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GEMMA_CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\\n' + message['content'] "
    "| trim + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
PRE = {"bpe-qwen2": "qwen2", "bpe-llama3": "llama-bpe"}  # llama.cpp's names


def byte_level(folder: Path, kind: str) -> None:
    """A byte-level BPE tokenizer as Qwen's and Llama 3's are, trained on the corpus."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "bpe-llama3"))
    pattern = QWEN2_PATTERN if kind == "bpe-qwen2" else LLAMA3_PATTERN
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    if kind == "bpe-llama3":
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{specials[0]} $A", special_tokens=[(specials[0], tokenizer.token_to_id(specials[0]))]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|endoftext|>", chat_template=CHATML
    )
    fast.save_pretrained(folder)
    inline_template(folder, CHATML)


def sentence_piece(folder: Path, kind: str) -> None:
    """A SentencePiece BPE tokenizer with byte fallback, as Llama 2's (or, without the space in front, Gemma's)."""
    gemma = kind == "spm-gemma"
    lines = folder / "lines.txt"
    lines.write_text(CORPUS)
    controls = ["<start_of_turn>", "<end_of_turn>"] if gemma else ["<|im_start|>", "<|im_end|>"]
    sentencepiece.SentencePieceTrainer.train(
        input=str(lines),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=352,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        split_digits=True,
        add_dummy_prefix=not gemma,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        control_symbols=controls,
        minloglevel=2,
        **({"bos_piece": "<bos>", "eos_piece": "<eos>"} if gemma else {}),
    )
    lines.unlink()
    (folder / "tokenizer.vocab").unlink()
    kind_of = transformers.GemmaTokenizer if gemma else transformers.LlamaTokenizer
    fast = kind_of.from_pretrained(folder, add_bos_token=True)
    fast.add_special_tokens({"additional_special_tokens": controls})
    fast.save_pretrained(folder)
    inline_template(folder, GEMMA_CHAT if gemma else CHATML)


def original_of(folder: Path) -> Any:
    """SentencePiece's own tokenizer, where the family has one."""
    path = folder / "tokenizer.model"
    return sentencepiece.SentencePieceProcessor(model_file=str(path)) if path.exists() else None


def inline_template(folder: Path, template: str) -> None:
    """The template where published models have it."""
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    for key in ("vocab_file", "is_local", "local_files_only"):
        settings.pop(key, None)
    path.write_text(json.dumps(settings | {"chat_template": template}, indent=1))


def exact(tensor: torch.Tensor, random: np.random.Generator, scale: float) -> torch.Tensor:
    """Integers times a power of two, with a 127 or -127 in each block."""
    rows = random.standard_normal((tensor.numel() // BLOCK, BLOCK))
    whole = np.round(rows / np.abs(rows).max(-1, keepdims=True) * 127)
    return torch.from_numpy(
        (whole * 2.0 ** np.round(np.log2(scale / 127 * 2.4))).reshape(tensor.shape)
    ).float()


def fill(model: torch.nn.Module, random: np.random.Generator) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                wide = 0.3 * random.standard_normal(parameter.shape)
                centre = 1.0 if "norm" in name and "gemma" not in type(model).__name__.lower() else 0.0
                parameter.copy_(torch.from_numpy(centre + wide).bfloat16().float())
            else:
                parameter.copy_(
                    exact(parameter, random, 1.0 if "embed" in name else 2.0 * parameter.shape[-1] ** -0.5)
                )
        model.tie_weights()


def reference(
    model: Any, vocabulary: int, lengths: tuple[int, ...], random: np.random.Generator
) -> dict[str, np.ndarray] | None:
    """Prompts, greedy tokens and logits; None when a greedy token was nearly another one."""
    kept: dict[str, np.ndarray] = {}
    for index, length in enumerate(lengths):
        tokens = random.integers(3, vocabulary - 8, length).tolist()
        kept[f"prompt{index}"] = np.array(tokens, dtype=np.int32)
        rows = []
        for step in range(STEPS + 1):
            with torch.no_grad():
                logits = model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()
            if step == 0 and index == 0:
                kept["inner"] = logits[list(INNER)]
            best = np.sort(logits[-1])
            if best[-1] - best[-2] < MARGIN:
                return None
            rows.append(logits[-1])
            tokens.append(int(logits[-1].argmax()))
        kept[f"greedy{index}"] = np.array(tokens[length:-1], dtype=np.int32)
        kept[f"logits{index}"] = np.stack(rows)
    return kept


def make(name: str, llama_cpp: Path) -> None:
    kind, tokenizer, changes = FAMILIES[name]
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (byte_level if tokenizer.startswith("bpe") else sentence_piece)(folder, tokenizer)
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    # published matrices often have rows beyond the last token
    vocabulary = len(loaded) if name in UNPADDED else -(-len(loaded) // BLOCK) * BLOCK
    settings = BASE | changes | {"vocab_size": vocabulary, "bos_token_id": loaded.bos_token_id}
    settings |= {"eos_token_id": loaded.eos_token_id, "pad_token_id": None}
    config = getattr(transformers, kind)(**settings)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    random = np.random.default_rng([SEED, *name.encode()])
    kept = None
    while kept is None:
        fill(model, random)
        kept = reference(model, len(loaded), LONG_LENGTHS if name == "phi3-long" else PROMPT_LENGTHS, random)
    np.savez_compressed(folder / "expected.npz", **kept)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="40KB" if name == "qwen3" else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    convert(folder, PRE.get(tokenizer, ""), llama_cpp)
    texts = (HERE / "nasty.json").read_text()
    ids = [loaded.encode(text, add_special_tokens=True) for text in json.loads(texts)]
    chat = loaded.apply_chat_template(
        [{"role": "user", "content": "Hi there"}], tokenize=False, add_generation_prompt=True
    )
    # transformers puts no space before a text that begins with one; SentencePiece and llama.cpp do
    original = (
        [[1, *pieces.encode(text)] for text in json.loads(texts)] if (pieces := original_of(folder)) else ids
    )
    versions = {package.__name__: package.__version__ for package in (torch, transformers, sentencepiece, np)}
    (folder / "expected.json").write_text(
        json.dumps({"ids": ids, "gguf_ids": original, "chat": chat, "versions": versions})
    )
    for extra in ("tokenizer.model", "special_tokens_map.json"):
        (folder / extra).unlink(missing_ok=True)
    print(
        name, sum(parameter.numel() for parameter in model.parameters()), len(loaded), kept["logits0"].std()
    )


def convert(folder: Path, pre: str, llama_cpp: Path) -> None:
    """llama.cpp's own converter; only the check that the tokenizer is a published one is answered for it."""
    code = (
        f"import sys; sys.path[:0] = [{str(llama_cpp)!r}, {str(llama_cpp / 'gguf-py')!r}]\n"
        "import runpy\nfrom conversion import base\n"
        f"base.TextModel.get_vocab_base_pre = lambda self, tokenizer: {pre!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    arguments = ["x", str(folder), "--outtype", "q8_0", "--outfile", str(folder / "model.gguf")]
    script = str(llama_cpp / "convert_hf_to_gguf.py")
    code = code.replace("import runpy", f"sys.argv = {[script, *arguments[1:]]!r}\nimport runpy")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])


if __name__ == "__main__":
    for family in sys.argv[2:] or FAMILIES:
        make(family, Path(sys.argv[1]).resolve())
