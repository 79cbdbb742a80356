"""Many prompts into one sample file: split over processes, merged in order, resumable after any kill.

While it runs, finished samples stand in ``OUT.parts/`` (one file a process, one JSON line a sample with its number);
``OUT`` itself appears, grows or is replaced only when everything is there. A call with ``resume`` goes on from what is
found. Each line of ``OUT`` says under ``settings`` how it was made, so that other settings never go on with it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddlm.files import write_text
from ddlm.launch import read_launch
from ddlm.types import ConfigError, DataError

if TYPE_CHECKING:
    from typing import IO

    from ddlm.lm import DiffusionLM
    from ddlm.prompts import Prompt
    from ddlm.sampling.text import Generated


# A process may have the long texts of a file; one that has died ends the others through torchrun. After 24.8 days the
# milliseconds would not fit into 32 bits.
_LATEST = timedelta(days=20)


@dataclass(frozen=True)
class Process:
    """Which of several processes this is (torchrun's variables)."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def current(cls) -> Process:
        """From the environment (:func:`ddlm.launch.read_launch`)."""
        found = read_launch()
        return cls(found.rank, found.size, found.local_rank)

    def meet(self) -> None:
        """Wait for all processes."""
        if self.world == 1:
            return
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_LATEST)
        dist.barrier()

    def leave(self) -> None:
        """Wait for all processes a last time and part."""
        if self.world > 1:
            import torch.distributed as dist

            self.meet()
            dist.destroy_process_group()


def check_target(path: Path) -> None:
    """Refuse a name under which no file can appear: one rename puts it there, which would replace a device.

    Raises:
        ConfigError: for a folder, a device or a pipe.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: name a file in it")
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is no regular file and is left alone: name a file")


class SampleFile:
    """A sample file in the making.

    Args:
        out: The file.
        expected: Prompt and seed of every sample, in order.
        settings: What shapes the samples, JSON-able, ``steps`` and ``halt`` among it; going on with others is refused.
        process: This process.
        overwrite: Replace what is there, once everything is written.
        resume: Go on with what is there.

    Raises:
        ConfigError: when ``out`` (or its parts) exists and neither flag is given, when both are, when what is there
            was made from other prompts, references, seeds or settings, or when it is no regular file.
    """

    def __init__(
        self,
        out: Path,
        expected: Sequence[tuple[Prompt, int]],
        settings: dict[str, Any],
        process: Process,
        *,
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        if overwrite and resume:
            raise ConfigError("--overwrite and --resume exclude each other: give one of them")
        check_target(out)
        self.out, self.expected, self.process, self.settings = out, expected, process, settings
        self.parts = out.with_name(out.name + ".parts")
        if (out.exists() or self.parts.exists()) and not (overwrite or resume):
            found = out if out.exists() else self.parts
            raise ConfigError(
                f"{found} exists: add --resume to go on with it or --overwrite to start anew"
            )
        if overwrite:
            for part in self.parts.glob("rank-*.jsonl"):
                with part.open("rb") as file:
                    _lock(file, part)
        process.meet()  # everyone has looked before anything changes
        if overwrite and process.rank == 0:
            shutil.rmtree(self.parts, ignore_errors=True)
        process.meet()
        # says, also to a later --resume, that what is in OUT is to be replaced and not gone on with
        anew = self.parts / "anew"
        replaced = overwrite or anew.exists()
        self.before = self._rows_of(out) if out.exists() and not replaced else []
        self._check_rows(dict(enumerate(self.before)), str(out))
        self._check_settings()
        self.done = set(range(len(self.before))) | set(self._read_parts())
        process.meet()  # everyone has read before anyone writes
        if process.rank == 0:
            self.parts.mkdir(parents=True, exist_ok=True)
            if overwrite:
                anew.touch()
            write_text(self.parts / "settings.json", json.dumps(settings, indent=1) + "\n")
        process.meet()

    @property
    def missing(self) -> list[int]:
        """Numbers of the samples still to be written, of all processes."""
        return [i for i in range(len(self.expected)) if i not in self.done]

    @property
    def mine(self) -> list[int]:
        """Numbers of those this process writes: whatever is missing, dealt out in turn."""
        return self.missing[self.process.rank :: self.process.world]

    def write(self, rows: Iterator[tuple[int, dict[str, Any]]]) -> None:
        """Append numbered samples to this process's part as they come; each line is out of our hands at once."""
        path = self.parts / f"rank-{self.process.rank}.jsonl"
        _cut_torn_line(path)
        with path.open("ab", buffering=0) as file:
            _lock(file, path)
            for number, row in rows:
                line = json.dumps({"number": number, "row": row}, ensure_ascii=False)
                file.write(line.encode("utf-8") + b"\n")
            os.fsync(file.fileno())

    def merge(self) -> None:
        """Put all parts together in order, once every process has written its share."""
        self.process.meet()
        if self.process.rank == 0:
            rows = dict(enumerate(self.before))
            for number, row in self._read_parts().items():
                rows[number] = row | {"settings": self.settings}
            missing = len(self.expected) - len(rows)
            if missing:
                raise DataError(
                    f"{missing} samples are missing in {self.parts}: repeat the call with --resume"
                )
            text = "".join(json.dumps(rows[i], ensure_ascii=False) + "\n" for i in sorted(rows))
            write_text(self.out, text)
            # first: a kill while the rest is removed must not leave word that the new file is to be replaced
            (self.parts / "anew").unlink(missing_ok=True)
            shutil.rmtree(self.parts)
        self.process.leave()

    def _check_settings(self) -> None:
        """Compare with the settings of what is there, in the parts and in each line of the file."""
        file = self.parts / "settings.json"
        if file.exists():
            try:
                begun = json.loads(file.read_text("utf-8"))
            except ValueError:
                begun = None
            if not isinstance(begun, dict):
                raise DataError(f"{file} is damaged: --overwrite starts anew")
            self._compare(begun, str(self.parts))
        for number, row in enumerate(self.before, 1):
            where = f"{self.out}, line {number}"
            found = row.get("settings")
            self._compare(found if isinstance(found, dict) else self._told(row), where)

    def _compare(self, found: dict[str, Any], where: str) -> None:
        for k in sorted(found):
            # None: left to the model's default, which nobody wrote down
            if found[k] is not None and found[k] != self.settings.get(k):
                raise ConfigError(
                    f"{where} was made with {k}={found[k]}, now it is {self.settings.get(k)}: "
                    "give the same settings, or --overwrite to start anew"
                )

    def _told(self, row: dict[str, Any]) -> dict[str, Any]:
        """What a line without ``settings`` tells of them by its steps and how it ended, where that cannot be ours."""
        halt, steps, reason = self.settings["halt"], row.get("steps"), row.get("reason")
        if isinstance(reason, str) and reason != "completed" and reason not in halt:
            return {"halt": reason}
        # without early exit each window of a text makes every step; rounds of refinement count as steps of their own
        every = halt == "none" and not self.settings.get("refine")
        if isinstance(steps, int) and every and steps % self.settings["steps"]:
            return {"steps": steps}
        return {}

    def _read_parts(self) -> dict[int, dict[str, Any]]:
        """Finished samples by number; a line that a kill has torn is not finished."""
        rows = {}
        for path in sorted(self.parts.glob("rank-*.jsonl")):
            with path.open("rb") as file:
                _lock(file, path)
                content = file.read()
            for line in content.split(b"\n")[:-1]:
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # damaged: it is written again
                rows[int(entry["number"])] = entry["row"]
        self._check_rows(rows, str(self.parts))
        return rows

    def _rows_of(self, path: Path) -> list[dict[str, Any]]:
        try:
            # at line feeds alone: other ends of lines may stand inside a string
            rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path} is not a sample file ({error}): --overwrite replaces it"
            ) from error
        if not all(isinstance(row, dict) for row in rows):
            raise DataError(f"{path} is not a sample file: --overwrite replaces it")
        return rows

    def _check_rows(self, rows: dict[int, dict[str, Any]], where: str) -> None:
        for number, row in rows.items():
            other = "of other prompts or seeds"
            if number < len(self.expected):
                prompt, seed = self.expected[number]
                if (row.get("prompt"), row.get("seed")) == (prompt.template.text, seed):
                    other = _differs(row, prompt)
            if other:
                raise ConfigError(
                    f"{where} holds a sample {number + 1} {other}: "
                    "give the same ones, or --overwrite to start anew"
                )


