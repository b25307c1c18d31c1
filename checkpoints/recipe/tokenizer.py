"""Byte-level BPE tokenizer of 4,096 entries -> checkpoints/base/.

What: a Hugging Face fast tokenizer, trained on the base model's text and on the train split of the
Python documentation.

Why: in a model of four million parameters the embedding must stay small: 4,096 entries of 256
numbers are a quarter of the model.  Bytes as the alphabet mean that any text round-trips exactly.

Trade-off: a small vocabulary makes sequences longer (about 3.5 characters a token in English).
Digits are single tokens, so that numbers do not use up entries.  Nothing is added to a text: no
BOS in front, no EOS behind; training puts </s> between documents.

    python checkpoints/recipe/tokenizer.py TEXT/*.txt.xz --output checkpoints/base
"""

import argparse
import json
import lzma
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

VOCAB_SIZE = 4096
CONTEXT_TOKENS = 1024
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>"]  # ids 0, 1, 2, 3
# The Python text is a fiftieth of the base text; counted once it would get no words of its own.
PYTHON_REPEATS = 4


def base_documents(paths: list[Path]) -> Iterator[str]:
    """One document a line, newlines written as backslash-n, in .xz files."""
    for path in paths:
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield line.rstrip("\n").replace("\\n", "\n")


def python_documents(path: Path) -> Iterator[str]:
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield row["prompt"] + row["completion"]


def training_documents(texts: list[Path], python_text: Path, every: int) -> Iterator[str]:
    """Every `every`-th base document, and the Python documents PYTHON_REPEATS times."""
    for index, document in enumerate(base_documents(texts)):
        if index % every == 0:
            yield document
    for _ in range(PYTHON_REPEATS):
        yield from python_documents(python_text)


def train_tokenizer(documents: Iterator[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, output: Path) -> None:
    """Writes tokenizer.json (compact) and tokenizer_config.json for `AutoTokenizer`."""
    unk, bos, eos, pad = SPECIAL_TOKENS
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        padding_side="left",
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(output)
    path = output / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    compact = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    path.write_text(compact, encoding="utf-8")


def check_round_trip(output: Path, documents: list[str]) -> float:
    """Loads the saved folder, checks that decoding undoes encoding; returns characters a token."""
    tokenizer = AutoTokenizer.from_pretrained(output)
    tokens = 0
    for document in documents:
        ids = tokenizer(document)["input_ids"]
        tokens += len(ids)
        if tokenizer.decode(ids) != document:
            raise ValueError(
                f"{output}: decoding must give back the encoded text, but differs for "
                f"{document[:60]!r}; check the pre-tokenizer and decoder settings"
            )
    return sum(map(len, documents)) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("texts", type=Path, nargs="+", help=".txt.xz files, one document a line")
    parser.add_argument("--python", type=Path, default=Path("checkpoints/text/train.jsonl.xz"))
    parser.add_argument("--every", type=int, default=1, help="use every n-th base document")
    parser.add_argument("--output", type=Path, default=Path("checkpoints/base"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(training_documents(args.texts, args.python, args.every))
    save(tokenizer, args.output)
    samples = {
        "Python text": list(python_documents(args.python))[:500],
        "base text": [text[:2000] for text in islice(base_documents(args.texts), 200)],
        "odd text": [
            "  two  spaces\n\n\ttab é 漢字 🙂 don't , .\r\n 1234567890 ",
            " leading",
            "\n",
        ],
    }
    for name, documents in samples.items():
        ratio = check_round_trip(args.output, documents)
        print(f"{name}: round trip exact, {ratio:.2f} characters a token")
    for path in sorted(args.output.glob("*token*")):
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
