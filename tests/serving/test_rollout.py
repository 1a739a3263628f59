"""What a trainer's rollout asks of a server: the trainer's sampling, whole."""

from types import SimpleNamespace

import pytest
import torch

from dual_lora.serving.client import Completion
from dual_lora.serving.rollout import VllmRollout


def test_all_of_the_trainers_sampling_is_asked_for(monkeypatch):
    pytest.importorskip("trl")
    from trl import GRPOConfig

    given = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}
    args = GRPOConfig("run", **given, generation_kwargs={"frequency_penalty": 0.5}, use_cpu=True, bf16=False)
    trainer = SimpleNamespace(
        **{name: getattr(args, name) for name in given},
        args=args,
        max_completion_length=8,
        model=torch.nn.Linear(1, 1),
        state=SimpleNamespace(global_step=0),
        accelerator=SimpleNamespace(is_main_process=False, wait_for_everyone=lambda: None),
        processing_class=lambda prompt: SimpleNamespace(input_ids=[1, 2]),
    )
    rollout, asked = VllmRollout("http://localhost:9", "m"), {}

    def complete(prompts, max_tokens, **sampling):
        asked.update(sampling)
        return [Completion(prompt, [3], [-1.0]) for prompt in prompts]

    monkeypatch.setattr(rollout.server, "complete", complete)
    rollout(["a prompt"], trainer)
    assert asked == {**given, "frequency_penalty": 0.5}


class Tokenizer:
    """Writes down what a conversation's template was asked for."""

    def __init__(self):
        self.asked = []

    def apply_chat_template(self, prompt, **given):
        self.asked.append(given)
        return "hi"

    def __call__(self, text, **given):
        return SimpleNamespace(input_ids=[7])


def trainer(**more):
    accelerator = SimpleNamespace(is_main_process=True, unwrap_model=lambda m: m, wait_for_everyone=lambda: None)
    sampling = dict(temperature=1.0, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0)
    return SimpleNamespace(
        state=SimpleNamespace(global_step=0), accelerator=accelerator, model=torch.nn.Linear(1, 1),
        processing_class=Tokenizer(), max_completion_length=1, args=SimpleNamespace(generation_kwargs=None),
        **sampling, **more,
    )  # fmt: skip


def rollout(monkeypatch):
    made = VllmRollout("http://x/v1", "m")
    sent = []
    monkeypatch.setattr(made.server, "send", sent.append)
    monkeypatch.setattr(made.server, "complete", lambda ids, *_, **__: [])
    return made, sent


def test_a_conversation_has_the_trainers_template_its_settings_and_its_tools(monkeypatch):
    made, _ = rollout(monkeypatch)
    given = {"chat_template_kwargs": {"enable_thinking": False}, "chat_template": "{{ x }}", "tools": [len]}
    one = trainer(**given)
    made([[{"role": "user", "content": "hi"}]], one)
    (asked,) = one.processing_class.asked
    assert asked["enable_thinking"] is False
    assert (asked["chat_template"], asked["tools"]) == ("{{ x }}", [len])
    assert asked["add_generation_prompt"]
    plain = trainer(tools=[], chat_template_kwargs=None)
    made([[{"role": "user", "content": "hi"}]], plain)
    assert plain.processing_class.asked[0]["tools"] is None


def test_a_second_training_sends_its_own_weights(monkeypatch):
    """Both at step 0: of two trainers, or of one that trains twice."""
    made, sent = rollout(monkeypatch)
    one = trainer()
    for _ in range(2):
        made([], one)
    assert len(sent) == 1
    one.state = SimpleNamespace(global_step=0)
    made([], one)
    made([], trainer())
    assert len(sent) == 3


def test_weights_that_are_loaded_without_a_step_are_sent(monkeypatch):
    """An evaluation after `load_best_model_at_end` is at the last step, and was answered by the last step's weights."""
    made, sent = rollout(monkeypatch)
    one = trainer()
    made([], one)
    one.model.load_state_dict(torch.nn.Linear(1, 1).state_dict())
    for _ in range(2):
        made([], one)
    assert len(sent) == 2
