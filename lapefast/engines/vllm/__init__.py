"""vLLM with edits: a plugin that edits neurons' activations, per request or for the whole server.

vLLM calls `register` in each of its processes, by the entry point `vllm.general_plugins`. Without
`LAPEFAST_EDITS` in the environment it does nothing. `docs/serving.md` says how to serve with it.

    served     the edit file that this process serves
    requests   front end: which edit a request asks for, and its cache salt
    runner     worker: whose rows a forward has, and proof that every FFN ran
    placement  worker: where the model's FFNs are, and that they are the file's
    edits      worker: the op in place of an activation
    checkpoint worker: the fingerprint of the weights that are served
    worker     a worker class that doesn't start without all this

vLLM is imported in functions only, when it has asked for the plugin.
"""

from __future__ import annotations

import os

__all__ = ["ARGUMENT", "ENVIRONMENT", "Worker", "register"]

ENVIRONMENT = "LAPEFAST_EDITS"
ARGUMENT = "lapefast_edit"


def register() -> None:
    """Serve the edits of the file that `LAPEFAST_EDITS` names; without it, do nothing.

    Raises:
        InputError: the file is missing or broken.
    """
    # vLLM only logs a plugin that can't be imported; what fails in here stops it.
    if not os.environ.get(ENVIRONMENT):
        return
    from lapefast.engines.vllm import requests, runner
    from lapefast.engines.vllm.served import served_here

    served_here()
    requests.install()
    runner.install()


def __getattr__(name: str):
    # Its base is the platform's worker, so it is made when vLLM asks for it by name.
    if name == "Worker":
        from lapefast.engines.vllm.worker import worker_class

        return worker_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
