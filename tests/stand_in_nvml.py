"""A stand-in for the module pynvml (nvidia-ml-py): three GPUs, of which the second has a slice (MIG).

FAILS names functions that the driver has not; CALLS counts those that were asked."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace as Of

FAILS: set[str] = set()
CALLS: Counter = Counter()
PERCENT = [20, 40, 60]  # the samples since the last question
UUIDS = {"GPU-aaaa": 0, "GPU-bbbb": 1, "GPU-cccc": 2, "MIG-bbbb-1": 11}
BUSES = {"00000000:3B:00.0": 2}


class NVMLError(Exception):
    pass


def asked(name: str, value=None, known: bool = True):
    CALLS[name] += 1
    if name in FAILS or not known:
        raise NVMLError("Not Supported")
    return value


def nvmlInit() -> None:
    asked("Init")


def nvmlDeviceGetCount() -> int:
    return asked("DeviceGetCount", 3)


def nvmlDeviceGetHandleByIndex(index: int) -> int:
    return asked("DeviceGetHandleByIndex", index)


def nvmlDeviceGetHandleByUUID(uuid: str) -> int:
    return asked("DeviceGetHandleByUUID", UUIDS.get(uuid), uuid in UUIDS)


def nvmlDeviceGetHandleByPciBusId(place: str) -> int:
    return asked("DeviceGetHandleByPciBusId", BUSES.get(place), place in BUSES)


def nvmlDeviceGetName(handle: int) -> str:
    return asked("DeviceGetName", f"Stand-in {handle}")


def nvmlDeviceGetUtilizationRates(handle: int):
    return asked("DeviceGetUtilizationRates", Of(gpu=99, memory=1))


def nvmlDeviceGetMemoryInfo(handle: int):
    return asked("DeviceGetMemoryInfo", Of(used=(3 + handle) * 2 ** 30, total=80 * 2 ** 30))


def nvmlDeviceGetPowerUsage(handle: int) -> int:
    return asked("DeviceGetPowerUsage", 312_500)  # milliwatts


def nvmlDeviceGetTemperature(handle: int, sensor: int) -> int:
    assert sensor == 0
    return asked("DeviceGetTemperature", 64)


def nvmlDeviceGetSamples(handle: int, kind: int, seen: int):
    """The buffer also holds what was seen before, as a driver's may, and a value that says nothing."""
    assert kind == 1
    old = [Of(timeStamp=seen, sampleValue=Of(uiVal=0))] * (seen > 0)
    odd = [Of(timeStamp=seen + 9, sampleValue=Of(uiVal=4_294_967_295))]
    new = [Of(timeStamp=seen + number, sampleValue=Of(uiVal=value))
           for number, value in enumerate(PERCENT, 1)]
    return asked("DeviceGetSamples", (1, [*old, *new, *odd]))
