"""Trains the demo model: a 5.5 M parameter Qwen2 decoder on Python's own library and documentation.

    python runtime/demo_model/train.py corpus    # sources -> build/demo_model/*.npz (three splits), tokenizer
    python runtime/demo_model/train.py train     # -> build/demo_model/best.pt (GPU: minutes; 2 cores: --minutes 45)
    python runtime/demo_model/train.py export    # -> model.safetensors (bfloat16), config, tokenizer, beside this file
    python runtime/demo_model/train.py evaluate  # held-out bits per byte of the shipped files, and of a token 5-gram

The corpus is the standard library of the running interpreter and the reStructuredText of Debian's
`python3-doc` (both under the PSF licence). Files are split by a hash of their path; the held-out
part chooses nothing, the validation part chooses the checkpoint.
"""

import argparse
import ast
import hashlib
import json
import math
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
VOCAB_SIZE = 4096
CONTEXT_TOKENS = 2048
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
SPECIAL_TOKENS = [BOS, EOS, USER, ASSISTANT]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<｜Assistant｜>' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
# Tables of characters and a copy of the documentation: long, repetitive, and a leak between the splits.
SKIPPED_PARTS = {"site-packages", "encodings", "pydoc_data", "idlelib", "__pycache__", "lib2to3", "ensurepip"}
MAX_TEST_FILE_BYTES = 60_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=["corpus", "train", "export", "evaluate"])
    parser.add_argument(
        "--build", type=Path, default=Path("build/demo_model"), help="folder of the intermediate files"
    )
    parser.add_argument("--docs", type=Path, default=Path("/usr/share/doc/python3.11/html/_sources"))
    parser.add_argument("--minutes", type=float, default=45.0, help="training time")
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    {"corpus": make_corpus, "train": train, "export": export, "evaluate": evaluate}[args.step](args)


# --- corpus ---------------------------------------------------------------------------------------


def make_corpus(args: argparse.Namespace) -> None:
    """Writes the tokenizer and one `<split>.npz` (tokens: uint16, num_bytes: int) per split."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts: dict[str, list[str]] = {"train": [], "validation": [], "held_out": []}
    for name, text in library_files() + documentation_files(args.docs):
        texts[split_of(name)].append(text)
    chats = [chat for text in texts["train"] for chat in docstring_chats(text)]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts["train"], trainer)
    args.build.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.build / "tokenizer.json"))
    bos = tokenizer.token_to_id(BOS)
    for split, documents in texts.items():
        num_bytes = sum(len(text.encode()) for text in documents)
        tokens: list[int] = []
        for encoding in tokenizer.encode_batch(documents + (chats if split == "train" else [])):
            tokens += [bos, *encoding.ids]
        np.savez(args.build / f"{split}.npz", tokens=np.array(tokens, dtype=np.uint16), num_bytes=num_bytes)
        print(f"{split}: {len(documents)} files, {num_bytes / 1e6:.2f} MB, {len(tokens) / 1e6:.2f} M tokens")
    print(f"chats from docstrings (in train): {len(chats)}")


def library_files() -> list[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(root.rglob("*.py")):
        parts = set(path.relative_to(root).parts)
        if parts & SKIPPED_PARTS:
            continue
        if parts & {"test", "tests"} and path.stat().st_size > MAX_TEST_FILE_BYTES:
            continue
        files.append((f"lib/{path.relative_to(root)}", path.read_text(encoding="utf-8", errors="ignore")))
    return files


def documentation_files(docs: Path) -> list[tuple[str, str]]:
    paths = sorted(docs.rglob("*.rst.txt"))
    if not paths:
        raise SystemExit(
            f"No documentation sources in {docs}. Install Debian's python3.11-doc, or name them with --docs."
        )
    return [(f"doc/{path.relative_to(docs)}", path.read_text(encoding="utf-8")) for path in paths]


def split_of(name: str) -> str:
    bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
    return "held_out" if bucket < 2 else "validation" if bucket < 4 else "train"


def docstring_chats(text: str) -> list[str]:
    """One question and answer for each documented public function and class of a Python source."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    chats = []
    for node in ast.walk(tree):
        if isinstance(
            node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        ) and not node.name.startswith("_"):
            doc = ast.get_docstring(node)
            if doc and len(doc) > 40:
                chats.append(f"{USER}What does `{node.name}` do?{ASSISTANT}{doc}{EOS}")
    return chats


# --- training -------------------------------------------------------------------------------------


