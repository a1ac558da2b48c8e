"""TRL's side of benchmarks/vs_trl.py, run by it in TRL's own environment: GRPOTrainer that waits for a line on stdin before each step.

    python trl_side.py MODEL_DIR DATA.jsonl NEW_TOKENS STEPS FIRST_NEW_TOKENS THREADS WEIGHTS PRECISION OUTPUT_DIR

Settings, as good for TRL on a CPU as was found: no gradient checkpointing, one group a micro-batch, fused Adam, torch's attention, its own
`generate` for all 64 samples at once, no second look at the old policy. WEIGHTS bfloat16: weights, gradients and Adam's state are all in
bf16 without an fp32 copy, less work and memory than ours, though small updates are rounded away; float32: fp32 weights under bf16 autocast,
or, with PRECISION fp32, nothing but fp32.
The end token is a token like others: nothing ends before NEW_TOKENS. The first step stops at FIRST_NEW_TOKENS.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

PROMPTS, SAMPLES = 8, 8
ANSWER = re.compile(r"\\boxed\{(-?\d+)\}")


def main() -> None:
    model_dir, data, new_tokens, steps, first_new_tokens, threads, weights, precision, out = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not come between

    def say(**words: Any) -> None:
        answers.write(json.dumps(words) + "\n")
        answers.flush()

    torch.set_num_threads(int(threads))
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = [json.loads(line) for line in open(data)]
    prompt_tokens = {len(tokenizer(row["prompt"]).input_ids) for row in rows}
    lengths: list[int] = []

    def reward(completions: list[str], completion_ids: list[list[int]], solutions: list[list[str]], **_: Any) -> list[float]:
        lengths[:] = [len(ids) for ids in completion_ids]
        found = [ANSWER.search(text) for text in completions]
        return [5.0 if f and f[0] in right else -5.0 for f, right in zip(found, solutions)]

    class Gate(TrainerCallback):
        started = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            limit = int(new_tokens if state.global_step else first_new_tokens)
            trainer.generation_config.max_new_tokens = trainer.generation_kwargs["max_new_tokens"] = limit
            if not sys.stdin.readline():
                sys.exit("the other side has gone")
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            say(
                seconds=time.perf_counter() - self.started,
                prompt_tokens=sorted(prompt_tokens),
                response_tokens=sorted(set(lengths)),
                samples=len(lengths),
            )

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, weights), attn_implementation="sdpa")
    config = GRPOConfig(
        output_dir=out, use_cpu=True, bf16=precision == "bf16", gradient_checkpointing=False, per_device_train_batch_size=SAMPLES,
        gradient_accumulation_steps=PROMPTS, num_generations=SAMPLES, max_completion_length=int(new_tokens), temperature=1.0, top_p=1.0,
        top_k=0, generation_kwargs={"eos_token_id": None}, beta=0.0, num_iterations=1, epsilon=0.2, learning_rate=2e-5, weight_decay=0.0,
        max_grad_norm=1.0, lr_scheduler_type="constant", optim="adamw_torch_fused", max_steps=int(steps), save_strategy="no",
        report_to="none", logging_steps=1, disable_tqdm=True, dataloader_num_workers=0, dataloader_pin_memory=False, seed=1234,
    )  # fmt: skip
    trainer = GRPOTrainer(model, reward, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Gate()])
    trainer.eos_token_ids = []
    trainer.model.generation_config.eos_token_id = None
    say(ready=True)
    trainer.train()


if __name__ == "__main__":
    main()
