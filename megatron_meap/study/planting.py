"""Texts that reward looking back: prose in which pairs of a name and its figure come several times."""

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.integer]


def plant(prose: Ids, pairs: int, times: int, pieces: Ids, random: np.random.Generator, consistent: bool = True) -> Ids:
    """Prose with pairs of a name and its figure planted at random places, each pair `times`.

    Nothing but an earlier occurrence tells which figure follows a name.

    Args:
        prose: ids [n].
        pairs: different pairs.
        times: occurrences of each.
        pieces: ids that names and figures are drawn from, each for one pair; at least twice as many as pairs.
        random: what draws.
        consistent: False gives the same text but for its figures: each is drawn anew, so that none can be known.

    Returns:
        ids [n + 2 * pairs * times].
    """
    pair = random.choice(pieces, (pairs, 2), replace=False).astype(prose.dtype)
    planted = pair[random.permutation(np.tile(np.arange(pairs), times))]
    places = np.sort(random.integers(0, len(prose) + 1, pairs * times))
    if not consistent:
        planted[:, 1] = random.choice(pieces, len(planted))
    return np.insert(prose, np.repeat(places, 2), planted.ravel())
