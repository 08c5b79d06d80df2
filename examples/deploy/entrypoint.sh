#!/bin/sh
# A container's ENTRYPOINT: the command given to the container runs only on what was proven.
#
#   ENTRYPOINT ["/entrypoint.sh"]
#   CMD ["sh", "-c", "exec vllm serve \"$MODEL_DIR\" -tp \"$TP_SIZE\" --dtype \"$DTYPE\""]
#
# The command takes directory, degree and dtype from the variables that are checked here: written
# out a second time, they may say something else.
set -eu

: "${MODEL_DIR:?is not set, but should be the directory of the weights}"
: "${TP_SIZE:?is not set, but should be the degree that the server runs at}"
: "${DTYPE:?is not set, but should be the dtype that the server runs in}"
: "${TPCHECK_RECEIPT:?is not set, but should be the path of the receipt}"
: "${TPCHECK_PUBLIC_KEY:?is not set, but should be the path of the public key}"

tpcheck gate --verify "$TPCHECK_RECEIPT" --public-key "$TPCHECK_PUBLIC_KEY" \
    --model "$MODEL_DIR" --tp "$TP_SIZE" --dtype "$DTYPE"
exec "$@"
