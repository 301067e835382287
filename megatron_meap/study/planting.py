"""Texts that reward looking back: prose in which passages of random pieces come several times."""

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.integer]


def plant(
    prose: Ids,
    passages: int,
    length: int,
    times: int,
    pieces: Ids,
    random: np.random.Generator,
    consistent: bool = True,
) -> Ids:
    """Prose with passages inserted at random places, each `times`.

    Only an earlier occurrence tells how a passage continues, and one piece is enough to find it: all pieces of all
    passages are different.

    Args:
        prose: ids [n].
        passages: number of passages.
        length: ids of each.
        times: occurrences of each.
        pieces: ids that passages are drawn from; at least passages * length.
        random: the generator.
        consistent: False gives the same text, except that the order of the pieces after the first is random in each
            occurrence: which pieces follow can be known, but not in which order.

    Returns:
        ids [n + passages * length * times].
    """
    passage = random.choice(pieces, (passages, length), replace=False).astype(prose.dtype)
    planted = passage[random.permutation(np.tile(np.arange(passages), times))]
    places = np.sort(random.integers(0, len(prose) + 1, passages * times))
    reordered = random.permuted(planted[:, 1:], axis=1)  # drawn in any case, so that everything else is the same
    if not consistent:
        planted[:, 1:] = reordered
    return np.insert(prose, np.repeat(places, length), planted.ravel())
