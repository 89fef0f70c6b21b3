"""What a job needs that a bare install does not bring, said before anything of it is imported."""

from __future__ import annotations

import importlib.util

from pipeline.errors import UnfitError

#: What is asked for: (extra of the distribution, the modules it brings).
_EXTRAS = {
    "finetune": ("train", ("lightning",)),
    "distill": ("train", ("lightning",)),
    "apply": ("kubernetes", ("kubernetes",)),
    "demo": ("demo", ("lightning", "sklearn")),
    "delta": ("delta", ("deltalake",)),
    "iceberg": ("iceberg", ("pyiceberg",)),
}


def check_installed(what: str) -> None:
    """Raises UnfitError when something is missing."""
    extra, modules = _EXTRAS.get(what, ("", ()))
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        do = f"Install the extra: pip install 'nightlabel[{extra}]'"
        raise UnfitError(f"{what} needs {', '.join(modules)}, and there is no {', '.join(missing)}", do=do)