def write_samples(
    lm: DiffusionLM,
    prompts: Sequence[Prompt],
    file: SampleFile,
    *,
    samples: int,
    seed: int,
    on_sample: Callable[[Generated], None] | None = None,
    **options: Any,
) -> int:
    """Write what is missing of a sample file; returns how many samples this process wrote.

    Args:
        lm: The model.
        prompts: All prompts.
        file: Made for ``samples`` of each prompt: sample i of prompt j has the number ``j * samples + i``.
        samples: Texts for each prompt.
        seed: The sample with number n has the seed ``seed + n``.
        on_sample: Called after each.
        **options: As for :meth:`ddlm.lm.DiffusionLM.generate`.
    """
    numbers = file.mine

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        templates = [prompts[n // samples].template for n in numbers]
        texts = lm.as_finished(templates, seeds=[seed + n for n in numbers], **options)
        for i, text in texts:  # in whatever order: a kill loses nothing that is finished
            number, row = numbers[i], text.to_row()
            reference = prompts[number // samples].reference
            yield number, row if reference is None else row | {"reference": reference}
            if on_sample is not None:
                on_sample(text)

    file.write(rows())
    file.merge()
    return len(numbers)


def _differs(row: dict[str, Any], prompt: Prompt) -> str:
    """How a sample is of another prompt than this one of the same text; empty where nothing tells that it is.

    Prompts given by their tokens may read the same and still differ.
    """
    noised, kept = prompt.template.is_noised.tolist(), prompt.template.tokens.tolist()
    tokens = row.get("tokens")
    same = tokens is None or (
        isinstance(tokens, list)
        and len(tokens) == len(kept)
        and all(open_ or a == b for a, b, open_ in zip(tokens, kept, noised, strict=True))
    )
    if not same or row.get("is_noised") not in (None, noised):
        return "of a prompt that reads the same in other tokens ('tokens' or 'is_noised' differ)"
    # a sample with its tokens has its reference beside them, if there was one
    told = "reference" in row or tokens is not None
    return "with another reference" if told and row.get("reference") != prompt.reference else ""


def _lock(file: IO[bytes], path: Path) -> None:
    """Hold a part of a sample file while it is open; the lock dies with its process, however that ends.

    Raises:
        ConfigError: when a process that outlived its launcher still writes there.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    mode = fcntl.LOCK_EX if file.writable() else fcntl.LOCK_SH
    try:
        fcntl.flock(file, mode | fcntl.LOCK_NB)
    except OSError as error:
        raise ConfigError(
            f"{path} is still being written by another process: end it, or wait for it"
        ) from error


def _cut_torn_line(path: Path) -> None:
    """Remove an unfinished last line, so that the next one starts a line of its own."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
