"""What the training tests share: a whole small case on disk, a tiny adapted model, and quiet trainers."""

import json
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import pytest
import torch

from policy import Settings
from runtime import build_ladder, load_adapter
from runtime.control.record import Keep
from runtime.plan import static_plan
from runtime.reference.adaptive import activate
from tests.training.tape import AMOUNTS, Tape, record
from training import fit as fit_module
from training.ladders.build import build

# Lightning's advice about loaders and folders that the tests choose on purpose.
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture(scope="session")
def llama_adapter(make_peft_adapter, tiny_llama_factory, tmp_path_factory) -> Path:
    """r=8 on every linear of `tiny_llama`, strong enough for rungs to differ by tenths of a nat."""
    return make_peft_adapter(tiny_llama_factory, tmp_path_factory.mktemp("adapters") / "llama", alpha=48)


@pytest.fixture(scope="session")
def ladder(llama_adapter):
    """Rungs 2, 4, 6, 8 of `llama_adapter`."""
    return build_ladder(load_adapter(llama_adapter), [2, 4, 6])


@pytest.fixture(scope="session")
def mixed_ladder(llama_adapter, tiny_llama_factory, make_example):
    """Rungs 0.5, 1, 2, 4, 8 of `llama_adapter`, those below the top in few bits."""
    documents = [make_example(40, 4, seed=100 + number) for number in range(6)]
    return build("mixed", load_adapter(llama_adapter), tiny_llama_factory(), documents, [0.5, 1, 2, 4])


@pytest.fixture
def full_rank_run(tiny_llama, ladder):
    """`tiny_llama` adaptive at the full rank."""
    with activate(tiny_llama, static_plan(ladder, ladder.rungs[-1]), keep=Keep.DECISIONS) as run:
        yield run


@pytest.fixture(scope="session")
def make_example() -> Callable[..., dict]:
    """`make_example(length, prompt_tokens, seed)`: random tokens of `tiny_llama`'s vocabulary."""

    def make(length: int, prompt_tokens: int = 0, seed: int = 0) -> dict:
        ids = torch.randint(3, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        return {"id": str(seed), "input_ids": ids, "prompt_tokens": prompt_tokens}

    return make


@pytest.fixture(scope="session")
def make_trainer() -> Callable[..., L.Trainer]:
    """Trainers on one CPU process that print nothing and write nowhere."""
    quiet = {
        "accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False,
        "num_sanity_val_steps": 0, "logger": False, "enable_checkpointing": False,
    }  # fmt: skip
    return lambda **options: L.Trainer(**{**quiet, **options})


@pytest.fixture(scope="session")
def settings() -> Settings:
    return Settings()


@dataclass(frozen=True)
class Case:
    """Folders of a fit that takes seconds."""

    model: Path
    adapter: Path
    other_adapter: Path
    """Fits a wider model."""
    dataset: Path

    def arguments(self, output: Path, **changes: object) -> list[str]:
        """Command line of `training.fit`; a changed value of None leaves the flag out."""
        flags: dict[str, object] = {
            "model": self.model, "adapter": self.adapter, "dataset": self.dataset, "output": output,
            "amounts.train_documents": 8, "amounts.validation_documents": 4, "amounts.test_documents": 6,
            "amounts.max_tokens": 64, "amounts.min_completion_tokens": 16, "amounts.later_chunks": 3,
            "amounts.epochs": 3, "amounts.bootstrap": 20, "trainer.accelerator": "cpu",
        }  # fmt: skip
        return [f"--{name}={value}" for name, value in {**flags, **changes}.items() if value is not None]


@pytest.fixture(scope="session")
def case(tmp_path_factory, tiny_llama_factory, make_peft_adapter) -> Case:
    """`tiny_llama` on disk with a tokenizer of its own, an adapter of rank 8, and three splits of babble."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("case")
    words = ["rank", "rung", "ladder", "page", "token", "chunk", "the", "of", "is", "a", "opens", "closes"]
    source = random.Random(0)
    text = {split: [_babble(source, words) for _ in range(12)] for split in ("train", "validation", "test")}
    for split, documents in text.items():
        path = root / "text" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    _train_tokenizer([d["completion"] for d in text["train"]]).save_pretrained(root / "model")
    tiny_llama_factory().save_pretrained(root / "model")
    adapter = make_peft_adapter(tiny_llama_factory, root / "adapter", alpha=48)
    wide = LlamaConfig(
        vocab_size=256, hidden_size=96, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    other = make_peft_adapter(lambda: LlamaForCausalLM(wide), root / "other")
    return Case(root / "model", adapter, other, root / "text")


def _babble(source: random.Random, words: list[str]) -> dict[str, str]:
    prompt = "Say: " + " ".join(source.choices(words, k=source.randint(0, 3)))
    return {"prompt": prompt, "completion": " " + " ".join(source.choices(words, k=source.randint(30, 50))) + "."}


def _train_tokenizer(text: list[str]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # All 256 bytes would fill the model's vocabulary; of ASCII there is room for merges as well.
    alphabet = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=200,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def wired(case, tmp_path_factory):
    """The tape of one fit, its output folder, and what its first stage made."""
    tape, folder = Tape(), tmp_path_factory.mktemp("wired") / "out"
    with pytest.MonkeyPatch.context() as patch:
        record(tape, patch)
        fit_module.fit(
            str(case.model), str(case.adapter), str(case.dataset), str(folder), amounts=AMOUNTS,
            trainer={"accelerator": "cpu"},
        )  # fmt: skip
    tape.task = tape.stages["collect_targets"][1][0][0]
    return tape, folder, tape.stages["collect_targets"][1][1]
