"""A model of what a disk may hold after a power cut: synced content and names for certain, the rest perhaps.

The rules are those of POSIX, harder than any one file system: a file's content is certain after its fsync, a name in a
folder after that folder's fsync. Whatever came later may be there or not, each file and each name for itself, in any
order; unsynced content may also be cut short or zeros. Only a rename is atomic. (The idea is that of ALICE, Pillai et
al., OSDI 2014.)
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from pathlib import Path

Names = dict[str, int]  # name in a folder -> inode


@dataclass(frozen=True)
class Snapshot:
    """The tree under a root at one moment: contents by inode, names by the inode of their folder."""

    root: int
    contents: dict[int, bytes]
    names: dict[int, Names]


@dataclass(frozen=True)
class CutMoment:
    """What is there, and what would certainly be there if the power went now."""

    seen: Snapshot
    synced_contents: dict[int, bytes]
    synced_names: dict[int, Names]
    reported: int | None
    """Step of the newest checkpoint that the run reported as saved."""


@dataclass
class DiskTracer:
    """An observer that follows a run operation by operation."""

    root: Path
    moments: list[CutMoment] = field(default_factory=list)
    reported: int | None = None
    _contents: dict[int, bytes] = field(default_factory=dict)
    _names: dict[int, Names] = field(default_factory=dict)

    def __call__(self, moment: str, operation: str, path: Path) -> None:
        if not path.is_relative_to(self.root):
            return
        seen = _look(self.root)
        if moment == "after" and operation == "sync":
            inode = path.stat().st_ino
            self._contents[inode] = seen.contents[inode]
        if moment == "after" and operation == "sync_folder":
            inode = path.stat().st_ino
            self._names[inode] = dict(seen.names[inode])
        self._forget_reused(seen)
        self.moments.append(CutMoment(seen, dict(self._contents), dict(self._names), self.reported))

    def _forget_reused(self, seen: Snapshot) -> None:
        """A file that is gone may leave its inode's number to a new one, of which nothing is synced yet."""
        alive = {*seen.contents, *seen.names}
        named = {inode for names in self._names.values() for inode in names.values()}
        for inode in [*self._contents]:
            if inode not in alive and inode not in named:
                del self._contents[inode]


def _look(root: Path) -> Snapshot:
    contents: dict[int, bytes] = {}
    names: dict[int, Names] = {}
    for folder, _, _ in os.walk(root):
        own: Names = {}
        for entry in os.scandir(folder):
            own[entry.name] = entry.inode()
            if entry.is_file():
                contents[entry.inode()] = b"" if entry.name == ".reserve" else Path(entry.path).read_bytes()
        names[Path(folder).stat().st_ino] = own
    return Snapshot(root.stat().st_ino, contents, names)


def possible_state(cut: CutMoment, draw: random.Random, target: Path) -> None:
    """Write one of the trees that the power cut may leave into `target`; how much survives is drawn first."""
    luck = draw.choice([0.0, 0.0, 0.2, 0.5, 0.8, 1.0])
    _materialise(cut, cut.seen.root, draw, luck, target)


def _materialise(cut: CutMoment, folder: int, draw: random.Random, luck: float, target: Path) -> None:
    target.mkdir(parents=True)
    for name, inode in _names_after(cut, folder, draw, luck).items():
        if inode in cut.seen.names or inode in cut.synced_names:
            _materialise(cut, inode, draw, luck, target / name)
        else:
            (target / name).write_bytes(_content_after(cut, inode, draw, luck))


def _names_after(cut: CutMoment, folder: int, draw: random.Random, luck: float) -> Names:
    """Each change of a name since the folder's last sync happened or did not; both names of a rename together."""
    before, now = cut.synced_names.get(folder, {}), cut.seen.names.get(folder, {})
    changed = {name for name in {*before, *now} if before.get(name) != now.get(name)}
    groups: list[set[str]] = []
    for name in sorted(changed):
        touched = {before.get(name), now.get(name)} - {None}
        own = {name} | {other for other in changed if {before.get(other), now.get(other)} & touched}
        merged = [group for group in groups if group & own]
        groups = [group for group in groups if not group & own] + [own.union(*merged)]
    result = {name: inode for name, inode in before.items() if name not in changed}
    for group in groups:
        source = now if draw.random() < luck else before
        result |= {name: source[name] for name in group if name in source}
    return result


def _content_after(cut: CutMoment, inode: int, draw: random.Random, luck: float) -> bytes:
    """Synced content, or what was written since: whole, cut short, or zeros."""
    synced, now = cut.synced_contents.get(inode), cut.seen.contents.get(inode)
    if now is None or now == synced or (synced is not None and draw.random() >= luck):
        return synced if synced is not None else b""
    kind = draw.random()
    if kind < luck:
        return now
    certain = len(synced) if synced is not None and now.startswith(synced) else 0
    kept = draw.randint(certain, len(now))
    return now[:kept] if kind < (1 + luck) / 2 else now[:kept] + bytes(len(now) - kept)
