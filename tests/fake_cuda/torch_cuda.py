"""What `torch.cuda` says and does on the device that is none: one stream, on which everything has happened."""

from __future__ import annotations

import contextlib
import time
import types

import torch

DEVICE_NBYTES = 80 << 30


class Event:
    """Recorded is happened."""

    def __init__(self, enable_timing=False, blocking=False, interprocess=False):
        self._at_s, self._is_timed = None, enable_timing

    def record(self, stream=None):
        self._at_s = time.perf_counter()

    def wait(self, stream=None):
        pass

    def query(self):
        return True

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        """Milliseconds, as torch's; only between events that were asked for times."""
        assert self._is_timed
        assert other._is_timed
        return (other._at_s - self._at_s) * 1e3


class Stream:
    """Takes what a stream takes."""

    def __init__(self, device=None, priority=0):
        assert device is None or torch.device(device).type == "cuda"
        self.device = torch.device("cuda", 0)

    def wait_event(self, event):
        assert isinstance(event, Event)

    def wait_stream(self, stream):
        assert isinstance(stream, Stream)

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self):
        pass

    def query(self):
        return True


def install():
    """Put them in place of torch's."""
    default = Stream()
    properties = types.SimpleNamespace(
        total_memory=DEVICE_NBYTES, name="a device that is none", major=9, minor=0, multi_processor_count=132
    )
    replaced = {
        "Event": Event,
        "Stream": Stream,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),  # it draws from the CPU's
        "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)],
        "memory_stats": lambda device=None: {},
        "cudart": lambda: types.SimpleNamespace(
            cudaHostRegister=lambda address, nbytes, flags: 0, cudaHostUnregister=lambda address: 0
        ),
    }
    for name in ("current_stream", "default_stream"):
        replaced[name] = lambda device=None: default
    for name in ("stream", "device", "device_of"):
        replaced[name] = lambda what=None: contextlib.nullcontext()
    for name in ("max_memory_reserved", "max_memory_allocated", "memory_reserved", "memory_allocated"):
        replaced[name] = lambda device=None: 0
    for name in (
        "_lazy_init", "_sleep", "synchronize", "empty_cache", "set_device", "set_rng_state", "reset_peak_memory_stats",
        "set_per_process_memory_fraction",
    ):  # fmt: skip
        replaced[name] = (
            lambda *_args, **_named: None
        )  # one for each: torch's compiler keeps a list of functions
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
