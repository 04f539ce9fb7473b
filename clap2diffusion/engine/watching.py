"""How busy the device of a run is, and where the time of its loop goes.

At log steps alone: a GPU's driver is asked by its library NVML (package nvidia-ml-py), on a CPU the operating
system. Where there is no such package, driver or figure, its field is missing, and nothing is said. No torch
at the top: tools/watch.py asks the driver too."""

import math
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

TEMPERATURE_GPU, UTILIZATION_SAMPLES = 0, 1  # NVML's numbers
BUSY_PERCENT = 70  # a device that is busy less than this share of the time sits idle
MOST_WAITING = 0.3  # share of the time that a loop may wait for its loader; where no driver can be asked
# what a loop does: its name in a sentence, and what helps where the device waits for it
PARTS = {"loader": ("the loader", "more --workers, or --cache-dir on a faster disk"),
         "validation": ("validation",
                        "a larger --val-batch-size, fewer --val-clips, or a higher --validate-every"),
         "saves": ("saves", "a higher --save-every, or --run on a faster disk"),
         "samples": ("sample pictures", "a higher --sample-every"),
         "steps": ("steps too small to fill it, so that it waits for the host",
                   "a larger --batch-size, or --compile")}


class Driver:
    """NVML while it answers. What it cannot tell of a device is missing from what it returns."""

    def __init__(self):
        """Raises ImportError: the package nvidia-ml-py, the driver or its library is not there."""
        import pynvml
        self.nvml = pynvml
        # a driver that is too old lacks functions; a package that is too old lacks names
        self.errors = pynvml.NVMLError, AttributeError
        try:
            pynvml.nvmlInit()
        except self.errors as error:
            raise ImportError(f"NVML does not answer ({error})") from None

    def ask(self, name: str, *args):
        """What nvml<name> returns, None where it fails."""
        try:
            return getattr(self.nvml, f"nvml{name}")(*args)
        except self.errors:
            return None

    def handles(self) -> list:
        """Those of all GPUs."""
        count = self.ask("DeviceGetCount") or 0
        every = (self.ask("DeviceGetHandleByIndex", index) for index in range(count))
        return [handle for handle in every if handle is not None]

    def handle_of(self, index: int):
        """That of torch's device `index`, None if the driver does not know it. torch counts those that
        CUDA_VISIBLE_DEVICES leaves, in CUDA's order; the driver counts all, in that of the bus. So it is
        found by what names it: a slice of a GPU (MIG) by the variable, a whole one by its UUID or its place
        on the PCI bus."""
        import torch
        properties = torch.cuda.get_device_properties(index)
        visible = [one.strip() for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
        names = [visible[index]] if index < len(visible) and visible[index].startswith("MIG-") else []
        if uuid := getattr(properties, "uuid", ""):
            names += [f"MIG-{uuid}", f"GPU-{uuid}"]
        for name in names:
            if (handle := self.ask("DeviceGetHandleByUUID", name)) is not None:
                return handle
        with suppress(AttributeError):  # an older torch does not tell it
            place = (f"{properties.pci_domain_id:08X}:{properties.pci_bus_id:02X}:"
                     f"{properties.pci_device_id:02X}.0")
            return self.ask("DeviceGetHandleByPciBusId", place)
        return None

    def name(self, handle) -> str:
        name = self.ask("DeviceGetName", handle) or "GPU"
        return name.decode() if isinstance(name, bytes) else name

    def read(self, handle) -> dict[str, float]:
        """gpu_percent, busy in the driver's last sample of a sixth to one second; gpu_memory_mb that all
        processes hold of gpu_memory_total_mb; gpu_watts; gpu_celsius."""
        rates, memory = (self.ask(f"DeviceGet{what}", handle) for what in ("UtilizationRates", "MemoryInfo"))
        watts = self.ask("DeviceGetPowerUsage", handle)  # milliwatts
        celsius = self.ask("DeviceGetTemperature", handle, TEMPERATURE_GPU)
        found = {"gpu_percent": rates and rates.gpu, "gpu_memory_mb": memory and memory.used / 2 ** 20,
                 "gpu_memory_total_mb": memory and memory.total / 2 ** 20,
                 "gpu_watts": None if watts is None else watts / 1000, "gpu_celsius": celsius}
        most = {"gpu_percent": 100, "gpu_watts": 10_000, "gpu_celsius": 200}  # more says: not known
        return {key: round(float(value), 1) for key, value in found.items()
                if value is not None and value <= most.get(key, math.inf)}


class GpuMeter:
    """The GPU of a run. `about` says which one, and what gpu_percent is: where the driver keeps samples, the
    mean of those since the log line before, else the driver's last, of a sixth of a second to one second."""

    def __init__(self, index: int):
        """index: torch's. Raises ImportError: the driver is not there, or does not know the device."""
        self.driver = Driver()
        self.handle = self.driver.handle_of(index)
        if self.handle is None:
            raise ImportError(f"NVML does not know CUDA device {index}")
        self.seen = 0  # time of the newest sample, microseconds
        self.averages = self._samples() is not None
        how = "the mean since the log line before" if self.averages else "what the driver saw last"
        self.about = f"{self.driver.name(self.handle)}; gpu_percent is {how}"

    def _samples(self) -> list[int] | None:
        """Percent busy since the last call, as far back as the driver keeps it; None: it keeps nothing."""
        found = self.driver.ask("DeviceGetSamples", self.handle, UTILIZATION_SAMPLES, self.seen)
        if found is None:
            return None
        new = [one for one in found[1] if one.timeStamp > self.seen and one.sampleValue.uiVal <= 100]
        self.seen = max([self.seen, *(one.timeStamp for one in new)])
        return [one.sampleValue.uiVal for one in new]

    def restart(self) -> None:
        if self.averages:
            self._samples()

    def read(self) -> dict[str, float]:
        """See Driver.read()."""
        found, samples = self.driver.read(self.handle), self._samples() if self.averages else None
        found.pop("gpu_memory_total_mb", None)
        if samples:  # none where two lines are less than a sample apart
            found["gpu_percent"] = round(sum(samples) / len(samples), 1)
        return found


class CpuMeter:
    """The processors that this process and its loader's processes keep busy; 100 percent are one of them."""

    about = ""  # the log says already that it is a CPU

    def __init__(self):
        self.restart()

    def _now(self) -> tuple[float, float]:
        """Wall and processor seconds. A child's count while it lives, and after it was waited for."""
        ended = os.times()
        seconds = time.process_time() + ended.children_user + ended.children_system
        for child in multiprocessing.active_children():
            with suppress(OSError, IndexError, ValueError):  # it has just ended, or there is no /proc
                stat = Path(f"/proc/{child.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
                seconds += (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), seconds

    def restart(self) -> None:
        self._before = self._now()

    def read(self) -> dict[str, float]:
        """cpu_percent since the last call."""
        now, before = self._now(), self._before
        self._before = now
        if now[0] == before[0]:
            return {}
        return {"cpu_percent": round(max(0.0, 100 * (now[1] - before[1]) / (now[0] - before[0])), 1)}


class NoMeter:
    """A GPU whose driver cannot be asked."""

    about = ""

    def restart(self) -> None:
        pass

    def read(self) -> dict[str, float]:
        return {}


def open_meter(device):
    """What tells how busy a torch.device is."""
    if device.type != "cuda":
        return CpuMeter()
    try:
        return GpuMeter(device.index or 0)
    except ImportError:
        return NoMeter()


class Watch:
    """What a run's loop spends its time on, and how busy its device is meanwhile; from log step to log step,
    and over the steps between two validations. Nothing of it is saved: a resumed run begins to count anew."""

    def __init__(self, meter):
        self.meter, self._from_step, self._to_step = meter, None, 0
        self._at, self._spent = time.perf_counter(), dict.fromkeys(PARTS, 0.0)  # since the last log step
        self._periods: list[tuple[dict, dict]] = []  # seconds of each part, what the meter read

    def restart(self) -> None:
        """The loop begins."""
        self.meter.restart()
        self._at, self._spent = time.perf_counter(), dict.fromkeys(PARTS, 0.0)

    def lap(self, part: str) -> None:
        """The time since the last lap went to this part of PARTS."""
        before, self._at = self._at, time.perf_counter()
        self._spent[part] += self._at - before

    def waiting(self, batches: Iterator) -> Iterator:
        """The same batches; the wait for each counts as the loader's."""
        while True:
            self.lap("steps")
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.lap("loader")
            yield batch

    def read(self, step: int) -> dict[str, float]:
        """What the meter tells at a log step, which ends a period."""
        found = self.meter.read()
        if self._from_step is None:  # processes start, kernels are compiled: no sign of what follows
            self._from_step = step
        else:
            self._periods.append((self._spent, found))
        self._to_step, self._spent = step, dict.fromkeys(PARTS, 0.0)
        return found

    def conclude(self) -> str:
        """A line on the log steps since the last call, '' if there were none; it says so, with the likely
        reason, if the device sat idle. A validation counts for the steps that follow it."""
        if not self._periods:
            return ""
        seconds = {part: sum(spent[part] for spent, _ in self._periods) for part in PARTS}
        shares = {part: one / sum(seconds.values()) for part, one in seconds.items()}
        found = {key: _mean(self._periods, key) for _, values in self._periods for key in values}
        self._periods, steps = [], f"steps {self._from_step} to {self._to_step}"
        self._from_step = self._to_step
        times = ", ".join(f"{part} {share:.0%}" for part, share in shares.items() if share >= 0.005)
        return "; ".join(filter(None, (f"{steps}: {describe(found)}", f"time: {times}",
                                       _why_idle(found.get("gpu_percent"), shares))))


def describe(found: dict[str, float]) -> str:
    """What a meter has read, in words; other keys are passed over."""
    form = {"gpu_percent": "GPU {:.0f} % busy", "gpu_memory_mb": "{:,.0f} MB held", "gpu_watts": "{:.0f} W",
            "gpu_celsius": "{:.0f} °C", "cpu_percent": f"CPU {{:.0f}} % of {100 * usable_processors()} %"}
    return ", ".join(text.format(found[key]) for key, text in form.items() if key in found) or "no figures"


def usable_processors() -> int:
    """How many this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _mean(periods: list[tuple[dict, dict]], key: str) -> float:
    """Mean over time of what was read in the periods that have it."""
    found = [(sum(spent.values()), values[key]) for spent, values in periods if key in values]
    return sum(weight * value for weight, value in found) / sum(weight for weight, _ in found)


def _why_idle(gpu_percent: float | None, shares: dict[str, float]) -> str:
    """That a device sits idle, the likely reason, and what helps; '' if one cannot tell that it does."""
    if gpu_percent is None:  # a CPU works in each part; without a driver, only the loader's wait is sure
        device, part = "the device", "loader" if shares["loader"] > MOST_WAITING else ""
    else:
        device, part = "the GPU", max(set(PARTS) - {"steps"}, key=shares.get)
        if gpu_percent >= BUSY_PERCENT:
            part = ""
        elif shares[part] < (1 - gpu_percent / 100) / 2:  # it explains less than half of what is missing
            part = "steps"
    if not part:
        return ""
    name, helps = PARTS[part]
    return f"{device} sits idle, most likely because of {name}; what helps: {helps}"
