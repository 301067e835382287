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
    """Prose with passages planted at random places, each `times`.

    Nothing but an earlier occurrence tells how a passage goes on, and there one piece is enough: the pieces of all
    passages are different.

    Args:
        prose: ids [n].
        passages: different ones.
        length: ids of each.
        times: occurrences of each.
        pieces: ids that passages are drawn from; at least passages * length.
        random: what draws.
        consistent: False gives the same text but for the order of what follows each occurrence's first piece, which is
            drawn anew: it can be known which pieces come, and not when.

    Returns:
        ids [n + passages * length * times].
    """
    passage = random.choice(pieces, (passages, length), replace=False).astype(prose.dtype)
    planted = passage[random.permutation(np.tile(np.arange(passages), times))]
    places = np.sort(random.integers(0, len(prose) + 1, passages * times))
    reordered = random.permuted(planted[:, 1:], axis=1)  # drawn in any case, so that all else is the same
    if not consistent:
        planted[:, 1:] = reordered
    return np.insert(prose, np.repeat(places, length), planted.ravel())
