"""The results of an evaluation on disk: <output_dir>/<model>/<benchmark>/ with identity.json, samples.jsonl, results.json, and parts/ while
it is running.

identity.json says to which weights, problems, protocol and engine the samples belong. Finished samples are never generated again; a folder
with another identity is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from rlinf.errors import UserError
from rlinf.evaluation.problems import Unit
from rlinf.files import as_json, read_json, scratch_of, write_whole
from rlinf.run_folder.folder import lock_alone

IDENTITY, SAMPLES, RESULTS, PARTS = "identity.json", "samples.jsonl", "results.json", "parts"


class SetFolder:
    """The samples of one model on one benchmark. done: group ids of the units that are complete."""

    def __init__(self, path: Path, identity: dict[str, Any], units: Sequence[Unit]) -> None:
        self.path, self.identity = path, identity
        self.units = {unit.group_id: unit for unit in units}
        self._claim(identity)
        self.done = self.gather()

    @property
    def samples(self) -> Path:
        return self.path / SAMPLES

    def part(self, rank: int) -> Path:
        """The file to which reward worker `rank` appends samples."""
        return self.path / PARTS / f"{rank}.jsonl"

    def gather(self) -> set[str]:
        """Collect the parts in samples.jsonl, in the order of problems and samples. Units that an interruption cut short are dropped.

        A kill at any instant loses nothing that was complete: parts are removed only when the new samples.jsonl is on disk.
        """
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for file in [self.samples, *sorted((self.path / PARTS).glob("*.jsonl"))]:
            for row in read_rows(file):
                if row["group_id"] in self.units:
                    found.setdefault(row["group_id"], {}).setdefault(int(row["sample_id"].rpartition("/")[2]), row)
        done = {group_id for group_id, rows in found.items() if len(rows) == self.units[group_id].count}
        lines = (
            json.dumps({"problem": unit.prompt.prompt_id, "sample": unit.first + k} | found[group_id][k], ensure_ascii=False) + "\n"
            for group_id, unit in self.units.items()
            if group_id in done
            for k in range(unit.count)
        )
        write_whole(self.samples, lines, "replace")
        shutil.rmtree(self.path / PARTS, ignore_errors=True)
        return done

    def write_results(self, results: dict[str, Any]) -> None:
        write_whole(self.path / RESULTS, as_json(results))

    def _claim(self, identity: dict[str, Any]) -> None:
        file = self.path / IDENTITY
        if not file.exists():
            own = scratch_of(file).name  # of an evaluation that was killed as it began
            foreign = sorted({p.name for p in self.path.iterdir()} - {own}) if self.path.is_dir() else []
            if foreign:
                raise UserError(
                    f"{self.path}: the folder holds {foreign[0]} but no evaluation; set evaluation.output_dir to another folder"
                )
            _make(self.path)
            write_whole(file, as_json(identity))
            return
        before = read_json(file)
        other = [name for name in identity if before.get(name) != identity[name]]
        if other:
            named = "; ".join(f"{name} was {json.dumps(before.get(name))}, now {json.dumps(identity[name])}" for name in other)
            raise UserError(
                f"{self.path}: the samples there are of another evaluation ({named}); nothing was overwritten. "
                "Set evaluation.output_dir to another folder, or move this one away"
            )


def hold(model_folder: Path) -> TextIO:
    """Lock a model's folder for as long as the returned file is open. Raises UserError when another process writes there."""
    _make(model_folder)
    lock = open(model_folder / ".lock", "w")
    busy = f"{model_folder}: another evaluation is writing here now; wait for it, or set evaluation.output_dir to another folder"
    with ExitStack() as on_failure:
        on_failure.callback(lock.close)
        lock_alone(lock, model_folder, "evaluation.output_dir", busy)
        on_failure.pop_all()
    return lock


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a dump, without a line that a kill cut short. Lines end at \\n only, since texts may contain other separators."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"evaluation.output_dir: cannot create {path}: {error.strerror}; choose a folder that you may write to") from error
