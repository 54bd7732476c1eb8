"""lm-eval on the driver: build requests, score answers, aggregate. Nothing else imports lm_eval.

task = load_task("gsm8k", num_fewshot=5, data_dir="data")
requests = task.build_requests(tokenizer, chat_template=True, limit=100)
scores, correct = task.score(requests[0], answer)
values = task.aggregate([scores])
"""

from __future__ import annotations

from harp_batch.tasks.loaded import LoadedTask, load_task

__all__ = ["LoadedTask", "load_task"]
