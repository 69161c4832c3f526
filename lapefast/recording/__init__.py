"""Recording: the statistics ops placed in a model, for one's own loop or for the pass."""

from lapefast.recording.recorder import Recorder, record

__all__ = ["Recorder", "record"]
