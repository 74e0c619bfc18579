"""Loading of checkpoints with diffusers' and transformers' own code, quietly and safely."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries from drawing progress bars and from noting what is not installed."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    both: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    before = [(logging, logging.get_verbosity(), logging.is_progress_bar_enabled()) for logging in both]
    for logging in both:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging, level, bars in before:
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()


def named_class(file: Path, what: str) -> str:
    """Return the name of the class that a file of a checkpoint, in JSON, gives as its own.

    Raises:
        ValueError: if the file cannot be read or names none; one line that names it.
    """
    try:
        name = json.loads(file.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, TypeError, KeyError) as fault:
        raise ValueError(f"{what}: the file {str(file)!r} must be JSON that has a _class_name") from fault
    return str(name)


def from_pretrained(load: Callable[..., T], path: str, what: str, **options: Any) -> T:
    """Call a library's `from_pretrained` on a hub id or a local folder.

    Weights come from safetensors, or from files that the libraries read with `weights_only=True`.

    Raises:
        ValueError: if there is no such folder, or the library cannot load it; one line that names it.
    """
    local = Path(path).is_dir()
    if not local and not HUB_ID.fullmatch(path):
        raise ValueError(f"{what}: there is no folder {path!r}, and it is no hub id (owner/name) either")
    try:
        if local:
            with quiet():
                return load(path, local_files_only=True, **options)
        return load(path, **options)
    except Exception as fault:  # the libraries raise their own kinds, and kinds of the libraries below them
        reason = " ".join(str(fault).split())[:300]
        where = f"the folder {path!r}" if local else f"{path!r} from the hub (which needs a network)"
        raise ValueError(f"{what}: cannot load {where}: {reason}") from fault
