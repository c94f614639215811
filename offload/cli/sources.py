"""Where `offload plan` and `offload simulate` take models, machines and budgets from."""

from __future__ import annotations

from dataclasses import dataclass, replace

from offload.config import parse_budget, parse_nbytes
from offload.errors import ConfigError
from offload.planner.hardware import Hardware
from offload.planner.plan import Budgets
from offload.planner.workload import Workload
from offload.tiers.device import CUDA_OWN_NBYTES
from offload.tiers.storage import free_nbytes
from offload.tiers.wear import Wear, wear_of


def workload(source: str, tokens_per_sample: int, optimizer: str, moments: str) -> Workload:
    """A shape preset, a model directory or a `config.json`, trained by an optimizer with its moments in `moments`."""
    from offload.cli.optimizers import rule_of
    from offload.profiling.workload import workload_of

    return replace(workload_of(source, tokens_per_sample), rule=rule_of(optimizer, moments))


def hardware(source: str | None, overrides: list[str]) -> Hardware:
    """A named profile, a JSON file or, without either, this machine's own profile; with `field=value` overrides."""
    from offload.planner.hardware import load_hardware
    from offload.profiling.stored import stored_hardware

    if source is None:
        return stored_hardware(tuple(overrides))
    return load_hardware(source, overrides)


@dataclass(frozen=True)
class BudgetTexts:
    """Budgets as the user writes them."""

    device_memory: str
    host_memory: str
    storage: str | None
    written_per_step: str | None
    clips_gradients: bool
    durability: str = "checkpoint"
    directories: tuple[str, ...] = ()
    """What a run would get as --storage: what is free there limits what lies on storage."""

    def of(self, machine: Hardware, work: Workload) -> Budgets:
        """In bytes; percentages count from what `machine` has.

        What of the model stays on a device with memory of its own is taken from that, as a run does.
        """

        def optional(option: str, text: str | None) -> int | None:
            try:
                return None if text is None else parse_nbytes(text)
            except ConfigError as error:
                raise ConfigError(f"{option} {error}") from error

        if self.durability not in ("none", "checkpoint", "step"):
            raise ConfigError(f"--durability {self.durability}: it must be none, checkpoint or step")
        limit = optional("--storage-limit", self.storage)
        if self.directories:
            free = free_nbytes(self.directories)
            limit = free if limit is None else min(limit, free)
        return Budgets(
            device_memory_nbytes=parse_budget(self.device_memory, machine.device_memory_nbytes),
            host_memory_nbytes=parse_budget(self.host_memory, machine.host_memory_nbytes),
            storage_nbytes=limit,
            written_nbytes_per_step=optional("--written-per-step", self.written_per_step),
            clips_gradients=self.clips_gradients,
            durable_steps=self.durability == "step",
            device_own_nbytes=0 if machine.shares_host else CUDA_OWN_NBYTES + work.stays_nbytes,
        )


def worn(machine: Hardware, directories: tuple[str, ...]) -> Hardware:
    """`machine` with what is left of its drives' endurance, where the drives under `directories` say how much is used.

    Raises ConfigError where there are other numbers of drives and directories.
    """
    if not directories:
        return machine
    if len(directories) != len(machine.drives):
        raise ConfigError(
            f"--storage names {len(directories)} directories, the profile {machine.name!r} has "
            f"{len(machine.drives)} drives: name one on each"
        )
    drives = []
    for drive, directory in zip(machine.drives, directories, strict=True):
        wear = wear_of(directory)
        if isinstance(wear, Wear) and drive.endurance_nbytes is not None:
            left = drive.endurance_nbytes * max(1e-6, 1.0 - wear.used_fraction)
            drive = drive.model_copy(update={"endurance_nbytes": left})
        drives.append(drive)
    return machine.model_copy(update={"drives": tuple(drives)})


def fixed_choices(texts: list[str]) -> dict[str, object]:
    """`name=value` choices: whole numbers, fractions, true/false or words. Raises ConfigError when one has no `=`."""
    fixed: dict[str, object] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"--fix {text!r}: write name=value, such as micro_batches=4")
        fixed[name.strip()] = _value(value.strip())
    return fixed


def _value(text: str) -> object:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
