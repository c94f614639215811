"""Memory that is allocated on the emulated device, seen by tests."""

from offload.tiers.emulated_device import EmulatedDevice


def allocations(monkeypatch, before=lambda nbytes: None):
    """A list that fills with their bytes; `before` is called with the bytes of each before it is made."""
    taken, allocate = [], EmulatedDevice.allocate

    def noted(self, nbytes):
        before(nbytes)
        taken.append(nbytes)
        return allocate(self, nbytes)

    monkeypatch.setattr(EmulatedDevice, "allocate", noted)
    return taken


def held_at_allocations(monkeypatch, model):
    """A list that fills with the bytes that are on the device at each: what has been allocated, and what of `model` has
    not left for host memory yet."""
    source = {p: p.detach() for p in model.parameters()}  # held, so that nothing else gets their addresses
    held = []

    def note(nbytes):
        left = sum(was.nbytes for parameter, was in source.items() if parameter.data_ptr() == was.data_ptr())
        held.append(sum(taken) + nbytes + left)

    taken = allocations(monkeypatch, note)
    return held
