"""What a trainer's rollout asks of a server: the trainer's sampling, whole."""

from types import SimpleNamespace

import pytest

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
