"""Sums that nobody sees the parts of: pairwise-masked secure aggregation (Bonawitz et al. 2017, ACM CCS).

In: one vector of integers modulo 2**64 per party. Out, at the server: the sum over the parties that stayed, and nothing
else. Any number of parties down to the threshold may leave at any point. Four messages a party, in this order: public
keys; encrypted shares of its secrets for the others; its masked vector; the shares that take off what did not cancel.

A party commits to its secrets (the mask's public key, a digest of the seed) and to each share of them (a digest beside
the encrypted shares), so the server recognises a false share by itself, and a dealer whose shares do not fit. What
cannot be recognised is a masked vector that was not masked as the protocol says: the sum is then random numbers.

Design: the server is trusted to pass messages on as they are. It learns nothing from what it sees, but one that hands
out false public keys could read a vector: signed keys would need identities that this project does not have. Keys are
made anew for every attempt at a round, so one that failed betrays nothing when it is tried again. One that came to its
sum does, if the driver died before it was kept, or if the server works together with a party that made it fail: trained
again from the same state without one of the other parties, the two sums differ by that party's vector.

Keys, key agreement, streams and authenticated encryption are `cryptography`'s. Shamir's sharing is 25 lines here:
pycryptodome's takes 16-byte secrets and 60 to 270 times as long, `shamirs` as long to join, and neither detects a false
share.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

PRIME = 2**521 - 1
SECRET_BYTES, SHARE_BYTES, NONCE_BYTES, TAG_BYTES, DIGEST_BYTES = 32, 66, 12, 16, 32
MESSAGE_BYTES = 2 * DIGEST_BYTES + NONCE_BYTES + 2 * SHARE_BYTES + TAG_BYTES
"""Of the shares that one party sends another: their digests, which the server reads, and both under encryption."""


class Unrecoverable(ValueError):
    """The secrets of some parties cannot be recovered; `reasons` says why, by party."""

    def __init__(self, reasons: Mapping[int, str]):
        super().__init__("; ".join(f"party {party}: {reason}" for party, reason in sorted(reasons.items())))
        self.reasons = dict(reasons)


@dataclass(frozen=True)
class PublicKeys:
    """A party's two X25519 keys (one agrees on masks, one encrypts shares), and a digest of its own mask's seed."""

    mask: bytes
    cipher: bytes
    seed: bytes


@dataclass(frozen=True)
class Revealed:
    """One party's shares, by whose they are: of the own mask's seed for who stayed, of the mask key for who left.

    A share is empty where the party could not open what it was sent.
    """

    seeds: dict[int, bytes]
    keys: dict[int, bytes]


class Party:
    """One party's side of one attempt at one sum.

    Args:
        number: The party's, unique and at least 0.
        context: Names the attempt; goes into every derived key.
    """

    def __init__(self, number: int, context: bytes):
        self.number, self.context = number, context
        self._mask_key, self._cipher_key = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        self._seed = secrets.token_bytes(SECRET_BYTES)
        self._peers: dict[int, PublicKeys] = {}
        self._threshold = 0
        self._held: dict[int, tuple[bytes, bytes]] = {}
        self._has_masked = self._has_revealed = False

    def public_keys(self) -> PublicKeys:
        return PublicKeys(
            _public(self._mask_key), _public(self._cipher_key), _digest(self._seed, "seed", self.number, self.context)
        )

    def share(self, peers: Mapping[int, PublicKeys], threshold: int) -> dict[int, bytes]:
        """Deal shares of this party's secrets to each of `peers` (itself among them): digests and encrypted shares.

        Raises:
            ValueError: The threshold would let a server learn a vector, or cannot be met, or this party is not a peer.
        """
        if not len(peers) < 2 * threshold <= 2 * len(peers):
            raise ValueError(
                f"the threshold is {threshold} of {len(peers)} parties; expected more than half, at most all"
            )
        if peers.get(self.number) != self.public_keys():
            raise ValueError(f"party {self.number} is not among the peers with its own keys")
        self._peers, self._threshold = dict(peers), threshold
        seeds = share_secret(self._seed, peers, threshold)
        keys = share_secret(self._mask_key.private_bytes_raw(), peers, threshold)
        return {peer: self._seal(peer, seeds[peer], keys[peer]) for peer in peers}

    def mask(self, vector: np.ndarray, inbox: Mapping[int, bytes]) -> np.ndarray:
        """Put the vector under this party's own mask and those it has in common with everyone in `inbox`.

        Shares that do not open, or are not those of their digests, are not held: `reveal` then has none to show.

        Args:
            vector: uint64.
            inbox: Sender -> shares dealt to this party; a party without an entry is left out of the sum.

        Raises:
            ValueError: Too few senders, an unknown one, or a second vector.
        """
        if self._has_masked:
            raise ValueError(f"party {self.number} has masked a vector; expected one vector per attempt")
        if len(inbox) < self._threshold or not inbox.keys() <= self._peers.keys() or self.number not in inbox:
            raise ValueError(
                f"party {self.number} has shares of {sorted(inbox)}; expected {self._threshold} of its peers"
            )
        self._held = {sender: self._open(sender, message) for sender, message in inbox.items()}
        self._has_masked = True
        masked = vector + _own_mask(self._seed, self.context, len(vector))
        for peer in sorted(inbox.keys() - {self.number}):
            mask = _common_mask(self._mask_key, self._peers[peer].mask, self.context, len(vector))
            masked = masked + mask if self.number < peer else masked - mask
        return masked

    def reveal(self, stayed: Collection[int]) -> Revealed:
        """Show shares of the seeds of those who stayed, and of the mask keys of those who left; never both of anyone.

        Raises:
            ValueError: Fewer stayed than the threshold, someone unknown did, or it is asked a second time.
        """
        if self._has_revealed or not self._has_masked:
            raise ValueError(f"party {self.number} reveals shares once, after its masked vector")
        if len(set(stayed)) < self._threshold or not set(stayed) <= self._held.keys():
            raise ValueError(f"{sorted(stayed)} stayed; expected at least {self._threshold} of {sorted(self._held)}")
        self._has_revealed = True
        return Revealed(
            {peer: seed for peer, (seed, _) in self._held.items() if peer in stayed},
            {peer: key for peer, (_, key) in self._held.items() if peer not in stayed},
        )

    def _seal(self, peer: int, seed: bytes, key: bytes) -> bytes:
        nonce, route = secrets.token_bytes(NONCE_BYTES), _route(self.number, peer)
        digests = share_digest("seed", seed, self.number, peer) + share_digest("key", key, self.number, peer)
        return digests + nonce + self._cipher(peer).encrypt(nonce, seed + key, route)

    def _open(self, sender: int, message: bytes) -> tuple[bytes, bytes]:
        """The shares of a sender's seed and mask key; empty if they are not what the sender committed to."""
        content = message[2 * DIGEST_BYTES :]
        try:
            nonce, route = content[:NONCE_BYTES], _route(sender, self.number)
            shares = self._cipher(sender).decrypt(nonce, content[NONCE_BYTES:], route)
        except InvalidTag:
            return b"", b""
        seed, key = shares[:SHARE_BYTES], shares[SHARE_BYTES:]
        digests = share_digest("seed", seed, sender, self.number), share_digest("key", key, sender, self.number)
        return (seed, key) if digests == dealt_digests(message) else (b"", b"")

    def _cipher(self, peer: int) -> ChaCha20Poly1305:
        common = self._cipher_key.exchange(X25519PublicKey.from_public_bytes(self._peers[peer].cipher))
        return ChaCha20Poly1305(derive(common, b"share", self.context))


