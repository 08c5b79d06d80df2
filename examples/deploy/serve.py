"""Start a server only on what was proven: the server replaces this process, or never starts.

    python serve.py receipt.json release.pub "$DIR" "$TP" "$DTYPE" -- \\
        vllm serve "$DIR" -tp "$TP" --dtype "$DTYPE"

Only what stands before `--` is checked, so take directory, degree and dtype from variables. In a
server of your own call `tpcheck.require` before the first weight is read.
"""

import os
import sys

import tpcheck


def main() -> None:
    split = sys.argv.index("--") if "--" in sys.argv else 0
    given, command = sys.argv[1:split], sys.argv[split + 1 :]
    if len(given) not in (4, 5) or not command:
        usage = "RECEIPT PUBLIC_KEY MODEL_DIR TP_SIZE [DTYPE] -- COMMAND [ARGUMENT ...]"
        sys.exit(f"usage: serve.py {usage}")
    receipt, public_key, model_dir, tp_size, *dtype = given
    if not tp_size.isdecimal():
        sys.exit(f"not started: TP_SIZE={tp_size!r}, but should be a whole number")
    try:
        tpcheck.require(
            receipt,
            model_dir=model_dir,
            tp_size=int(tp_size),
            public_key=public_key,
            dtype=dtype[0] if dtype else None,
        )
    except tpcheck.TPCheckError as refused:
        sys.exit(f"not started: {refused}")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
