"""GLUE: the tasks, their columns, labels, splits and metrics, and reading them from the hub or a folder.

The tasks of Wang et al. 2018 (arXiv 1804.07461) in the columns and label ids of the Hugging Face data set
``nyu-mll/glue``. A score is a GLUE score only when every split has GLUE's own size; anything less is a subset and is
reported under another name (``qqp-subset``).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddlm.types import ConfigError, DataError

HUB_ID = "nyu-mll/glue"
BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
NLI = ("entailment", "neutral", "contradiction")


@dataclass(frozen=True)
class Task:
    """One task of GLUE.

    Attributes:
        name: As on the command line and in the data set.
        title: As in the paper's tables and GLUE's file names.
        columns: One text column or a pair of them.
        labels: Strings of the classes as GLUE's server wants them, in the order of their ids; empty: a regression.
        metrics: In the order they are printed; the first decides which epoch and setting is best.
        sizes: Examples of each of GLUE's splits.
        epochs: Of fine-tuning (DDLM, section 4.2).
    """

    name: str
    title: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    sizes: Mapping[str, int]
    epochs: int = 10

    @property
    def is_regression(self) -> bool:
        """STS-B predicts a similarity from 0 to 5."""
        return not self.labels

    @property
    def validation_splits(self) -> tuple[str, ...]:
        """Splits the metric is computed on; the first one decides."""
        return tuple(s for s in self.sizes if s.startswith("validation"))

    @property
    def test_splits(self) -> tuple[str, ...]:
        """Splits without labels, for GLUE's server."""
        return tuple(s for s in self.sizes if s.startswith("test"))


def _sizes(train: int, validation: int, test: int) -> dict[str, int]:
    return {"train": train, "validation": validation, "test": test}


_PAIR = ("sentence1", "sentence2")
_MNLI_SIZES = {
    "train": 392_702,
    "validation_matched": 9_815,
    "validation_mismatched": 9_832,
    "test_matched": 9_796,
    "test_mismatched": 9_847,
}
_ACC, _BOTH = ("accuracy",), ("accuracy", "f1")

TASKS: dict[str, Task] = {
    t.name: t
    for t in (
        Task("cola", "CoLA", ("sentence",), BINARY, ("matthews",), _sizes(8_551, 1_043, 1_063)),
        Task("sst2", "SST-2", ("sentence",), BINARY, _ACC, _sizes(67_349, 872, 1_821)),
        Task("mrpc", "MRPC", _PAIR, BINARY, _BOTH, _sizes(3_668, 408, 1_725)),
        Task(
            "qqp",
            "QQP",
            ("question1", "question2"),
            BINARY,
            _BOTH,
            _sizes(363_846, 40_430, 390_965),
        ),
        Task("mnli", "MNLI", ("premise", "hypothesis"), NLI, _ACC, _MNLI_SIZES),
        Task(
            "qnli",
            "QNLI",
            ("question", "sentence"),
            ENTAILMENT,
            _ACC,
            _sizes(104_743, 5_463, 5_463),
        ),
        Task("rte", "RTE", _PAIR, ENTAILMENT, _ACC, _sizes(2_490, 277, 3_000), epochs=20),
        Task(
            "stsb",
            "STS-B",
            _PAIR,
            (),
            ("pearson_spearman", "pearson", "spearman"),
            _sizes(5_749, 1_500, 1_379),
        ),
        Task("wnli", "WNLI", _PAIR, BINARY, _ACC, _sizes(635, 71, 146)),
    )
}


def find_tasks(name: str) -> list[Task]:
    """``"all"`` or one task by name.

    Raises:
        ConfigError: with the list of tasks.
    """
    if name == "all":
        return list(TASKS.values())
    if name not in TASKS:
        raise ConfigError(f"unknown task '{name}': choose one of {', '.join(TASKS)} or all")
    return [TASKS[name]]


@dataclass(frozen=True)
class Split:
    """Examples of one split, column by column.

    Attributes:
        texts: One list for a single text, two for a pair.
        labels: Class ids or values; -1 where the label is hidden (test).
        index: Position in GLUE's file, for the submission.
    """

    texts: tuple[list[str], ...]
    labels: list[float]
    index: list[int]

    def __len__(self) -> int:
        return len(self.labels)

    def sha256(self) -> str:
        """Hash of texts and labels in their order: equal for equal data."""
        digest = hashlib.sha256()
        for row in zip(*self.texts, self.labels, strict=True):
            digest.update(json.dumps(row).encode() + b"\n")
        return digest.hexdigest()

    def head(self, count: int | None) -> Split:
        """The first ``count`` examples."""
        return Split(tuple(t[:count] for t in self.texts), self.labels[:count], self.index[:count])

    def where(self, keep: Sequence[bool]) -> Split:
        """The examples marked True."""
        chosen = [i for i, k in enumerate(keep) if k]
        return Split(
            tuple([t[i] for i in chosen] for t in self.texts),
            [self.labels[i] for i in chosen],
            [self.index[i] for i in chosen],
        )


