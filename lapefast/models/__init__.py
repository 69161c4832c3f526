"""Where a model's sites are, and ops placed in them."""

from lapefast.models.bare import bare_model
from lapefast.models.fingerprint import fingerprint
from lapefast.models.linears import find_linears, known_sites
from lapefast.models.sites import Site
from lapefast.models.structure import find_sites

__all__ = ["Site", "bare_model", "find_linears", "find_sites", "fingerprint", "known_sites"]
