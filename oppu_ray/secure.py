"""Sums that nobody sees the parts of: pairwise-masked secure aggregation (Bonawitz et al. 2017, ACM CCS).

In: one vector of integers modulo 2**64 per party. Out, at the server: the sum over the parties that stayed, and nothing
else. Any number of parties down to the threshold may leave at any point. Four messages a party, in this order: public
keys; encrypted shares of its secrets for the others; its masked vector; the shares that take off what did not cancel.

The decision a reader would question: the server is trusted to pass messages on as they are. It learns nothing from
what it sees, but one that hands out false public keys could read a vector: signed keys would need identities that this
project does not have. Keys are made anew for every attempt at a round, so one that failed betrays nothing when it is
tried again. One that came to its sum does, if the driver died before it was kept: trained again from the same state
without one of the parties, the two sums differ by that party's vector.

Keys, key agreement, streams and authenticated encryption are `cryptography`'s; sharing a secret is arithmetic.
"""

from __future__ import annotations

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
SECRET_BYTES, SHARE_BYTES, NONCE_BYTES = 32, 66, 12


@dataclass(frozen=True)
class PublicKeys:
    """A party's two X25519 keys: one agrees on masks, one encrypts shares."""

    mask: bytes
    cipher: bytes


@dataclass(frozen=True)
class Revealed:
    """One party's shares, by whose they are: of the own mask's seed for who stayed, of the mask key for who left."""

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
        return PublicKeys(_public(self._mask_key), _public(self._cipher_key))

    def share(self, peers: Mapping[int, PublicKeys], threshold: int) -> dict[int, bytes]:
        """Shares of this party's secrets, encrypted for each of `peers` (itself among them).

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
        return {peer: self._encrypt(peer, seeds[peer] + keys[peer]) for peer in peers}

    def mask(self, vector: np.ndarray, inbox: Mapping[int, bytes]) -> np.ndarray:
        """The vector under this party's own mask and those it has in common with everyone in `inbox`.

        Args:
            vector: uint64.
            inbox: Sender -> shares encrypted for this party; who is not in it is not in the sum.

        Raises:
            ValueError: Too few senders, an unknown one, a message that was changed on the way, or a second vector.
        """
        if self._has_masked:
            raise ValueError(f"party {self.number} has masked a vector; expected one vector per attempt")
        if len(inbox) < self._threshold or not inbox.keys() <= self._peers.keys() or self.number not in inbox:
            raise ValueError(
                f"party {self.number} has shares of {sorted(inbox)}; expected {self._threshold} of its peers"
            )
        for sender, message in inbox.items():
            shares = self._decrypt(sender, message)
            self._held[sender] = shares[:SHARE_BYTES], shares[SHARE_BYTES:]
        self._has_masked = True
        masked = vector + _own_mask(self._seed, self.context, len(vector))
        for peer in sorted(self._held.keys() - {self.number}):
            mask = _common_mask(self._mask_key, self._peers[peer].mask, self.context, len(vector))
            masked = masked + mask if self.number < peer else masked - mask
        return masked

    def reveal(self, stayed: Collection[int]) -> Revealed:
        """Shares of the seeds of those who stayed, and of the mask keys of those who left; never both of anyone.

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

    def _encrypt(self, peer: int, content: bytes) -> bytes:
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + self._cipher(peer).encrypt(nonce, content, _route(self.number, peer))

    def _decrypt(self, sender: int, message: bytes) -> bytes:
        nonce, content = message[:NONCE_BYTES], message[NONCE_BYTES:]
        try:
            return self._cipher(sender).decrypt(nonce, content, _route(sender, self.number))
        except InvalidTag as error:
            raise ValueError(f"party {self.number}: the shares from party {sender} were changed on the way") from error

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
        revealed: What at least `threshold` of `stayed` revealed, by party.

    Raises:
        ValueError: Too few revealed, or what they revealed does not fit the public keys.
    """
    if len(revealed) < threshold:
        raise ValueError(f"{len(revealed)} parties revealed their shares; expected at least {threshold}")
    for party in sorted(stayed):
        seed = join_shares({by: one.seeds[party] for by, one in revealed.items()}, threshold)
        total = total - _own_mask(seed, context, len(total))
    for party in sorted(left):
        secret = join_shares({by: one.keys[party] for by, one in revealed.items()}, threshold)
        key = X25519PrivateKey.from_private_bytes(secret)
        if _public(key) != keys[party].mask:
            raise ValueError(f"the shares of party {party}'s key do not fit its public key")
        for peer in sorted(stayed):
            mask = _common_mask(key, keys[peer].mask, context, len(total))
            total = total - mask if peer < party else total + mask
    return total


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


def _route(sender: int, receiver: int) -> bytes:
    return f"{sender} to {receiver}".encode()