@dataclass(frozen=True)
class GlueData:
    """The splits of a task and whether they are GLUE's own.

    Attributes:
        differences: Why this is not GLUE (empty when it is): one phrase for each split that is not whole.
    """

    task: Task
    splits: dict[str, Split]
    differences: list[str] = field(default_factory=list)

    @property
    def is_glue(self) -> bool:
        """True when a metric on this data is a GLUE score."""
        return not self.differences

    @property
    def report_name(self) -> str:
        """Name a score on this data goes by."""
        return self.task.name if self.is_glue else f"{self.task.name}-subset"


def read_task(task: Task, source: str | Path | None, limit: int | None = None) -> GlueData:
    """Read a task from the hub (``source`` None) or from a folder ``<source>/<task>/<split>.jsonl[.gz]``.

    A file ``<split>_subset.jsonl[.gz]`` stands in for a missing split. A folder without a training split but with a
    validation split (QNLI here) is divided by a hash of the first text, four fifths for training. Both are subsets.

    Args:
        task: Which task.
        source: Folder, or None for the Hugging Face data set ``nyu-mll/glue``.
        limit: Keep only the first examples of the training split (which makes it a subset).

    Raises:
        DataError: for missing files or columns and labels out of range, naming file and line.
        ConfigError: when the hub cannot be reached or its library is missing.
    """
    folder = None if source is None else Path(source) / task.name
    if folder is not None and not folder.is_dir():
        raise DataError(
            f"{folder} is not there: --data needs a folder with one folder for each task"
        )
    splits = {}
    for name in task.sizes:
        split = _from_hub(task, name) if folder is None else _from_folder(task, name, folder)
        if split is not None:
            splits[name] = split
    main = task.validation_splits[0]
    if main not in splits:
        raise DataError(f"{folder} has no {main}.jsonl.gz and no {main}_subset.jsonl.gz")
    differences = []
    if "train" not in splits:
        differences.append("no training split: the validation split is divided 4 to 1")
        splits["train"], splits[main] = _divide(splits[main])
    if limit is not None:
        splits["train"] = splits["train"].head(limit)
    for name in ("train", *task.validation_splits):
        have = len(splits[name]) if name in splits else 0
        if have != task.sizes[name]:
            differences.append(f"{name} has {have:,} of GLUE's {task.sizes[name]:,} examples")
    for name in task.validation_splits:
        if name in splits:
            _check_metric_defined(task, splits[name], f"{task.name} {name}")
    if not splits["train"]:
        raise DataError(f"{task.name}: the training split is empty")
    return GlueData(task, splits, differences)


def _from_hub(task: Task, split: str) -> Split:
    try:
        import datasets
    except ImportError:
        raise ConfigError("GLUE from the hub needs an extra: pip install 'ddlm[glue]'") from None
    try:
        rows = datasets.load_dataset(HUB_ID, task.name, split=split)
    except Exception as error:  # the hub's and the library's errors have many unrelated bases
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{HUB_ID} could not be read from the hub ({reason}): name a local folder with --data"
        ) from None
    columns = {name: rows[name] for name in rows.column_names}
    missing = [c for c in (*task.columns, "label") if c not in columns]
    if missing:
        raise DataError(f"{HUB_ID} {task.name} lacks the columns {', '.join(missing)}")
    examples = [
        (f"{HUB_ID} {task.name} {split}:{number}", dict(zip(columns, values, strict=True)))
        for number, values in enumerate(zip(*columns.values(), strict=True), 1)
    ]
    return _to_split(task, examples, is_test=split.startswith("test"))


def _from_folder(task: Task, split: str, folder: Path) -> Split | None:
    for name in (split, f"{split}_subset"):
        for path in (folder / f"{name}.jsonl.gz", folder / f"{name}.jsonl"):
            if path.is_file():
                examples = _read_lines(path)
                return _to_split(task, examples, is_test=split.startswith("test"))
    return None


