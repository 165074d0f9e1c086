"""Change what a checkpoint says, as another version or another time would have written it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_trainer.storage.atomic_files import to_json


def rewrite_state(checkpoint: Path, change: Callable[[dict[str, Any]], None], *, manifest_format: int = 2) -> None:
    """Let `change` alter the JSON of a checkpoint, whose manifest then vouches for it."""
    state = json.loads((checkpoint / "state.json").read_text())
    change(state)
    content = to_json(state)
    (checkpoint / "state.json").write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    files = manifest["files"] | {"state.json": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    digest = hashlib.sha256(to_json(files)).hexdigest()
    manifest |= {"format": manifest_format, "files": files, "sha256": digest}
    (checkpoint / "manifest.json").write_bytes(to_json(manifest))
