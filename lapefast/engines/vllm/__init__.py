"""vLLM with edits of neurons' activations, per request or for the whole server; and counting them.

For edits vLLM calls `register` in each of its processes, by the entry point `vllm.general_plugins`.
Without `LAPEFAST_EDITS` in the environment it does nothing. An engine that counts is started by
`CountingEngine`. `docs/serving.md` says how to use both.

    served     front end and worker: the edit file that this process serves
    requests   front end: which edit a request asks for, and its cache salt
    engine     front end: an engine that counts the prompts it is given
    checkpoint both: sites and fingerprint of the model, from its files
    placement  worker: where the model's FFNs are, and which sites
    rows       worker: whose rows a forward has, and proof that every FFN ran
    activation worker: the op in place of an activation
    runner     worker: all this placed in a model that is loaded
    edits      worker: what serves edits there
    counting   worker: what counts there
    worker     worker classes that place one or the other

vLLM is imported in functions only, when it has asked for the plugin or is to be started.
"""

from __future__ import annotations

import os

__all__ = ["ARGUMENT", "ENVIRONMENT", "CountingWorker", "Worker", "register"]

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
    from lapefast.engines.vllm import edits, requests
    from lapefast.engines.vllm.served import served_here

    served_here()
    requests.install()
    edits.install()


def __getattr__(name: str):
    # Their base is the platform's worker, so they are made when vLLM asks for them by name.
    if name == "Worker":
        from lapefast.engines.vllm.worker import serving_worker_class

        return serving_worker_class()
    if name == "CountingWorker":
        from lapefast.engines.vllm.worker import counting_worker_class

        return counting_worker_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
