"""Documents to token ids, with an exact boundary between prompt and completion.

Prompt and completion are tokenised apart and joined, so that `prompt_tokens` is a fact and not a guess from character
offsets. The price is that no token can span the boundary; a byte-level tokenizer loses nothing when the completion
starts with a space, a SentencePiece one may put one more space token there.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset, Features, Sequence, Value
from transformers import PreTrainedTokenizerBase

_FEATURES = Features({"id": Value("string"), "input_ids": Sequence(Value("int32")), "prompt_tokens": Value("int32")})


def encode(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, min_completion_tokens: int = 1
) -> Dataset:
    """Documents to `id`, `input_ids` (int32, at most `max_tokens`) and `prompt_tokens` (int32, how many are prompt).

    What the tokenizer itself puts before a text (BOS, usually) starts the prompt; EOS, if it has one, ends the
    completion where it fits; longer documents are cut on the right. A document that keeps fewer than
    `min_completion_tokens` (EOS counts) is dropped. Cached by `datasets` where the documents are on disk. Raises
    ValueError when a limit is below 1, a column is missing, or no document is left.
    """
    if max_tokens < 1 or min_completion_tokens < 1:
        raise ValueError(
            "expected max_tokens and min_completion_tokens of at least 1, "
            f"got {max_tokens} and {min_completion_tokens}; do correct them"
        )
    if not {"id", "prompt", "completion"} <= set(documents.column_names):
        raise ValueError(
            f"expected columns id, prompt and completion, got {documents.column_names}; do use load_documents"
        )
    encoded = documents.map(
        _encode_batch,
        batched=True,
        fn_kwargs={
            "tokenizer": tokenizer,
            "start": leading_special_tokens(tokenizer),
            "end": [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id],
            "max_tokens": max_tokens,
            "min_completion_tokens": min_completion_tokens,
        },
        remove_columns=documents.column_names,
        features=_FEATURES,
    )
    if len(encoded) == 0:
        raise ValueError(
            f"expected a document with {min_completion_tokens} completion tokens within {max_tokens} tokens, got none "
            f"of {len(documents)}; do raise max_tokens or shorten the prompts"
        )
    return encoded


def leading_special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that `tokenizer(text)` puts before the text's own: [BOS], [], or whatever its template says."""
    bare = list(tokenizer("x", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("x")["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    raise ValueError(
        f"expected special tokens around a text's own {bare}, got {full}; "
        "do use a tokenizer whose template only adds tokens"
    )


def _encode_batch(
    batch: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    start: list[int],
    end: list[int],
    max_tokens: int,
    min_completion_tokens: int,
) -> dict[str, list[Any]]:
    # verbose=False: a text longer than the model's context is expected here and cut below.
    prompts = tokenizer(batch["prompt"], add_special_tokens=False, verbose=False)["input_ids"]
    completions = tokenizer(batch["completion"], add_special_tokens=False, verbose=False)["input_ids"]
    encoded: dict[str, list[Any]] = {"id": [], "input_ids": [], "prompt_tokens": []}
    for name, prompt, completion in zip(batch["id"], prompts, completions, strict=True):
        prompt_tokens = len(start) + len(prompt)
        ids = [*start, *prompt, *completion, *end][:max_tokens]
        if len(ids) - prompt_tokens >= min_completion_tokens:
            encoded["id"].append(name)
            encoded["input_ids"].append(ids)
            encoded["prompt_tokens"].append(prompt_tokens)
    return encoded
