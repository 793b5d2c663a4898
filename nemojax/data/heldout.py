"""Which documents are never trained on: decided by what they say, not by where they stand.

The digest of a text decides, so the same text falls on the same side in every stage, whatever the order of
files, the number of processes or a source's limit; a smaller share is part of a larger one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

BUCKETS, HELDOUT_BUCKETS = 100, 10
HELDOUT_SHARE = 0.02


def is_heldout(key: str, heldout: int = HELDOUT_BUCKETS) -> bool:
    """Whether a key falls among the first `heldout` of 100 hash buckets; the same everywhere, forever."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") % BUCKETS < heldout


def digest_of(text: str) -> bytes:
    """16 bytes that stand for a text, white space around it apart."""
    return hashlib.blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _falls(digest: bytes, share: float) -> bool:
    return int.from_bytes(digest[:8], "big") < share * 2**64


def falls_out(text: str, share: float) -> bool:
    """Whether a text is held out where `share` of all texts is."""
    return share > 0 and _falls(digest_of(text), share)


def training_side(texts: Iterable[str], share: float, limit: int = 0) -> list[int]:
    """Places of the first `limit` (0: of all) texts that are not held out, in order; blank ones left out.

    share: part of the texts held out, 0 to 1.
    """
    kept: list[int] = []
    for place, text in enumerate(texts):
        if text.strip() and not falls_out(text, share):
            kept.append(place)
            if len(kept) == limit:
                break
    return kept


def heldout_side(texts: Iterable[str], share: float) -> list[int]:
    """Places of the texts that are held out, in the order of their digests; blank ones left out.

    That order is as good as random, so the first few of them represent the whole source.
    """
    found: list[tuple[bytes, int]] = []
    for place, text in enumerate(texts):
        if text.strip() and _falls(digest := digest_of(text), share):
            found.append((digest, place))
    return [place for _, place in sorted(found)]


def check_share(share: float, where: str) -> None:
    """ValueError unless a share lies from 0 to below 1."""
    if not 0 <= share < 1:
        raise ValueError(f"{where}: expected a heldout_share from 0 to below 1, got {share}")


def too_small(where: str, num: int, share: float) -> ValueError:
    """The error for a source whose `num` documents leave none on the held-out side."""
    return ValueError(
        f"{where}: expected a held-out document among {num} (heldout_share={share:g}), got none; name a "
        "file in data.heldout, raise heldout_share, or set it to 0 to go without validation on this source"
    )
