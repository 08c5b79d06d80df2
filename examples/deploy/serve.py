"""Start a server only on what was proven: the server replaces this process, or never starts.

    python serve.py receipt.json release.pub "$DIR" "$TP" -- vllm serve "$DIR" -tp "$TP"

Only what stands before `--` is checked, so take directory and degree from variables. In a server
of your own call `tpcheck.require` before the first weight is read.
"""

import os
import sys

import tpcheck


def main() -> None:
    if len(sys.argv) < 7 or sys.argv[5] != "--":
        sys.exit("usage: serve.py RECEIPT PUBLIC_KEY MODEL_DIR TP_SIZE -- COMMAND [ARGUMENT ...]")
    receipt, public_key, model_dir, tp_size, _, *command = sys.argv[1:]
    if not tp_size.isdecimal():
        sys.exit(f"not started: TP_SIZE={tp_size!r}, but should be a whole number")
    try:
        tpcheck.require(receipt, model_dir=model_dir, tp_size=int(tp_size), public_key=public_key)
    except tpcheck.TPCheckError as refused:
        sys.exit(f"not started: {refused}")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