def model_config() -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def train(args: argparse.Namespace) -> None:
    """AdamW, learning rate warm-up, constant, then linear decay over the last 40 % of the time budget."""
    import torch
    from transformers import Qwen2ForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    tokens = torch.from_numpy(load_split(args.build, "train")[0].astype(np.int64)).to(device)
    model = Qwen2ForCausalLM(model_config()).to(device)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters on {device}, "
        f"{len(tokens) / 1e6:.1f} M tokens"
    )
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=0.0,
        betas=(0.9, 0.95),
        fused=True,
    )
    peak, length = 3e-3, CONTEXT_TOKENS if device == "cuda" else 512
    rows = max(1, args.batch_tokens // length)
    started = time.monotonic()
    best, step, next_check = math.inf, 0, 0.1
    while True:
        done = (time.monotonic() - started) / (60 * args.minutes)
        rate = peak * min(1.0, (step + 1) / 200) * min(1.0, max(0.0, 1.0 - done) / 0.4)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if done >= next_check or done >= 1.0:
            bits = bits_per_byte(model, *load_split(args.build, "validation"), device)
            print(
                f"step {step}, {step * rows * length / 1e6:.0f} M tokens, {done:.0%}: validation {bits:.4f} bits/byte",
                flush=True,
            )
            if bits < best:
                best = bits
                torch.save(model.state_dict(), args.build / "best.pt")
            next_check += 0.1
        if done >= 1.0:
            return
        starts = rng.integers(0, len(tokens) - length, rows)
        batch = tokens[torch.from_numpy(starts).to(device)[:, None] + torch.arange(length, device=device)]
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            logits = model(input_ids=batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1


def load_split(build: Path, split: str) -> tuple[np.ndarray, int]:
    with np.load(build / f"{split}.npz") as file:
        return file["tokens"], int(file["num_bytes"])


def bits_per_byte(model: Any, tokens: np.ndarray, num_bytes: int, device: str) -> float:
    """Total code length of `tokens` over bytes of text; windows of 2048 overlap by half, each token is scored once."""
    import torch

    stride, total = CONTEXT_TOKENS // 2, 0.0
    ids = torch.from_numpy(tokens.astype(np.int64)).to(device)
    with torch.inference_mode():
        for start in range(0, len(ids) - 1, stride):
            window = ids[start : start + CONTEXT_TOKENS]
            first = 1 if start == 0 else CONTEXT_TOKENS - stride
            if len(window) <= first:
                break
            logits = model(input_ids=window[None], use_cache=False).logits[0].float()
            losses = torch.nn.functional.cross_entropy(
                logits[first - 1 : -1], window[first:], reduction="sum"
            )
            total += float(losses)
    return total / math.log(2) / num_bytes


# --- what ships -----------------------------------------------------------------------------------


def export(args: argparse.Namespace) -> None:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(model_config())
    model.load_state_dict(torch.load(args.build / "best.pt", map_location="cpu", weights_only=True))
    model.to(torch.bfloat16).save_pretrained(HERE)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(args.build / "tokenizer.json"),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(HERE)
    size = sum(path.stat().st_size for path in HERE.iterdir() if path.is_file())
    print(f"{HERE}: {size / 1e6:.2f} MB")


def evaluate(args: argparse.Namespace) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(HERE, dtype=torch.float32)
    tokens, num_bytes = load_split(args.build, "held_out")
    model_bits = bits_per_byte(model, tokens, num_bytes, "cpu")
    ngram_bits = ngram_bits_per_byte(load_split(args.build, "train")[0], tokens, num_bytes)
    print(
        json.dumps(
            {
                "parameters_millions": round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
                "held_out_bytes": num_bytes,
                "held_out_tokens": len(tokens),
                "model_bits_per_byte": round(model_bits, 4),
                "token_5gram_bits_per_byte": round(ngram_bits, 4),
            }
        )
    )


def ngram_bits_per_byte(
    train_tokens: np.ndarray, tokens: np.ndarray, num_bytes: int, order: int = 5
) -> float:
    """Interpolated token n-gram with Witten-Bell smoothing down to the uniform distribution.

    p(w | h) = (count(h w) + types(h) * p(w | shorter h)) / (count(h) + types(h)).
    Source: Witten and Bell, 1991.
    """
    probability = np.full(len(tokens) - order + 1, 1.0 / VOCAB_SIZE)
    for n in range(1, order + 1):
        grams, gram_counts = np.unique(packed(train_tokens, n), return_counts=True)
        contexts, first, types = np.unique(grams >> 12, return_index=True, return_counts=True)
        context_counts = np.add.reduceat(gram_counts, first)
        wanted = packed(tokens, n)[order - n :]
        gram_count = looked_up(grams, gram_counts, wanted)
        context_count = looked_up(contexts, context_counts, wanted >> 12)
        num_types = looked_up(contexts, types, wanted >> 12)
        seen = context_count > 0
        blended = (gram_count + num_types * probability) / np.maximum(context_count + num_types, 1)
        probability = np.where(seen, blended, probability)
    first_tokens = (order - 1) * math.log2(VOCAB_SIZE)
    return (first_tokens - float(np.log2(probability).sum())) / num_bytes


def packed(tokens: np.ndarray, n: int) -> np.ndarray:
    """Every run of n tokens as one int64 (12 bits a token: VOCAB_SIZE is 4096, so five fit into 60 bits)."""
    keys = np.zeros(len(tokens) - n + 1, dtype=np.int64)
    for offset in range(n):
        keys = (keys << 12) | tokens[offset : offset + len(keys)].astype(np.int64)
    return keys


def looked_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


if __name__ == "__main__":
    main()
