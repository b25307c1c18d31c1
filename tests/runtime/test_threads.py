"""A model serves one thread at a time: a second call or context is refused by name, and the first is right."""

import threading

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from runtime import adaptive

IDS = torch.arange(3, 23)[None]
OPTIONS = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 12, "min_new_tokens": 12}
SECONDS = 60


class Pause(BaseStreamer):
    """Stops a generation after its third token, until it is told to go on."""

    def __init__(self):
        self.reached, self.go_on, self.count = threading.Event(), threading.Event(), 0

    def put(self, value):
        self.count += 1
        if self.count == 4:  # the prompt comes first
            self.reached.set()
            assert self.go_on.wait(SECONDS)

    def end(self):
        pass


@pytest.fixture
def meanwhile(tiny_llama, llama_adapter):
    """`meanwhile(call)`: what `call(run)` raises while another thread's generation is under way, which must end as
    if nothing had been."""

    def during(call):
        with adaptive(tiny_llama, llama_adapter, rung=4) as run:
            expected, pause, found = tiny_llama.generate(IDS, **OPTIONS), Pause(), []
            thread = threading.Thread(target=lambda: found.append(tiny_llama.generate(IDS, streamer=pause, **OPTIONS)))
            thread.start()
            assert pause.reached.wait(SECONDS)
            try:
                with pytest.raises(ValueError, match=r"^model: expected") as caught:
                    call(run)
            finally:
                pause.go_on.set()
                thread.join(SECONDS)
            assert torch.equal(found[0], expected)
            assert torch.equal(tiny_llama.generate(IDS, **OPTIONS), expected), "and it serves again"
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return during


def test_a_second_generation_is_refused(meanwhile, tiny_llama):
    said = meanwhile(lambda run: tiny_llama.generate(IDS, **OPTIONS))
    assert said.startswith("model: expected one call at a time, got a second one while another thread's is under way")


def test_a_second_forward_is_refused(meanwhile, tiny_llama):
    assert "a model serves one thread at a time" in meanwhile(lambda run: tiny_llama(IDS))


def test_a_second_context_is_refused(meanwhile, tiny_llama, llama_adapter):
    said = meanwhile(lambda run: adaptive(tiny_llama, llama_adapter, rung=8).__enter__())
    assert "got one inside `adaptive`, here or in another thread" in said


def test_of_contexts_that_begin_at_once_one_is_made(tiny_llama, llama_adapter):
    """Many threads at one gate: whoever comes second finds the model taken, however close behind."""
    barrier, left = threading.Barrier(8), threading.Barrier(8)
    made, refused = [], []

    def enter():
        barrier.wait(SECONDS)
        try:
            with adaptive(tiny_llama, llama_adapter, rung=4):
                made.append(tiny_llama(IDS).logits)
                left.wait(SECONDS)
        except ValueError as error:
            refused.append(str(error))
            left.wait(SECONDS)

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert len(made) == 1
    assert len(refused) == 7
    assert all("inside `adaptive`" in said for said in refused)
    assert not [name for name in vars(tiny_llama) if "adaptive" in name], "nothing stays behind"


def test_a_call_that_fails_lets_go_of_the_model(tiny_llama, llama_adapter):
    with adaptive(tiny_llama, llama_adapter, rung=4):
        with pytest.raises(ValueError, match="padding alone"):
            tiny_llama(IDS, attention_mask=torch.zeros_like(IDS))
        found = []
        thread = threading.Thread(target=lambda: found.append(tiny_llama(IDS).logits))
        thread.start()
        thread.join(SECONDS)
        assert torch.equal(found[0], tiny_llama(IDS).logits)