def _read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Place and columns of each example; blank lines hold none."""
    examples: list[tuple[str, dict[str, Any]]] = []
    number = 1  # of the line that is read
    try:
        with path.open("rb") as raw:
            plain = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            # Some editors put a byte-order mark before the first line.
            lines = io.TextIOWrapper(plain, encoding="utf-8-sig")
            for line in lines:
                if line.strip():
                    example = json.loads(line)
                    if not isinstance(example, dict):
                        raise DataError(f"{path}:{number}: an object with columns is needed")
                    examples.append((f"{path}:{number}", example))
                number += 1
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}:{number}: not readable as JSON lines ({error})") from None
    return examples


def _to_split(task: Task, placed: list[tuple[str, dict[str, Any]]], *, is_test: bool) -> Split:
    for where, example in placed:
        missing = [c for c in (*task.columns, "label") if c not in example]
        if missing:
            raise DataError(
                f"{where} lacks the columns {', '.join(missing)} of {task.name}: it has "
                f"{', '.join(example) or 'none'}"
            )
        if not all(isinstance(example[c], str) for c in task.columns):
            raise DataError(f"{where}: {' and '.join(task.columns)} must be text")
        if any("\ud800" <= c <= "\udfff" for name in task.columns for c in example[name]):
            raise DataError(
                f"{where}: {' or '.join(task.columns)} holds half of a surrogate pair, which is no text"
            )
        _check_label(task, example["label"], where, is_test)
    examples = [example for _, example in placed]
    index = [e.get("idx") for e in examples]
    ordered = sorted(i for i in index if isinstance(i, int)) == list(range(len(examples)))
    return Split(
        texts=tuple([e[c] for e in examples] for c in task.columns),
        labels=[float(e["label"]) for e in examples],
        index=[int(i) for i in index if i is not None] if ordered else list(range(len(examples))),
    )


def _check_label(task: Task, label: Any, where: str, is_test: bool) -> None:
    number = isinstance(label, int | float) and not isinstance(label, bool)
    number = number and -1 <= label <= 5  # neither NaN nor an integer that no float holds
    if number and is_test and label == -1:
        return  # hidden
    if task.is_regression:
        if not (number and 0 <= label <= 5):
            raise DataError(f"{where}: label {label!r} of {task.name} must be a number from 0 to 5")
    elif not (number and label == int(label) and 0 <= label < len(task.labels)):
        last = len(task.labels) - 1
        raise DataError(
            f"{where}: label {label!r} of {task.name} must be a whole number from 0 to {last}"
        )


def _divide(split: Split) -> tuple[Split, Split]:
    """Four fifths and one fifth by a hash of the first text, so that a repeated text never falls on both sides."""
    is_train = [zlib.crc32(text.encode()) % 5 != 0 for text in split.texts[0]]
    return split.where(is_train), split.where([not k for k in is_train])


def _check_metric_defined(task: Task, split: Split, where: str) -> None:
    if len(set(split.labels)) < 2:
        seen = "no label" if not split.labels else f"the label {split.labels[0]:g} only"
        raise DataError(
            f"{where} holds {seen}: {' and '.join(task.metrics)} are not defined on one class, give a whole split"
        )


def compute_metrics(
    task: Task, predictions: Sequence[float], labels: Sequence[float]
) -> dict[str, float]:
    """GLUE's metrics of a task, as fractions (Matthews and correlations from -1).

    Args:
        task: Which task.
        predictions: Class ids, or values for STS-B.
        labels: The true ones.

    Returns:
        Metric name to value. A correlation with constant predictions is undefined: NaN.

    Raises:
        DataError: when the labels hold one class only, on which no metric of GLUE says anything.
    """
    if len(set(labels)) < 2:
        raise DataError(
            f"{task.name}: the labels hold one class only, {task.metrics[0]} is not defined"
        )
    if task.is_regression:
        from scipy.stats import pearsonr, spearmanr

        if len(set(predictions)) < 2:
            return dict.fromkeys(task.metrics, math.nan)
        pearson = float(pearsonr(predictions, labels).statistic)
        spearman = float(spearmanr(predictions, labels).statistic)
        return {
            "pearson_spearman": (pearson + spearman) / 2,
            "pearson": pearson,
            "spearman": spearman,
        }
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    known = {
        "matthews": lambda: matthews_corrcoef(labels, predictions),
        "accuracy": lambda: accuracy_score(labels, predictions),
        "f1": lambda: f1_score(labels, predictions, zero_division=0),
    }
    return {name: float(known[name]()) for name in task.metrics}
