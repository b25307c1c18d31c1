"""Fixtures shared by all tests: tiny random models, adapters written by PEFT itself, and the optional data pack.

Tests never reach a hub. Those that want real text and adapters take `datapack`, a folder named by the environment
variable `DATAPACK`; without it they are skipped and say so.
"""

import os
import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import hypothesis
import pytest
import torch
from torch import nn

# Read when huggingface_hub is imported, and the conftest of a folder named on the command line does that before
# pytest_configure.
os.environ["HF_HUB_OFFLINE"] = "1"
# Read when a kernel is defined: without a GPU kernels run in Triton's interpreter, and with one where 1 asks for it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile("house", deadline=None, derandomize=True)
hypothesis.settings.load_profile("house")


def pytest_configure(config: pytest.Config) -> None:
    # The order of fp32 sums depends on the number of threads. Tiny models gain nothing from a second one, and where the
    # machine is shared they lose twentyfold: every operation waits for a thread that is not scheduled.
    torch.set_num_threads(1)
    # Read when datasets is imported, which the collection of tests does next. `datasets` caches by content: a cache
    # that outlives the run would hide a broken builder.
    cache = tempfile.TemporaryDirectory(prefix="chunkwise-lora-tests-")
    config.add_cleanup(cache.cleanup)
    os.environ["HF_DATASETS_CACHE"] = cache.name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: on a GPU where there is one and TRITON_INTERPRET=1 does not ask for the interpreter."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return torch.device("cuda" if torch.cuda.is_available() and not interpreted else "cpu")


@pytest.fixture(scope="session")
def datapack() -> Path:
    """The folder of real models, adapters and tasks named by the environment variable DATAPACK."""
    value = os.environ.get("DATAPACK")
    if not value:
        pytest.skip("needs the data pack: set DATAPACK to its folder")
    path = Path(value)
    assert path.is_dir(), f"DATAPACK must name a folder, got {value!r}"
    return path


@pytest.fixture(scope="session")
def base_model_path(datapack: Path) -> Path:
    """LLaMA of 16 M parameters, vocabulary 8192, context 1024; the five adapters of the pack fit it."""
    return datapack / "models" / "base-16m"


@pytest.fixture(scope="session")
def stories_path(datapack: Path) -> Path:
    """LLaMA of 260 K parameters, vocabulary 512, trained on TinyStories."""
    return datapack / "models" / "stories260K"


@pytest.fixture(scope="session")
def load_model() -> Callable[..., nn.Module]:
    """`load_model(path, dtype=torch.float32)`: a fresh causal LM in eval mode, the caller's own to patch."""
    from transformers import AutoModelForCausalLM

    def load(path: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()

    return load


@pytest.fixture(scope="session")
def tiny_llama_factory() -> Callable[[], nn.Module]:
    """Makes the same random LLaMA at each call: 2 layers, dim 64, 4 heads, 2 KV heads, vocabulary 256, fp32, eval."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        # wide enough for the logits of a random model to differ clearly from token to token
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return lambda: _seeded(lambda: LlamaForCausalLM(deepcopy(config)), seed=0).eval()


@pytest.fixture(scope="session")
def tiny_gpt2_factory() -> Callable[[], nn.Module]:
    """Makes the same random GPT-2 at each call: its linears are Conv1D, with transposed weights; fp32, eval."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=256,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=512,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return lambda: _seeded(lambda: GPT2LMHeadModel(deepcopy(config)), seed=0).eval()


@pytest.fixture
def tiny_llama(tiny_llama_factory: Callable[[], nn.Module]) -> nn.Module:
    return tiny_llama_factory()


@pytest.fixture
def tiny_gpt2(tiny_gpt2_factory: Callable[[], nn.Module]) -> nn.Module:
    return tiny_gpt2_factory()


@pytest.fixture(scope="session")
def make_peft_adapter() -> Callable[..., Path]:
    """`make_peft_adapter(model_factory, path, r=8, alpha=16, seed=0, **lora_config)`: the folder, written by PEFT.

    A and B are both random (PEFT starts B at zero, which would make every comparison pass). All linears but the head
    are adapted unless `target_modules` says otherwise.
    """
    from peft import LoraConfig, get_peft_model

    def make(
        model_factory: Callable[[], nn.Module], path: Path, r: int = 8, alpha: float = 16, seed: int = 0, **lora_config
    ) -> Path:
        base = model_factory()
        options = {
            "target_modules": "all-linear",
            "task_type": "CAUSAL_LM",
            "fan_in_fan_out": base.config.model_type == "gpt2",
        }
        config = LoraConfig(r=r, lora_alpha=alpha, **(options | lora_config))
        model = _seeded(lambda: _with_random_factors(get_peft_model(base, config)), seed)
        # "auto" would look the base model up by name to compare vocabularies
        model.save_pretrained(path, save_embedding_layers=False)
        return Path(path)

    return make


def _with_random_factors(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name or "lora_embedding" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def _seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Runs `build` from its own seed and leaves the global random state as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()
