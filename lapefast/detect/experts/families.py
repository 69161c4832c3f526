"""The families of languages, for a look at which of them a model treats alike."""

from __future__ import annotations

import re

__all__ = ["language_family"]

# ISO 639-1 codes; of Indo-European, the branch.
_FAMILIES = {
    "Germanic": "af da de en fo fy is lb nb nl nn no sv yi",
    "Romance": "ca es fr gl it la oc pt ro",
    "Slavic": "be bg bs cs hr mk pl ru sh sk sl sr uk",
    "Baltic": "lt lv",
    "Celtic": "br cy ga gd",
    "Hellenic": "el",
    "Albanian": "sq",
    "Armenian": "hy",
    "Indo-Aryan": "as bn gu hi mr ne or pa sa sd si ur",
    "Iranian": "fa ku ps tg",
    "Uralic": "et fi hu se",
    "Turkic": "az ba kk ky tk tr tt ug uz",
    "Mongolic": "mn",
    "Semitic": "am ar he mt ti",
    "Cushitic": "om so",
    "Chadic": "ha",
    "Dravidian": "kn ml ta te",
    "Sino-Tibetan": "bo my zh",
    "Japonic": "ja",
    "Koreanic": "ko",
    "Tai-Kadai": "lo th",
    "Austroasiatic": "km vi",
    "Austronesian": "id jv mg mi ms sm su tl to",
    "Niger-Congo": "ig ln rw sn st sw tn wo xh yo zu",
    "Kartvelian": "ka",
    "Basque": "eu",
}
_FAMILY = {code: family for family, codes in _FAMILIES.items() for code in codes.split()}


def language_family(label: str) -> str | None:
    """The family of a language by its code, such as "de", "pt-BR" or "zh_Hans"; None if unknown."""
    return _FAMILY.get(re.split("[-_.]", label, maxsplit=1)[0].lower())