def unmask(
    total: np.ndarray,
    stayed: Collection[int],
    left: Collection[int],
    keys: Mapping[int, PublicKeys],
    revealed: Mapping[int, Revealed],
    threshold: int,
    context: bytes,
) -> np.ndarray:
    """The server's last step: the sum of masked vectors -> the sum of the vectors of those who stayed.

    Args:
        total: The sum, modulo 2**64, of the masked vectors of `stayed`.
        left: Those who shared their secrets but sent no masked vector.
        keys: Everybody's public keys.
        revealed: What at least `threshold` of `stayed` revealed, by party; each share empty, or that of its digest.

    Raises:
        ValueError: Too few revealed.
        Unrecoverable: The shares that some parties dealt do not make the secrets that they committed to.
    """
    if len(revealed) < threshold:
        raise ValueError(f"{len(revealed)} parties revealed their shares; expected at least {threshold}")
    found, reasons = dict[int, bytes](), dict[int, str]()
    for party in sorted({*stayed, *left}):
        kind = "seeds" if party in stayed else "keys"
        shares = {by: share for by, one in revealed.items() if (share := getattr(one, kind)[party])}
        if len(shares) < threshold:
            reasons[party] = f"{len(shares)} of its shares could be opened; expected at least {threshold}"
            continue
        try:
            found[party] = join_shares(shares, threshold)
        except ValueError as error:
            reasons[party] = str(error)
            continue
        if kind == "seeds":
            is_committed = _digest(found[party], "seed", party, context) == keys[party].seed
        else:
            is_committed = _public(X25519PrivateKey.from_private_bytes(found[party])) == keys[party].mask
        if not is_committed:
            reasons[party] = "its shares do not make the secret that it committed to"
    if reasons:
        raise Unrecoverable(reasons)
    for party in sorted(stayed):
        total = total - _own_mask(found[party], context, len(total))
    for party in sorted(left):
        key = X25519PrivateKey.from_private_bytes(found[party])
        for peer in sorted(stayed):
            mask = _common_mask(key, keys[peer].mask, context, len(total))
            total = total - mask if peer < party else total + mask
    return total


