"""Masked sums are the plain sums, with anybody missing down to the threshold, and show nothing but themselves."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pytest

from oppu_ray.secure import Party, Revealed, Unrecoverable, check_public_key, join_shares, share_secret, unmask

CONTEXT = b"attempt 1"
NUM, THRESHOLD, LENGTH = 8, 6, 50


def vectors() -> dict[int, np.ndarray]:
    return {n: np.random.default_rng(n).integers(0, 2**64, LENGTH, np.uint64) for n in range(NUM)}


def parties(num: int = NUM, context: bytes = CONTEXT) -> dict[int, Party]:
    return {number: Party(number, context) for number in range(num)}


def total_of(own: dict[int, np.ndarray], numbers: Collection[int]) -> np.ndarray:
    total = np.zeros(LENGTH, np.uint64)
    for number in numbers:
        total += own[number]
    return total


def run(
    without_keys: Collection[int] = (),
    without_shares: Collection[int] = (),
    without_vector: Collection[int] = (),
    without_reveal: Collection[int] = (),
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """The whole protocol with parties that leave before a step: (the sum, the masked vectors)."""
    everyone = parties()
    keys = {n: party.public_keys() for n, party in everyone.items() if n not in without_keys}
    shares = {n: everyone[n].share(keys, THRESHOLD) for n in keys if n not in without_shares}
    inboxes = {n: {sender: own[n] for sender, own in shares.items()} for n in shares}
    masked = {n: everyone[n].mask(vectors()[n], inboxes[n]) for n in shares if n not in without_vector}
    revealed = {n: everyone[n].reveal(list(masked)) for n in masked if n not in without_reveal}
    left = shares.keys() - masked.keys()
    total = unmask(total_of(masked, masked), list(masked), left, keys, revealed, THRESHOLD, CONTEXT)
    return total, masked


def test_the_sum_is_the_plain_sum() -> None:
    total, masked = run()
    assert np.array_equal(total, total_of(vectors(), range(NUM)))
    assert not any(np.isin(masked[n], own).any() for n, own in vectors().items())
    assert not np.array_equal(total_of(masked, masked), total)  # own masks do not cancel by themselves


@pytest.mark.parametrize(
    ("leaving", "stayed"),
    [
        ({"without_keys": [3]}, {0, 1, 2, 4, 5, 6, 7}),
        ({"without_shares": [0]}, {1, 2, 3, 4, 5, 6, 7}),
        ({"without_vector": [7]}, {0, 1, 2, 3, 4, 5, 6}),
        ({"without_vector": [0, 4]}, {1, 2, 3, 5, 6, 7}),
        ({"without_reveal": [1, 6]}, set(range(NUM))),
        ({"without_keys": [2], "without_vector": [5]}, {0, 1, 3, 4, 6, 7}),
    ],
)
def test_who_leaves_is_not_in_the_sum_and_does_not_spoil_it(leaving: dict[str, list[int]], stayed: set[int]) -> None:
    total, masked = run(**leaving)
    assert set(masked) == stayed
    assert np.array_equal(total, total_of(vectors(), stayed))


def test_below_the_threshold_there_is_no_sum() -> None:
    with pytest.raises(ValueError, match="5 parties revealed their shares; expected at least 6"):
        run(without_reveal=[0, 1, 2])
    with pytest.raises(ValueError, match="stayed; expected at least 6"):
        run(without_vector=[0, 1, 2])


def test_masks_hide_a_vector_from_whoever_has_all_the_others() -> None:
    """Two attempts with the same vectors: what a party sends has nothing in common."""
    _, first = run()
    _, second = run()
    assert not any(np.isin(first[n], second[n]).any() for n in range(NUM))


def test_a_party_never_gives_both_shares_of_anyone() -> None:
    everyone = parties()
    keys = {n: party.public_keys() for n, party in everyone.items()}
    shares = {n: party.share(keys, THRESHOLD) for n, party in everyone.items()}
    everyone[0].mask(vectors()[0], {sender: own[0] for sender, own in shares.items()})
    revealed = everyone[0].reveal([0, 1, 2, 3, 4, 5])
    assert set(revealed.seeds) == {0, 1, 2, 3, 4, 5} and set(revealed.keys) == {6, 7}
    with pytest.raises(ValueError, match="reveals shares once"):
        everyone[0].reveal([2, 3, 4, 5, 6, 7])
    with pytest.raises(ValueError, match="one vector per attempt"):
        everyone[0].mask(vectors()[1], {sender: own[0] for sender, own in shares.items()})


def test_what_a_party_refuses() -> None:
    everyone = parties()
    keys = {n: party.public_keys() for n, party in everyone.items()}
    with pytest.raises(ValueError, match="the threshold is 4 of 8 parties; expected more than half"):
        everyone[0].share(keys, 4)
    with pytest.raises(ValueError, match="the threshold is 9 of 8"):
        everyone[0].share(keys, 9)
    with pytest.raises(ValueError, match="is not among the peers with its own keys"):
        everyone[0].share({**keys, 0: keys[1]}, THRESHOLD)
    shares = {n: party.share(keys, THRESHOLD) for n, party in everyone.items()}
    inbox = {sender: own[0] for sender, own in shares.items()}
    with pytest.raises(ValueError, match=r"shares of \[0, 1\]; expected 6 of its peers"):
        everyone[0].mask(vectors()[0], {sender: inbox[sender] for sender in (0, 1)})


@pytest.mark.parametrize("kind", ["last byte", "digest", "for another", "earlier attempt"])
def test_shares_that_are_not_what_was_dealt_are_not_held(kind: str) -> None:
    everyone = parties()
    keys = {n: party.public_keys() for n, party in everyone.items()}
    shares = {n: party.share(keys, THRESHOLD) for n, party in everyone.items()}
    inbox = {sender: own[0] for sender, own in shares.items()}
    if kind == "last byte":
        inbox[3] = inbox[3][:-1] + bytes([inbox[3][-1] ^ 1])
    elif kind == "digest":
        inbox[3] = bytes([inbox[3][0] ^ 1]) + inbox[3][1:]
    elif kind == "for another":
        inbox[3] = shares[3][1]
    else:
        earlier = Party(3, b"attempt 0")
        inbox[3] = earlier.share({**keys, 3: earlier.public_keys()}, THRESHOLD)[0]
    everyone[0].mask(vectors()[0], inbox)
    revealed = everyone[0].reveal(range(NUM))
    assert [dealer for dealer, share in revealed.seeds.items() if not share] == [3]


def test_a_public_key_of_low_order_is_refused() -> None:
    for key in (bytes(32), b"\x01" + bytes(31)):
        with pytest.raises(ValueError, match="is of low order"):
            check_public_key(key)
    check_public_key(Party(0, CONTEXT).public_keys().mask)


def test_a_secret_needs_as_many_shares_as_the_threshold() -> None:
    secret = bytes(range(32))
    shares = share_secret(secret, range(5), 3)
    assert join_shares({n: shares[n] for n in (4, 0, 2)}, 3) == secret
    assert join_shares(shares, 3) == secret
    with pytest.raises(ValueError, match="2 shares do not make a secret"):
        join_shares({n: shares[n] for n in (0, 1)}, 3)
    with pytest.raises(ValueError, match="do not make a secret"):  # with two, any secret is as likely
        join_shares({n: shares[n] for n in (0, 1)}, 2)


def test_shares_of_another_secret_than_was_committed_to_are_found_for_all_at_once() -> None:
    everyone = parties()
    keys = {n: party.public_keys() for n, party in everyone.items()}
    false = share_secret(bytes(31) + b"\x07", range(NUM), THRESHOLD)
    seeds = {of: share_secret(everyone[of]._seed, range(NUM), THRESHOLD) for of in range(1, NUM)}
    seeds[4], seeds[5] = false, dict.fromkeys(range(NUM), b"")
    revealed = {n: Revealed({of: own[n] for of, own in seeds.items()}, {0: false[n]}) for n in range(1, NUM)}
    with pytest.raises(Unrecoverable) as raised:
        unmask(np.zeros(LENGTH, np.uint64), range(1, NUM), [0], keys, revealed, THRESHOLD, CONTEXT)
    reason = "its shares do not make the secret that it committed to"
    few = "0 of its shares could be opened; expected at least 6"
    assert raised.value.reasons == {0: reason, 4: reason, 5: few}
