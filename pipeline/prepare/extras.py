"""What a job needs that a bare install does not bring, said before anything of it is imported."""

from __future__ import annotations

import importlib.util

from pipeline.errors import UnfitError

#: kind: (extra of the distribution, the modules it brings).
_EXTRAS = {
    "finetune": ("train", ("lightning",)),
    "distill": ("train", ("lightning",)),
    "apply": ("kubernetes", ("kubernetes",)),
    "demo": ("demo", ("lightning", "sklearn")),
}


def check_installed(kind: str) -> None:
    """Raises UnfitError when something is missing."""
    extra, modules = _EXTRAS.get(kind, ("", ()))
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        do = f"Install the extra: pip install 'nightlabel[{extra}]'"
        raise UnfitError(f"{kind} needs {', '.join(modules)}, and there is no {', '.join(missing)}", do=do)