def check_public_key(key: bytes) -> None:
    """Refuse an X25519 key of low order: an exchange with it raises, at whoever tries.

    Raises:
        ValueError: It is one.
    """
    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(key))
    except ValueError:
        raise ValueError(f"the public key {key.hex()[:16]}... is of low order; expected an X25519 key") from None


def dealt_digests(message: bytes) -> tuple[bytes, bytes]:
    """What the dealer of one of `Party.share`'s messages commits to: the digests of the seed's share and the key's."""
    return message[:DIGEST_BYTES], message[DIGEST_BYTES : 2 * DIGEST_BYTES]


def share_digest(kind: str, share: bytes, dealer: int, receiver: int) -> bytes:
    """SHA-256 of one share; `kind` is "seed" or "key". A share is a random number below 2**521, so this hides it."""
    return _digest(share, kind, "share", _route(dealer, receiver))


def share_secret(secret: bytes, parties: Collection[int], threshold: int) -> dict[int, bytes]:
    """Shamir's sharing: any `threshold` shares give the secret, fewer say nothing about it."""
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    shares = {}
    for party in parties:
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * (party + 1) + coefficient) % PRIME
        shares[party] = value.to_bytes(SHARE_BYTES, "big")
    return shares


def join_shares(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret of `share_secret`. ValueError if the shares are of no 32-byte secret."""
    used = sorted(shares)[:threshold]
    secret = 0
    for party in used:
        top = bottom = 1
        for other in used:
            if other != party:
                top = top * (other + 1) % PRIME
                bottom = bottom * (other - party) % PRIME
        secret += int.from_bytes(shares[party], "big") * top * pow(bottom, -1, PRIME)
    secret %= PRIME
    if len(used) < threshold or secret >= 256**SECRET_BYTES:
        raise ValueError(f"{len(shares)} shares do not make a secret; expected {threshold} of one secret")
    return secret.to_bytes(SECRET_BYTES, "big")


def derive(secret: bytes, purpose: bytes, context: bytes) -> bytes:
    """A 32-byte key for one purpose (HKDF with SHA-256)."""
    return HKDF(hashes.SHA256(), 32, salt=None, info=b"oppu-ray " + purpose + b" " + context).derive(secret)


def stream(key: bytes, num_bytes: int) -> bytes:
    """ChaCha20's output under a key that is used for nothing else."""
    return Cipher(ChaCha20(key, bytes(16)), None).encryptor().update(bytes(num_bytes))


def _own_mask(seed: bytes, context: bytes, length: int) -> np.ndarray:
    return np.frombuffer(stream(derive(seed, b"own mask", context), 8 * length), np.uint64)


def _common_mask(key: X25519PrivateKey, peer: bytes, context: bytes, length: int) -> np.ndarray:
    common = key.exchange(X25519PublicKey.from_public_bytes(peer))
    return np.frombuffer(stream(derive(common, b"common mask", context), 8 * length), np.uint64)


def _public(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def _digest(content: bytes, *purpose: object) -> bytes:
    return hashlib.sha256(repr(purpose).encode() + content).digest()


def _route(sender: int, receiver: int) -> bytes:
    return f"{sender} to {receiver}".encode()
