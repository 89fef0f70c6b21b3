"""What `nightlabel` and `python -m pipeline` begin with."""

import signal


def main() -> None:
    """`cli.main`; a Ctrl-C among its imports, which take a second, ends the process without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from pipeline.cli import main

    main()


if __name__ == "__main__":
    main()
