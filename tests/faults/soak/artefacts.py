"""What a soak leaves behind: its report, and after a failure all that it was judged from."""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.faults.soak.run import Soak
    from tests.faults.soak.stage import Stage


@contextmanager
def kept(stage: Stage, result: Soak, *, directory: Path) -> Iterator[None]:
    """Write the relays' logs into *directory*, and if the body fails everything else too."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with gzip.open(directory / "soak.pickle.gz", "wb") as file:
            pickle.dump(result, file)  # to be judged again: report_of(pickle.load(...), ...)
        shutil.copy(stage.server.log_path, directory / "postgres.log")
        raise
    finally:
        for number, relay in enumerate(stage.relays):
            log = "".join(f"{json.dumps(each)}\n" for each in relay.log)
            (directory / f"relay-{number}.jsonl").write_text(log)
