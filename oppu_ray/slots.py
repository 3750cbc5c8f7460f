"""Which user's adapter is in which slot of the bank (it stands inside `inference`).

In: adapters, each under its user and id. Out: slot numbers. A slot in use is never given away; among the others the
least recently used goes first, and only when a checked adapter is at hand to take its place: an unknown or broken
adapter costs nobody a slot.
The decision a reader would question: reading and checking an adapter's files is not done here. It takes milliseconds
and belongs to a loading thread; what happens between two decoding steps is one copy of about 1 MB.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from oppu_ray.adapters import AdapterBank, FittedAdapter

Key = tuple[str, str]  # user id, adapter id


@dataclass
class _Resident:
    slot: int
    adapter: FittedAdapter
    num_holders: int = 0


class AdapterSlots:
    """Reference-counted slots of a bank. Not for use by several threads."""

    def __init__(self, bank: AdapterBank):
        self._bank = bank
        self._free = list(reversed(range(bank.num_slots)))
        self._residents: OrderedDict[Key, _Resident] = OrderedDict()  # least recently used first
        self.num_evictions = 0

    def __len__(self) -> int:
        return len(self._residents)

    def get(self, key: Key) -> FittedAdapter | None:
        """The adapter in its slot, which a waiting request may keep in case the slot is given away meanwhile."""
        resident = self._residents.get(key)
        return resident.adapter if resident else None

    def slot(self, key: Key) -> int:
        """Raises ValueError if the adapter is in no slot."""
        if key not in self._residents:
            raise ValueError(f"adapter {key[1]!r} is not loaded")
        return self._residents[key].slot

    def acquire(self, key: Key, adapter: FittedAdapter) -> int | None:
        """Hold a slot with this adapter until `release`; None if all slots are held by others."""
        resident = self._residents.get(key)
        if resident is None:
            slot = self._take_slot()
            if slot is None:
                return None
            self._bank.place(slot, adapter)
            resident = self._residents[key] = _Resident(slot, adapter)
        self._residents.move_to_end(key)
        resident.num_holders += 1
        return resident.slot

    def release(self, key: Key) -> None:
        """Give one hold back; the adapter stays until its slot is wanted."""
        self._residents[key].num_holders -= 1

    def _take_slot(self) -> int | None:
        if self._free:
            return self._free.pop()
        idle = next((key for key, resident in self._residents.items() if not resident.num_holders), None)
        if idle is None:
            return None
        self.num_evictions += 1
        return self._residents.pop(idle).slot

    def remove(self, key: Key, num_own: int = 0) -> None:
        """Empty an adapter's slot, its memory too, and end the caller's own holds of it.

        Raises:
            ValueError: It is in no slot, or in use by others; nothing has changed then.
        """
        slot = self.slot(key)
        if self._residents[key].num_holders > num_own:
            raise ValueError(f"adapter {key[1]!r} is in use")
        del self._residents[key]
        self._bank.vacate(slot)
        self._free.append(slot)

    def keys(self) -> list[Key]:
        """What is loaded, least recently used first."""
        return list(self._residents)
