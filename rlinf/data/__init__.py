"""Records, tokenizer, prompts, sampler, packing."""
