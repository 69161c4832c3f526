"""What every result says of the run that it came from."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

import lapefast
from lapefast.models import fingerprint
from lapefast.models.bare import bare_model, unwrap

__all__ = ["about_run"]


def about_run(model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """Model, its fingerprint and dtype, tokenizer, threads and versions, as JSON."""
    config = getattr(unwrap(model), "config", None)
    return {
        "model": getattr(config, "_name_or_path", "") or type(unwrap(model)).__name__,
        "fingerprint": fingerprint(model),
        "dtype": str(next(bare_model(model).parameters()).dtype).removeprefix("torch."),
        "tokenizer": getattr(tokenizer, "name_or_path", None),
        "threads": torch.get_num_threads(),
        "versions": {
            "lapefast": lapefast.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
