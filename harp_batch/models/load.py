"""Weights and tokenizer of a local model, through transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harp_batch.errors import ModelError
from harp_batch.models.local import LocalModel
from harp_batch.models.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(local: LocalModel, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """Return the model in evaluation mode and without gradients, on `device`.

    `dtype` is float32, bfloat16 or float16. Raises ModelError where the weights do not fit their config.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = _from_pretrained(
        AutoModelForCausalLM, local, dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True
    )
    return model.eval().requires_grad_(False).to(device)


def load_skeleton(local: LocalModel) -> PreTrainedModel:
    """Return the model without weights, on the device ``meta``: enough to ask what its architecture does."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = _from_pretrained(AutoConfig, local, local_files_only=True)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def load_tokenizer(local: LocalModel) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer; raise ModelError where the directory has none."""
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, local, local_files_only=True)


def _from_pretrained(loader: Any, local: LocalModel, **options: Any) -> Any:
    try:
        with quiet_transformers():
            return loader.from_pretrained(local.path, trust_remote_code=False, **options)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"model {local.ref!r} cannot be loaded from {local.path}: {reason[0]}") from error
